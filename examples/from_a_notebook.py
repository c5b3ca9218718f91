"""What a cell of a notebook does to train on several ranks: accelerate starts them. About 20 s on a CPU.

python examples/from_a_notebook.py [RUN_DIR]
"""

import sys

from accelerate import notebook_launcher

RUN_DIR = sys.argv[1] if len(sys.argv) > 1 else "runs/from-a-notebook"


def short(prompts, completions):
    return [-len(completion) for completion in completions]


def train():
    """Runs in every process; so what trains is imported and made here."""
    from shardes import TrainConfig, Trainer

    config = TrainConfig(
        model={"path": "configs/quickstart/model", "dtype": "float32"},
        run={"dir": RUN_DIR},
        parallel={"backend": "fsdp", "threads_per_rank": 1},
        rollout={"max_new_tokens": 9, "micro_batch_size": 16},
        es={"iterations": 2, "population": 4, "sigma": 0.02},
    )
    problems = [{"prompt": f"{a} {b}={a + b}:"} for a in range(6) for b in range(6)]
    trainer = Trainer(config, data=problems[6:], heldout_data=problems[:6], reward=short)
    result = trainer.train()
    if trainer.is_main:
        print(f"weights digest: {result.metrics[-1]['weights_digest']}")


notebook_launcher(train, num_processes=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0")
