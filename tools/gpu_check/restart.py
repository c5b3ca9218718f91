"""Ranks that are killed: the others end, and the same command goes on and ends with the same bytes."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from gpu_check import training
from gpu_check.part import ROOT, Context, is_installed
from gpu_check.processes import Ranks, run_ranks

SCRIPT = ROOT / "launch" / "train.py"
# After a rank has died, how long the others may take to end.
END_SECONDS = 80
_POLL_SECONDS = 0.02


def words_of(run_dir: Path, backend: str, *changes: str, is_rehearsal: bool) -> list[str]:
    """Return the command of a short quickstart, without the interpreter."""
    iterations = 4 if is_rehearsal else 16
    return [
        str(SCRIPT),
        "--config",
        str(ROOT / "configs" / "quickstart.yaml"),
        f"run.dir={run_dir}",
        f"parallel.backend={backend}",
        "parallel.timeout_seconds=40",
        f"es.iterations={iterations}",
        "es.population=6",
        f"task.batch_size={8 if is_rehearsal else 16}",
        "eval.every=4",
        "run.snapshot_every=2",
        *changes,
    ]


def num_lines(run_dir: Path) -> int:
    """Return the number of lines in a run's journal; 0 if there is none."""
    path = run_dir / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(ranks: Ranks, run_dir: Path, count: int, *, seconds: float) -> bool:
    """Wait until the journal has so many lines; return False if a rank ended or time ran out before."""
    deadline = time.monotonic() + seconds
    while num_lines(run_dir) < count:
        if time.monotonic() > deadline or any(process.poll() is not None for process in ranks.processes):
            return False
        time.sleep(_POLL_SECONDS)
    return True


def run(context: Context) -> None:
    """Kill a rank under each backend at a place of its own, and let the run go on."""
    folder, forks, num_ranks = context.folder, context.is_rehearsal, context.num_ranks
    told: dict[str, Any] = {"folder": folder / "logs", "forks": forks, "seconds": 120}
    backends = ["single"] if num_ranks == 1 else ["fsdp"] if forks else ["fsdp", "zero3"]
    if not is_installed("deepspeed"):
        backends = [backend for backend in backends if backend != "zero3"]
        if num_ranks > 1 and not forks:
            context.skip("zero3", "not installed: deepspeed")
    # Replicas' runs have other micro-batches than one rank's only under tensor parallelism.
    undisturbed = folder / "undisturbed"
    run_ranks(words_of(undisturbed, "single", is_rehearsal=forks), num_ranks=1, **told)
    wanted = training.outcome(undisturbed)
    for number, backend in enumerate(backends):
        with context.section(backend):
            run_dir = folder / backend
            words = words_of(run_dir, backend, is_rehearsal=forks)
            # In the middle of an iteration's members.
            kill_at = num_lines(undisturbed) // 3 + number
            seconds, statuses, output = kill_a_rank(words, context, run_dir, victim=num_ranks - 1, at=kill_at)
            context.record(**{f"{backend}_seconds_to_end": seconds})
            check_others_ended(context, backend, statuses=statuses, output=output)
            if num_ranks > 1:
                is_told = "ended without a word" in output
                context.check(f"{backend}: the death was told", is_told, detail=output[-1500:])
            before = num_lines(run_dir)
            run_ranks(words, num_ranks=num_ranks, **told)
            found = training.differences(wanted, training.outcome(run_dir))
            context.record(**{f"{backend}_lines_before": before})
            context.check(
                f"{backend}: the bits of a run that nothing happened to", not found, detail=f"{found}"
            )


def check_others_ended(context: Context, name: str, *, statuses: list[int | None], output: str) -> None:
    """Check that all ranks but the last one, which got a signal, ended with a status that is not 0."""
    context.check(
        f"{name}: the other ranks ended, with a status that is not 0",
        all(status not in (None, 0) for status in statuses[:-1]),
        detail=f"{statuses}: {output[-1500:]}",
    )


def kill_a_rank(
    words: list[str],
    context: Context,
    run_dir: Path,
    *,
    victim: int,
    at: int,
    with_signal: int = signal.SIGKILL,
) -> tuple[float, list[int | None], str]:
    """Start a job, and send a rank a signal when the journal has so many lines.

    Returns:
        Seconds until all other ranks had ended; the exit statuses of all, None for those that had not ended;
        their output.

    Raises:
        RuntimeError: The job ended, or did not get so far, before.
    """
    num_ranks, folder = context.num_ranks, context.folder / f"killed-{run_dir.name}"
    with Ranks(words, num_ranks=num_ranks, folder=folder, forks=context.is_rehearsal) as ranks:
        if not wait_for_lines(ranks, run_dir, at, seconds=90):
            statuses = [process.poll() for process in ranks.processes]
            raise RuntimeError(f"the job did not get to line {at}: {statuses}, {ranks.output()[-2000:]}")
        os.kill(ranks.processes[victim].pid, with_signal)
        begin = time.monotonic()
        ranks.wait(END_SECONDS, ranks=[rank for rank in range(num_ranks) if rank != victim])
        seconds = time.monotonic() - begin
        if with_signal == signal.SIGKILL:
            ranks.processes[victim].wait(5)
        return seconds, [process.poll() for process in ranks.processes], ranks.output()
