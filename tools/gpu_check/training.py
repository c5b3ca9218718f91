"""Small runs, trained in this process one after the other, and what their journals say."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from common import write_model

Tree = dict[str, Any]

_TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
# Sizes that do not divide evenly, and enough layers for gathers to overlap with forwards.
_SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}


def spread(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    """Return numbers between 0 and 1 that change with almost any change of an answer."""
    return [sum((i + 1) * ord(char) for i, char in enumerate(text)) % 97 / 97 for text in completions]


def make_files(folder: Path, *, is_tiny: bool) -> None:
    """Write a random model, and prompts for it, of different lengths."""
    sizes = _TINY if is_tiny else _SMALL
    write_model(folder / "model", layers=2 if is_tiny else 8, eos_id=1, vocab_size=24, **sizes)
    rows = [{"prompt": f"{i}" + "+7" * (1 + i % 6) + "="} for i in range(9 if is_tiny else 48)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def tree(folder: Path, name: str, *, is_tiny: bool, **changes: Any) -> Tree:
    """Return a configuration as a tree; ``changes`` are dotted keys with ``__`` in place of the dot."""
    data = str(folder / "problems.jsonl")
    found: Tree = {
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "run": {"dir": str(folder / "runs" / name)},
        "parallel": {"backend": "single", "timeout_seconds": 60},
        "rollout": {"max_new_tokens": 5 if is_tiny else 24, "micro_batch_size": 4 if is_tiny else 16},
        "es": {"iterations": 2, "population": 4, "sigma": 0.05, "alpha": 0.05},
        "eval": {"every": 2},
        "task": {"data": data, "heldout_data": data, "reward": f"{__file__}:spread"},
    }
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        found.setdefault(section, {})[inner] = value
    return found


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    """Have the decode loop capture nothing."""
    decoder = "shardes.rollout.engines.transformers.decoder"
    with mock.patch(f"{decoder}.can_be_captured", return_value=False):
        yield


def train(config: Tree, *, has_graphs: bool = True) -> None:
    """Train a run to its end, a collective of all ranks."""
    from shardes.config.loading import parse_config
    from shardes.session import open_session
    from shardes.tasks.loading import load_task
    from shardes.trainer import make_training_loop

    with (
        contextlib.nullcontext() if has_graphs else without_graphs(),
        open_session(parse_config(config, source="gpu_check")) as session,
    ):
        make_training_loop(session, load_task(session.config.task)).train()


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return what a run's journal says of rewards, updates, evaluations and weights, by kind."""
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_bytes().splitlines()]
    return {
        "base": lines[0]["base_weights_digest"],
        "rewards": sorted((r["iteration"], r["member"], r["reward"]) for r in lines if r["type"] == "member"),
        "updates": [record["coefficients"] for record in lines if record["type"] == "update"],
        "evaluations": [record["reward"] for record in lines if record["type"] == "evaluation"],
        "weights": [(r["iteration"], r["digest"]) for r in lines if r["type"] == "weights"],
    }


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Return the kinds of records in which two outcomes differ."""
    return [name for name, value in wanted.items() if found.get(name) != value]


def tells_members_apart(found: dict[str, Any]) -> bool:
    """Return True if rewards differ within each iteration, so that equal outcomes say something."""
    rewards: dict[int, set[Any]] = {}
    for iteration, _, reward in found["rewards"]:
        rewards.setdefault(iteration, set()).add(reward)
    return all(len(values) > 1 for values in rewards.values())
