"""Kill the ranks of small runs, again and again, and compare the results of the runs.

    python tools/soak.py --kills 200 --seed 0
    python tools/soak.py --kills 20 --backend vllm --last-backend vllm --config configs/vllm/quickstart.yaml \
        --ranks 2 --seconds 20 --timeout-seconds 60 parallel.shard_size=2

Each run is the quickstart's model, shortened. An attempt starts it on 1 to 4 ranks, kills one of them, and
sees that all others end by themselves, and not as if all were well; the next attempt goes on. The kill
comes at a random moment, or at a place: within a perturbation, a rollout, an update, a snapshot or a line
of a file, or before or after a file is renamed or flushed to disk. When a run has been killed often enough
it is left to end, and its journal and exported bytes are compared with those of a run of one process over
plain tensors that nobody disturbed. A line is printed per kill; the exit status is 1 if anything differed.

Ranks are forked from this process, which has imported everything, so that an attempt costs about a second.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Where a rank can be told to kill itself, besides being killed by this process at any moment.
PLACES = ("perturb", "rollout", "update", "snapshot", "line", "rename", "flush")
# Further ones of a backend.
OWN_PLACES = {"vllm": ("step",)}
SHORT = [
    "es.iterations=30",
    "es.population=5",
    "task.batch_size=8",
    "eval.every=3",
    "run.snapshot_every=2",
]
# What other backends are told, and one process over plain tensors is not.
PLAIN = ["parallel.shard_size=null", "rollout.kv_cache_gib=null"]
# What depends on the clock or on how members are evaluated, or is not written again after a crash.
VOLATILE = ("seconds", "gather", "peak_memory_bytes", "weights_digest")
# After the kill, how many times parallel.timeout_seconds the others may take to end. Without a launcher it is
# the ranks that see to it: at once, unless the dead one had not met them yet; then, when these are over.
END_TIMEOUTS = 2
# A run that nobody kills must end within this time.
RUN_SECONDS = 900


def main() -> int:
    """Run until there were enough kills; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", nargs="+", default=["zero3", "fsdp"], help="attempts take turns")
    parser.add_argument("--last-backend", default="fsdp", help="of what ends each run, on 2 ranks")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 2, 3, 2, 1, 4])
    parser.add_argument("--seconds", type=float, default=3.0, help="within which a random kill comes")
    parser.add_argument("--timeout-seconds", type=int, default=20, help="parallel.timeout_seconds")
    parser.add_argument("--dir", type=Path, help="default: a temporary one, removed at the end")
    parser.add_argument("changes", nargs="*", help="key=value, of attempts that are killed and the last ones")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = arguments.dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        root.mkdir(parents=True, exist_ok=True)
        return soak(root.resolve(), arguments)


def soak(root: Path, arguments: argparse.Namespace) -> int:
    """Run in a directory until there were enough kills; return the exit status."""
    chance = random.Random(arguments.seed)
    preload([*arguments.backend, arguments.last_backend])
    wanted = undisturbed(root, arguments)
    start = functools.partial(Attempt, chance=chance, arguments=arguments, changes=arguments.changes)
    num_kills = num_runs = num_wrong = 0
    while num_kills < arguments.kills:
        run_dir = root / f"run{num_runs}"
        for _ in range(min(arguments.kills_per_run, arguments.kills - num_kills)):
            backend = arguments.backend[num_kills % len(arguments.backend)]
            num_ranks = chance.choice(arguments.ranks)
            place = chance.choice([None, *PLACES, *OWN_PLACES.get(backend, ())])
            attempt = start(run_dir, backend=backend, num_ranks=num_ranks, place=place)
            was_killed, problems = attempt.run(kill=True)
            num_wrong += len(problems)
            if not was_killed:  # it came to its end before the kill
                print(*(f"  {attempt}: {problem}\n" for problem in problems), sep="", end="", flush=True)
                break
            num_kills += 1
            report(num_kills, attempt, problems)
        last = start(run_dir, backend=arguments.last_backend, num_ranks=2, place=None)
        _, problems = last.run(kill=False)
        if not problems:
            found = outcome(run_dir, root / "export")
            problems = [f"{name} differs" for name, value in wanted.items() if found.get(name) != value]
        num_wrong += len(problems)
        print(f"run {num_runs}: {'; '.join(problems) or 'equal'}", flush=True)
        if not problems:
            shutil.rmtree(run_dir)
        num_runs += 1
    print(f"{num_kills} kills in {num_runs} runs, {num_wrong} things wrong", flush=True)
    return int(num_wrong > 0)


def report(number: int, attempt: "Attempt", problems: list[str]) -> None:
    """Print the line of one kill."""
    journal = attempt.run_dir / "journal.jsonl"
    lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
    print(f"kill {number}: {attempt}, {lines} lines: {'; '.join(problems) or 'ended'}", flush=True)


def preload(backends: list[str]) -> None:
    """Import and compile in advance the code that ranks need, without starting a thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    needed = ["transformers.models.qwen2.modeling_qwen2", "shardes.trainer", "shardes.export.writer"]
    needed += ["shardes.noise.cpu", "shardes.weights.digest_cpu", "shardes.backends.fsdp"]
    if "zero3" in backends:
        needed += ["deepspeed", "shardes.backends.zero3"]
    if "vllm" in backends:
        from shardes.backends.vllm.launch import ENVIRONMENT

        os.environ |= ENVIRONMENT
        needed += ["vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"]
        needed += ["vllm.entrypoints.llm", "shardes.rollout.engines.vllm.engine"]
    for name in needed:
        importlib.import_module(name)
    import torch

    from shardes import noise
    from shardes.weights.digest import add_digest

    values, region = torch.zeros(8), noise.Region(param_id=0, param_size=8, start=0, length=8)
    noise.perturb(values, values.clone(), region=region, sigma=1.0, seed=0, iteration=0, direction=0)
    noise.accumulate(values, region=region, coefficients=[1.0], directions=[0], seed=0, iteration=0)
    add_digest(torch.zeros(1, dtype=torch.int64), values, region=region)


def undisturbed(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the outcome of a run on one rank that nothing kills."""
    where: dict[str, Any] = {"backend": "single", "num_ranks": 1, "place": None, "changes": PLAIN}
    attempt = Attempt(root / "undisturbed", chance=random.Random(0), arguments=arguments, **where)
    _, problems = attempt.run(kill=False)
    if problems:
        raise SystemExit(f"the undisturbed run failed: {problems}\n{attempt.output()}")
    found = outcome(attempt.run_dir, root / "export")
    if "updates" not in found:
        raise SystemExit(f"the undisturbed run cannot be exported: {found}")
    return found


def outcome(run_dir: Path, export: Path) -> dict[str, Any]:
    """Return the digest of the exported bytes, and the records of the run's files, for comparison."""
    shutil.rmtree(export, ignore_errors=True)
    child = fork(lambda: command(["shardes", "export", str(run_dir), str(export)]), run_dir / "export.log")
    _, status = os.waitpid(child, 0)
    if status:
        return {"export": f"failed: {(run_dir / 'export.log').read_text()}"}
    digest = hashlib.sha256()
    for path in sorted(export.iterdir()):
        if path.name != "README.md":
            digest.update(path.name.encode() + path.read_bytes())
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_bytes().splitlines()]
    rewards = sorted((r["iteration"], r["member"], r["reward"]) for r in lines if r["type"] == "member")
    updates = [record["coefficients"] for record in lines if record["type"] == "update"]
    evaluations = [record["reward"] for record in lines if record["type"] == "evaluation"]
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "export": digest.hexdigest(),
        "rewards": rewards,
        "updates": updates,
        "evaluations": evaluations,
        "metrics": [{key: value for key, value in line.items() if key not in VOLATILE} for line in metrics],
        "samples": (run_dir / "samples.jsonl").read_text(),
    }


class Attempt:
    """Start of a run on some ranks, until all of them have ended.

    Args:
        run_dir: Directory of the run.
        backend: Value of ``parallel.backend``.
        num_ranks: Number of ranks.
        place: Name of the place where a rank kills itself; None: this process kills it at a random moment.
        chance: Generator by which moments and ranks are drawn.
        arguments: Arguments of this program.
        changes: Further keys of the configuration, as ``key=value``.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        backend: str,
        num_ranks: int,
        place: str | None,
        chance: random.Random,
        arguments: argparse.Namespace,
        changes: list[str],
    ) -> None:
        self.run_dir = run_dir
        self._backend = backend
        self._num_ranks = num_ranks
        self._place = place
        # Lines and names are written by rank 0 alone.
        self._victim = 0 if place in ("line", "rename", "flush") else chance.randrange(num_ranks)
        self._delay = 0.5 + chance.random() * arguments.seconds
        self._end_seconds = END_TIMEOUTS * arguments.timeout_seconds
        # The how manieth call, and how long after its beginning.
        self._call = chance.choice([0, 1, 2, 4, 8, 16])
        self._after = chance.random() * 0.003
        changes = [f"parallel.timeout_seconds={arguments.timeout_seconds}", *SHORT, *changes]
        changes += [f"run.dir={run_dir}", f"parallel.backend={backend}"]
        self._command = ["train", "--config", arguments.config, *changes]
        self._logs = [run_dir.with_name(f"{run_dir.name}-rank{rank}.log") for rank in range(num_ranks)]

    def __str__(self) -> str:
        where = f"{self._place} {self._call}" if self._place else f"after {self._delay:.2f} s"
        return f"{self.run_dir.name}, rank {self._victim} of {self._num_ranks}, {self._backend}, {where}"

    def run(self, *, kill: bool) -> tuple[bool, list[str]]:
        """Start the ranks, and wait until they have ended.

        Returns:
            True if a rank was killed, and a line for each thing that went wrong.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for log in self._logs:
            log.unlink(missing_ok=True)
        children = [
            fork(functools.partial(self._rank, rank, port, kill=kill), log)
            for rank, log in enumerate(self._logs)
        ]
        begin = time.monotonic()
        statuses: dict[int, int] = {}
        killed_at: float | None = None
        while len(statuses) < len(children):
            for rank, child in enumerate(children):
                if rank not in statuses:
                    found, status = os.waitpid(child, os.WNOHANG)
                    if found:
                        statuses[rank] = os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            victim = children[self._victim]
            if kill and not self._place and not statuses and killed_at is None and now - begin > self._delay:
                os.kill(victim, signal.SIGKILL)
            if killed_at is None and -signal.SIGKILL in statuses.values():
                killed_at = now
            if now - (killed_at or begin) > (self._end_seconds if killed_at else RUN_SECONDS):
                for rank, child in enumerate(children):
                    if rank not in statuses:
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                return killed_at is not None, [f"ranks still ran: {statuses}, {self.output()[-2000:]}"]
            time.sleep(0.01)
        return killed_at is not None, self._problems(statuses, killed_at is not None)

    def output(self) -> str:
        """Return the output of the ranks."""
        return "\n".join(log.read_text(errors="replace") for log in self._logs)

    def _problems(self, statuses: dict[int, int], was_killed: bool) -> list[str]:
        output = self.output()
        if not was_killed:
            failed = {rank: status for rank, status in statuses.items() if status != 0}
            return [f"exit statuses {failed}: {output[-2000:]}"] if failed else []
        survivors = {rank: status for rank, status in statuses.items() if rank != self._victim}
        if "finished after" in output and not any(survivors.values()):
            return []  # the run was over, so there was nothing left to die in the middle of
        problems = [f"rank {rank} ended with status 0" for rank, status in survivors.items() if status == 0]
        count = output.count("ended without a word")
        # Who dies before it has met the others is waited for; nobody knows then what has become of it.
        is_early = count == 0 and "to join" in output
        if survivors and count != 1 and not is_early:
            problems.append(f"the death was told {count} times: {output[-2000:]}")
        return problems

    def _rank(self, rank: int, port: int, *, kill: bool) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        if kill and self._place and rank == self._victim:
            set_trap(self._place, self._call, self._after)
        command(self._command)


def fork(work: Callable[[], None], log: Path) -> int:
    """Fork a child that does some work, prints to a file and never returns; return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.chdir(ROOT)
        with log.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        work()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


def command(words: list[str]) -> None:
    """Run the console command of these words, and end the process."""
    from shardes import cli

    sys.argv = words
    cli.main(cli.train if words[0] == "train" else cli.cli)


def set_trap(place: str, call: int, after: float) -> None:
    """Have this process kill itself at a call of the function that a place stands for."""
    from shardes.rollout.evaluator import Evaluator
    from shardes.runs import snapshot as snapshots
    from shardes.utils.files import AppendFile
    from shardes.weights.gathered import GatheredWeights
    from shardes.weights.master import Weights

    within: dict[str, list[tuple[Any, str]]] = {
        "perturb": [(Weights, "perturb"), (GatheredWeights, "perturb")],
        "rollout": [(Evaluator, "start")],
        "update": [(Weights, "update")],
        "snapshot": [(snapshots, "write_values")],
    }
    if place == "step":
        from shardes.rollout.engines.vllm.requests import RequestLoop

        within["step"] = [(RequestLoop, "finish")]
    around: dict[str, list[tuple[Any, str]]] = {
        "rename": [(os, "rename"), (os, "replace"), (Path, "rename"), (Path, "replace")],
        "flush": [(os, "fsync")],
    }
    calls = iter(range(1_000_000))

    for owner, name in within.get(place, []):
        original = getattr(owner, name)

        def killed_within(*values: Any, original: Any = original, **named: Any) -> Any:
            if next(calls) == call:
                threading.Timer(after, die).start()
            return original(*values, **named)

        setattr(owner, name, killed_within)
    for owner, name in around.get(place, []):
        original = getattr(owner, name)

        def killed_around(*values: Any, original: Any = original, **named: Any) -> Any:
            is_it = next(calls) == call
            if is_it and after < 0.0015:
                die()
            result = original(*values, **named)
            if is_it:
                die()
            return result

        setattr(owner, name, killed_around)
    if place == "line":

        def half(self: Any, data: bytes, *, durable: bool = False, original: Any = AppendFile.append) -> None:
            if next(calls) == call:
                with self.path.open("ab", buffering=0) as file:
                    file.write(data[: int(len(data) * after / 0.003)])
                die()
            original(self, data, durable=durable)

        AppendFile.append = half  # type: ignore[method-assign]


def die() -> None:
    """Kill this process, as the kernel does when it runs out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
