"""Classification by likelihood: nothing is generated, label words are compared. About 20 seconds on a CPU.

python examples/classification.py [RUN_DIR]
"""

import sys

from shardes import TrainConfig, Trainer

config = TrainConfig(
    model={"path": "configs/quickstart/model", "dtype": "float32"},
    run={"dir": sys.argv[1] if len(sys.argv) > 1 else "runs/classification"},
    rollout={"max_new_tokens": 1, "micro_batch_size": 64},
    es={"iterations": 20, "population": 20, "antithetic": True, "sigma": 0.03, "alpha": 0.03}
    | {"alpha_schedule": "linear"},
    eval={"every": 5},
    # A label is an index into label_words; the template makes the prompt, which one of them has to follow.
    task={"name": "classification", "template": "{{ text }}", "label_words": ["-", "+"]},
)
# Is the first number larger than the second?
pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
rows = [{"text": f"{a} {b}", "label": int(a > b)} for a, b in pairs]
is_heldout = [(3 * a + b) % 5 == 0 for a, b in pairs]
trainer = Trainer(
    config,
    data=[row for row, out in zip(rows, is_heldout, strict=True) if not out],
    heldout_data=[row for row, out in zip(rows, is_heldout, strict=True) if out],
    on_evaluation=lambda metrics: print(
        f"after {metrics['iteration']:2} updates: accuracy {metrics['heldout_components']['accuracy']:.2f}, "
        f"cross-entropy {-metrics['heldout_reward']:.2f}"
    ),
)
trainer.train()
