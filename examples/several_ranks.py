"""One script for one process and for several ranks, which end with the same bytes. About 20 seconds on a CPU.

python examples/several_ranks.py [RUN_DIR]
torchrun --standalone --nproc-per-node 2 examples/several_ranks.py [RUN_DIR]
accelerate launch --num_processes 2 examples/several_ranks.py [RUN_DIR]
deepspeed --num_gpus 2 examples/several_ranks.py [RUN_DIR]

Without GPUs, accelerate wants --multi_gpu as well, or it starts one process, and deepspeed the variable
DS_ACCELERATOR=cpu.
"""

import sys

from shardes import TrainConfig, Trainer

# deepspeed tells a script its rank as an option.
arguments = [each for each in sys.argv[1:] if not each.startswith("--local_rank")]


def short(prompts, completions):
    return [-len(completion) for completion in completions]


config = TrainConfig(
    model={"path": "configs/quickstart/model", "dtype": "float32"},
    run={"dir": arguments[0] if arguments else "runs/several-ranks"},
    # How the ranks of a launcher share the model; a process that is alone holds it all.
    parallel={"backend": "fsdp", "threads_per_rank": 1},
    rollout={"max_new_tokens": 9, "micro_batch_size": 16},
    es={"iterations": 2, "population": 4, "sigma": 0.02},
)
# Every rank runs this script from top to bottom: it makes the same problems, and rank 0 alone prints.
problems = [{"prompt": f"{a} {b}={a + b}:"} for a in range(6) for b in range(6)]
trainer = Trainer(config, data=problems[6:], heldout_data=problems[:6], reward=short)
result = trainer.train()
model = trainer.export(config.run_dir / "model")
if trainer.is_main:
    print(f"weights digest: {result.metrics[-1]['weights_digest']}, written to {model}")
