"""A rank that stops in the middle of a collective: the others end within the timeouts, with a message."""

import re
import signal

from gpu_check import restart
from gpu_check.part import Context, is_installed

# NCCL's watchdog looks now and then, and dumps what it knows before it ends a process.
GRACE_SECONDS = 60


def run(context: Context) -> None:
    """Stop a rank under each backend and gather; expect the other ranks to end."""
    timeout = 3 if context.is_rehearsal else 15
    cases = [("fsdp", "member"), ("tensor_parallel", "layer"), ("zero3", "layer"), ("fsdp", "iteration")]
    for backend, gather in cases[:1] if context.is_rehearsal else cases:
        name = f"{backend}, {gather}"
        if backend == "tensor_parallel" and context.num_ranks % 2:
            context.skip(name, "takes an even number of ranks")
            continue
        if backend == "zero3" and not is_installed("deepspeed"):
            context.skip(name, "not installed: deepspeed")
            continue
        with context.section(name):
            run_dir = context.folder / f"{backend}-{gather}"
            changes = [f"rollout.gather={gather}", f"parallel.timeout_seconds={timeout}", "es.iterations=400"]
            changes += ["parallel.shard_size=2"] if backend == "tensor_parallel" else []
            words = restart.words_of(run_dir, backend, *changes, is_rehearsal=context.is_rehearsal)
            seconds, statuses, output = restart.kill_a_rank(
                words, context, run_dir, victim=context.num_ranks - 1, at=12, with_signal=signal.SIGSTOP
            )
            context.record(**{f"{backend}_{gather}_seconds_to_end": seconds})
            restart.check_others_ended(context, name, statuses=statuses, output=output)
            context.check(f"{name}: within the timeout and a grace", seconds < timeout + GRACE_SECONDS)
            is_told = re.search(r"timeout|timed out", output, re.IGNORECASE) is not None
            context.check(f"{name}: the timeout was told", is_told, detail=output[-1500:])
