"""Run on every rank of a job: ``python -m gpu_check.ranks JOB SPEC.json``; rank 0 writes the findings."""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check.part import Context
from gpu_check.processes import run_ranks

# Module and function of each job.
JOBS = {
    "train": "same_bits_of_ranks:train_all",
    "links": "links:measure",
    "split": "split:measure",
    "gathers": "gathers:measure",
}


def run_job(context: Context, job: str, spec: Any, *, num_ranks: int, seconds: float) -> None:
    """Run a job on some ranks to its end, and take over what it found.

    Raises:
        RuntimeError: A rank failed, or did not end in time. What was found until then is taken over.
    """
    number = len(list(context.folder.glob("job-*.json")))
    told, out = context.folder / f"job-{number}.json", context.folder / f"found-{number}.json"
    folder = str(context.folder)
    seconds = min(seconds, context.seconds_left - 2)
    told.write_text(
        json.dumps(
            {
                "spec": spec,
                "out": str(out),
                "folder": folder,
                "is_rehearsal": context.is_rehearsal,
                "num_ranks": num_ranks,
                "seconds": seconds,
            }
        )
    )
    try:
        run_ranks(
            ["-m", "gpu_check.ranks", job, str(told)],
            num_ranks=num_ranks,
            folder=context.folder / f"job-{number}-logs",
            forks=context.is_rehearsal,
            seconds=seconds,
        )
    finally:
        if out.exists():
            for name, found in json.loads(out.read_text()).items():
                getattr(context, name).update(found)
            context.save()


def main(job: str, path: Path) -> None:
    """Run a job on this rank."""
    # Sessions that follow each other meet in one store, as under torchrun.
    import torch
    from torch.distributed import TCPStore

    if torch.cuda.is_available():
        # Before anything asks about the current device, which would make a context on the first one.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    rank = int(os.environ["RANK"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=True, wait_for_workers=False) if rank == 0 else None
    told = json.loads(path.read_text())
    out = Path(told["out"])
    context = Context(
        is_rehearsal=told["is_rehearsal"],
        num_ranks=told["num_ranks"],
        folder=Path(told["folder"]),
        out=out if rank == 0 else out.with_suffix(f".rank{rank}"),
        deadline=time.monotonic() + told["seconds"],
    )
    module, _, function = JOBS[job].partition(":")
    getattr(importlib.import_module(f"gpu_check.{module}"), function)(context, told["spec"])
    del store


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    # DeepSpeed keeps its group to the interpreter's very end, where destructors race.
    os._exit(0)
