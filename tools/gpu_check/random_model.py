"""A model of a real size and of random weights, which needs no file for them: sessions and plans over it."""

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import TOKENIZER

# Qwen2.5-7B, Qwen2.5-1.5B for small GPUs, and the sizes of a rehearsal.
SIZES: dict[str, dict[str, Any]] = {
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    # vLLM's attention for CPUs wants heads of 32.
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
    },
}


def write_config(folder: Path, name: str) -> Path:
    """Write config.json and a tokenizer, but no weights; return the directory. No answer ends by itself."""
    from transformers import AutoTokenizer, Qwen2Config

    config = Qwen2Config(
        **SIZES[name],
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        architectures=["Qwen2ForCausalLM"],
    )
    path = folder / f"model-{name}"
    shutil.rmtree(path, ignore_errors=True)
    config.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    return path


class RandomCheckpoint:
    """Stand-in for a checkpoint: random values, a function of the parameter's name and the region.

    Other shardings of a parameter get other values.

    Args:
        directory: Model directory.
    """

    header_sha256 = "random"
    num_bytes = 2**40  # a bound of what building the model may take

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, Any] = {}
        self.buffers: dict[str, Any] = {}

    def join(self, pieces: Any, *, shapes: dict[str, tuple[int, ...]]) -> None:
        """Accept any model."""

    def check_matches(self, shapes: dict[str, tuple[int, ...]], *, aliases: set[str]) -> None:
        """Accept any model."""

    def read(self, name: str, *, region: Any, out: torch.Tensor) -> None:
        """Fill ``out`` with values like those of an untrained model: norms are 1, biases 0."""
        if "norm" in name:
            out.fill_(1)
        elif name.endswith("bias"):
            out.zero_()
        else:
            seed = zlib.crc32(f"{name} {region.start} {region.length}".encode())
            out.normal_(0.0, 0.02, generator=torch.Generator(out.device).manual_seed(seed))


@contextlib.contextmanager
def open_random_session(tree: dict[str, Any]) -> Iterator[Any]:
    """Open a session whose base weights are random; a collective of all ranks."""
    from shardes.config.loading import parse_config
    from shardes.session import open_session

    with (
        mock.patch("shardes.session.Checkpoint", RandomCheckpoint),
        open_session(parse_config(tree, source="gpu_check")) as session,
    ):
        yield session


def tree_of(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Return a configuration as a tree; ``changes`` are dotted keys with ``__`` in place of the dot."""
    found: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "run": {"dir": str(folder / "run")},
        "parallel": {"backend": "single", "timeout_seconds": 120},
        "rollout": {"max_new_tokens": 8, "micro_batch_size": 8},
        "es": {"iterations": 1, "population": 30, "sigma": 1e-3},
        "task": {"data": str(folder / "prompts.jsonl"), "reward": f"{__file__}:constant"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        found.setdefault(section, {})[name] = value
    return found


def write_prompts(folder: Path, *, num_prompts: int, num_tokens: int) -> None:
    """Write prompts of about so many tokens, the last ones half as long, without a common beginning."""
    rows = []
    for i in range(num_prompts):
        length = num_tokens - (num_tokens // 2) * i // num_prompts
        rows.append({"prompt": "".join(str((i * 7 + k * k + k // 3) % 10) for k in range(length))})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def constant(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    """Return the same reward for all completions, at no cost."""
    return [0.0] * len(completions)


def planned_bytes(config: Any, *, gather: str, num_ranks: int, prompt_tokens: int, num_prompts: int) -> int:
    """Return the most bytes on a rank's device that ``shardes plan`` expects."""
    from shardes.models.build import skeleton_of
    from shardes.planning.machine import Machine
    from shardes.planning.plan import Plan
    from shardes.planning.workload import make_workload

    load = make_workload(config, num_prompts=num_prompts, prompt_tokens=prompt_tokens)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    machine = Machine(2**40, kind)
    plan = Plan(config, skeleton_of(config), workload=load, machine=machine, world_size=num_ranks)
    return plan.memory.needed(gather)
