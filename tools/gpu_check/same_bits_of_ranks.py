"""Every backend, gather and number of replicas on several GPUs, against one of them, in every bit."""

import json
from pathlib import Path
from typing import Any

from gpu_check import training
from gpu_check.part import Context, is_installed
from gpu_check.ranks import run_job
from gpu_check.same_bits import replay_on_cpu

GATHERS = ("layer", "member", "iteration")
# Backend, gather and ranks of a replica: each gather and each size once.
_REHEARSED = {("fsdp", "member", 2), ("fsdp", "layer", 2), ("fsdp", "iteration", 1)}
# Tensor parallelism splits the heads of the small model: 8 for keys and values, 2 in a rehearsal.
_KV_HEADS = {False: 8, True: 2}


def run(context: Context) -> None:
    """Train on one rank, then on 2 and on all of them, and compare journals."""
    training.make_files(context.folder, is_tiny=context.is_rehearsal)
    single = {"one rank": _tree(context, "one", "single", "member", None)}
    run_job(context, "train", single, num_ranks=1, seconds=90)
    wanted = training.outcome(context.folder / "runs" / "one")
    context.check("rewards tell members apart", training.tells_members_apart(wanted))
    for num_ranks in sorted({2, context.num_ranks}):
        for backend in ("zero3", "fsdp", "single"):
            if backend == "zero3" and not is_installed("deepspeed"):
                context.skip(f"zero3 on {num_ranks} ranks", "not installed: deepspeed")
                continue
            trees = cases_of(context, backend, num_ranks)
            if not trees:
                continue
            with context.section(f"{backend} on {num_ranks} ranks"):
                run_job(context, "train", trees, num_ranks=num_ranks, seconds=120)
            for name, tree in trees.items():
                journal = Path(tree["run"]["dir"]) / "journal.jsonl"
                found = training.outcome(journal.parent) if journal.exists() else {"weights": []}
                if len(found["weights"]) < len(wanted["weights"]):
                    context.failures.setdefault(name, "the run did not come to its end")
                    context.save()
                    continue
                other = training.differences(wanted, found)
                context.check(f"{name}: the bits of one rank", not other, detail=f"other {other}")
        if _KV_HEADS[context.is_rehearsal] % num_ranks == 0:
            with context.section(f"tensor_parallel on {num_ranks} ranks"):
                _compare_split(context, num_ranks, wanted)


def _tree(context: Context, name: str, backend: str, gather: str, shard_size: int | None) -> dict[str, Any]:
    return training.tree(
        context.folder,
        name,
        is_tiny=context.is_rehearsal,
        parallel__backend=backend,
        parallel__shard_size=shard_size,
        rollout__gather=gather,
    )


def cases_of(context: Context, backend: str, num_ranks: int) -> dict[str, dict[str, Any]]:
    """Return the configurations of a backend on a number of ranks, by a name that says what they are."""
    sizes = [num_ranks, 1] if num_ranks < 4 or num_ranks % 2 else [num_ranks, num_ranks // 2, 1]
    gathers = GATHERS if backend != "single" else ("member", "iteration")
    cases = {}
    for size in sizes:
        for gather in gathers:
            if context.is_rehearsal and (backend, gather, size) not in _REHEARSED:
                continue
            name = f"{backend}, {gather}, {num_ranks} ranks, {num_ranks // size} replica(s)"
            run_name = f"{backend}-{gather}-{num_ranks}-{size}"
            cases[name] = _tree(context, run_name, backend, gather, size)
    return cases


def _compare_split(context: Context, num_ranks: int, wanted: dict[str, Any]) -> None:
    name = f"tensor_parallel, {num_ranks} ranks"
    tree = _tree(context, f"split-{num_ranks}", "tensor_parallel", "layer", None)
    run_job(context, "train", {name: tree}, num_ranks=num_ranks, seconds=90)
    run_dir = Path(tree["run"]["dir"])
    found = training.outcome(run_dir)
    context.check(f"{name}: the base weights of one rank", found["base"] == wanted["base"])
    pairs = list(zip(found["rewards"], wanted["rewards"], strict=True))
    # Their forwards sum in another order, so that answers may differ where two tokens are about as likely.
    share = sum(one == other for one, other in pairs) / len(pairs)
    context.record(**{f"tensor_parallel_{num_ranks}_ranks_equal_rewards_share": share})
    problems = replay_on_cpu({name: run_dir})[name]
    context.check(f"{name}: the journal gives the same weights on the CPU", not problems, detail=problems)


def train_all(context: Context, trees: dict[str, dict[str, Any]]) -> None:
    """Train configurations one after the other, on each rank of a job."""
    for name, tree in trees.items():
        print(f"training {name}: {json.dumps(tree)}", flush=True)
        training.train(tree)
