"""A run that two ranks began goes on with one, and ends with the bytes of a run that one process did alone.

About 30 seconds on a CPU with two cores:

python examples/resume_on_other_ranks.py [RUN_DIR]
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from shardes import TrainConfig, Trainer

CONFIG = "configs/quickstart.yaml"
run_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/resumed")
# The quickstart, made small. es.iterations may grow later, unless a schedule depends on it.
settings = ["es.population=8", "task.batch_size=32", "es.alpha_schedule=constant", "eval.every=0"]


def train_here(name: str) -> str:
    """Trains up to 4 iterations in this process; returns a hash of the exported weights."""
    config = TrainConfig.load(CONFIG, *settings, f"run.dir={run_dir / name}", "es.iterations=4")
    trainer = Trainer(config)
    print(f"{name}: {trainer.train().metrics[-1]['iteration']} iterations are done")
    out = trainer.export(run_dir / f"{name}-model")
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# Two ranks, each with half of every parameter, do the first two iterations.
command = f"-m torch.distributed.run --standalone --nproc-per-node 2 -m shardes train --config {CONFIG}"
overrides = [*settings, f"run.dir={run_dir / 'resumed'}", "es.iterations=2", "parallel.backend=fsdp"]
subprocess.run([sys.executable, *command.split(), *overrides], check=True)
# One process does the rest: it replays the journal over the base model, and goes on.
resumed = train_here("resumed")
alone = train_here("alone")
print(f"two ranks, then one: {resumed[:16]}\none process alone:   {alone[:16]}")
sys.exit(resumed != alone)
