"""The command: choose the parts, run them one after the other, and write the report."""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_check import processes, report
from gpu_check.facts import commit, machine_facts, num_gpus
from gpu_check.part import ROOT, Context, Part, run_part
from gpu_check.registry import CHECKS, REHEARSAL_SECONDS, SECONDS

EXIT_WRONG, EXIT_USAGE = 1, 2
_LOG_LINES = 40


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--check", choices=list(CHECKS), default="gpu")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small sizes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument("--list", action="store_true", help="show the parts and end")
    parser.add_argument("--seconds", type=float, help="time limit of all parts together")
    parser.add_argument(
        "--ranks", type=int, help="number of ranks of multi_gpu; default: all GPUs, at most 8"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="directory of the report")
    parser.add_argument("--fill", type=Path, nargs="*", default=[], help="pages whose tables are filled in")
    parser.add_argument("--from-json", type=Path, help="run nothing: make the tables from this report")
    parser.add_argument("--part", nargs=2, metavar=("NAME", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.out = arguments.out.resolve()
    known = [part.name for part in CHECKS[arguments.check]]
    unknown = sorted(set(arguments.only or []) - set(known))
    if unknown:
        parser.error(f"--only: got {', '.join(unknown)}; wanted one or more of {', '.join(known)}")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 if all that ran was right, 1 if not, 2 if nothing ran."""
    arguments = parse(words)
    parts = CHECKS[arguments.check]
    if arguments.list:
        for part in parts:
            print(f"{part.name:<16} {part.seconds:>4.0f} s  {part.summary}")
        return 0
    if arguments.from_json:
        found = json.loads(arguments.from_json.read_text())
        report.write(found, arguments.from_json.parent, pages=arguments.fill)
        return 0
    num_ranks = _num_ranks(arguments)
    if isinstance(num_ranks, str):
        print(f"Error: {num_ranks}", file=sys.stderr)
        return EXIT_USAGE
    if arguments.part:
        _run_here(arguments, num_ranks)
        return 0
    chosen = [part for part in parts if arguments.only is None or part.name in arguments.only]
    signal.signal(signal.SIGTERM, _end)
    found = run_all(chosen, arguments, num_ranks=num_ranks)
    report.write(found, arguments.out, pages=arguments.fill)
    statuses = [part["status"] for part in found["parts"].values()]
    return EXIT_WRONG if {"failed", "timed_out"} & set(statuses) else 0


def _end(*_: object) -> None:
    """End this process, and the part that runs with it."""
    raise SystemExit(128 + signal.SIGTERM)


def _num_ranks(arguments: argparse.Namespace) -> int | str:
    """Return the number of ranks, or the reason why there can be none."""
    if arguments.part:
        return arguments.ranks or 1
    if arguments.rehearse:
        return arguments.ranks or (2 if arguments.check == "multi_gpu" else 1)
    available = num_gpus()
    wanted = arguments.ranks or (min(available, 8) if arguments.check == "multi_gpu" else 1)
    fewest = 2 if arguments.check == "multi_gpu" else 1
    if available < max(wanted, fewest):
        return (
            f"torch sees {available} GPU(s), and this check takes at least {max(wanted, fewest)}; "
            "--rehearse tries it on a CPU with small sizes"
        )
    return wanted


def run_all(parts: Sequence[Part], arguments: argparse.Namespace, *, num_ranks: int) -> dict[str, Any]:
    """Run the parts, each in a process of its own; return the report, which is also written after each."""
    is_rehearsal = arguments.rehearse
    if is_rehearsal:
        os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        processes.preload()
    begin = time.monotonic()
    end = begin + (arguments.seconds or SECONDS[arguments.check])
    found: dict[str, Any] = {
        "schema": report.SCHEMA,
        "check": arguments.check,
        "is_rehearsal": is_rehearsal,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "num_ranks": num_ranks,
        "machine": machine_facts(is_rehearsal=is_rehearsal),
        "parts": {},
    }
    (arguments.out / "logs").mkdir(parents=True, exist_ok=True)
    _temporary(arguments).mkdir(exist_ok=True)
    for number, part in enumerate(parts):
        limit = limit_of(part, is_rehearsal=is_rehearsal)
        result = _run_part(part, arguments, limit=limit, end=end, num_ranks=num_ranks)
        found["parts"][part.name] = result
        found["seconds"] = round(time.monotonic() - begin, 1)
        report.write_json(found, arguments.out)
        why = f": {result['reason']}" if result["reason"] else ""
        print(
            f"[{number + 1}/{len(parts)}] {part.name}: {result['status']}, {result['seconds']:.1f} s{why}",
            flush=True,
        )
    shutil.rmtree(_temporary(arguments), ignore_errors=True)
    report.compare_parts(found)
    return found


def limit_of(part: Part, *, is_rehearsal: bool) -> float:
    """Return the time limit of a part, in seconds."""
    return REHEARSAL_SECONDS if is_rehearsal else part.seconds


def _temporary(arguments: argparse.Namespace) -> Path:
    """Return the directory that is removed at the end, whatever became of the parts that wrote there."""
    return Path(tempfile.gettempdir()) / f"gpu-check-{zlib.crc32(str(arguments.out.resolve()).encode()):08x}"


def _run_part(
    part: Part, arguments: argparse.Namespace, *, limit: float, end: float, num_ranks: int
) -> dict[str, Any]:
    """Run one part in a process of its own; return its entry in the report."""
    entry: dict[str, Any] = {"status": "skipped", "reason": None, "seconds": 0.0, "limit_seconds": limit}
    entry |= {"values": {}, "checks": {}, "failures": {}, "skipped": {}}
    if missing := [] if arguments.rehearse and part.name == "vllm" else part.missing():
        return entry | {"reason": f"not installed: {', '.join(missing)}"}
    begin = time.monotonic()
    left = max(0.0, end - begin)
    if left < part.fewest_seconds:
        return entry | {"reason": f"{left:.0f} s were left, and it takes {part.fewest_seconds:.0f}"}
    limit = min(limit, left)
    entry["limit_seconds"] = round(limit, 1)
    out, log = arguments.out / "logs" / f"{part.name}.json", arguments.out / "logs" / f"{part.name}.log"
    for path in (out, log):
        path.unlink(missing_ok=True)
    words = ["-m", "gpu_check", "--check", arguments.check, "--part", part.name, str(out)]
    words += ["--ranks", str(num_ranks), "--seconds", str(limit)]
    words += ["--rehearse"] if arguments.rehearse else []
    words += ["--out", str(arguments.out)]
    process = processes.Process(words, env=dict(os.environ), log=log, forks=arguments.rehearse)
    try:
        status = process.wait(limit)
        entry["seconds"] = round(time.monotonic() - begin, 1)
    finally:  # also if this process is told to end
        process.kill_group()
    if out.exists():
        entry |= json.loads(out.read_text())
        out.unlink()
    wrong = [name for name, is_right in entry["checks"].items() if not is_right]
    if status is None:
        entry |= {"status": "timed_out", "reason": f"it was ended after {limit:.0f} s"}
    elif status != 0:
        entry |= {"status": "failed", "reason": f"exit status {status}; see logs/{log.name}"}
    elif wrong or entry["failures"]:
        failed = [f"{name} ({text})" for name, text in entry["failures"].items()]
        entry |= {"status": "failed", "reason": "; ".join([*(f"wrong: {name}" for name in wrong), *failed])}
    elif not (entry["checks"] or entry["values"]) and entry["skipped"]:
        entry |= {"reason": "; ".join(f"{name}: {why}" for name, why in entry["skipped"].items())}
    else:
        entry |= {"status": "passed"}
    if entry["status"] not in ("passed", "skipped") and log.exists():
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        print("\n".join(f"    {line[:200]}" for line in lines), flush=True)
    return entry


def _run_here(arguments: argparse.Namespace, num_ranks: int) -> None:
    """Run one part in this process, which was started for it."""
    name, out = arguments.part
    part = next(part for part in CHECKS[arguments.check] if part.name == name)
    folder = Path(tempfile.mkdtemp(prefix=f"gpu-check-{name}-", dir=_temporary(arguments)))
    deadline = time.monotonic() + (arguments.seconds or part.seconds)
    context = Context(
        is_rehearsal=arguments.rehearse,
        num_ranks=num_ranks,
        folder=folder,
        out=Path(out),
        deadline=deadline,
    )
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    run_part(part, context)
    sys.stdout.flush()
    # Libraries' threads and destructors race at an interpreter's end, where all is written already.
    os._exit(0)
