"""A reward of your own: a model that knows how to calculate learns to multiply. About 20 seconds on a CPU.

python examples/own_reward.py [RUN_DIR]
"""

import sys

from shardes import TrainConfig, Trainer


def multiplies(prompts, completions):
    """One number for each answer: how many signs of multiplication it has, two at most."""
    return [min(completion.count("*"), 2) / 2 for completion in completions]


config = TrainConfig(
    model={"path": "configs/quickstart/model", "dtype": "float32"},
    run={"dir": sys.argv[1] if len(sys.argv) > 1 else "runs/own-reward"},
    rollout={"max_new_tokens": 9, "micro_batch_size": 64},
    es={"iterations": 12, "population": 16, "sigma": 0.02, "alpha": 0.01},
    eval={"every": 4},
)
problems = [{"prompt": f"{a} {b} {a + b % 7}={a * b}:"} for a in range(1, 9) for b in range(1, 9)]
trainer = Trainer(config, data=problems[::2], heldout_data=problems[1::2], reward=multiplies)
for iteration, reward in trainer.train().heldout_rewards.items():
    print(f"after {iteration:2} updates: {reward:.2f}")
