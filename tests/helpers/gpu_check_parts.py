"""Runs tools/gpu_check with parts that raise, hang, die or find something wrong, in place of its own.

python gpu_check_parts.py OUT
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tools" / "bench")]

from gpu_check import cli, processes, registry  # noqa: E402
from gpu_check.part import Part  # noqa: E402


def finds(context):
    context.record(some_seconds=1.5)
    context.check("all is well", is_right=True)
    with context.section("one section"):
        raise ArithmeticError("it has miscounted")


def hangs(context):
    context.record(before_bytes=2**30)
    # A process that it has started ends with it.
    words = ["-c", "import time; time.sleep(60)"]
    environment = dict(os.environ)
    child = processes.Process(
        words, env=environment, log=context.folder / "log", forks=False, is_leader=False
    )
    (context.out.parents[1] / "child.pid").write_text(str(child.pid))
    time.sleep(60)


def dies(context):
    context.check("it lives", is_right=True)
    os.abort()


def wrong(context):
    context.check("one is two", is_right=False, detail="1 is not 2")


def right(context):
    context.check("one is one", is_right=True)


PARTS = [finds, hangs, dies, wrong, right]


def main():
    for part in PARTS:
        sys.modules[f"gpu_check.{part.__name__}_module"] = SimpleNamespace(run=part)
    seconds = {hangs: 2.0}
    parts = [
        Part(part.__name__, f"{part.__name__}_module", seconds.get(part, 60), "", needs=()) for part in PARTS
    ]
    parts.insert(0, Part("lacks", "nothing", 60, "", needs=("no_such_package",)))
    parts.append(Part("late", "nothing", 60, "", needs=(), fewest_seconds=1000))
    registry.CHECKS["gpu"] = tuple(parts)
    processes.preload = lambda: None
    cli.limit_of = lambda part, *, is_rehearsal: part.seconds
    sys.exit(cli.main(["--rehearse", "--out", sys.argv[1]]))


if __name__ == "__main__":
    main()
