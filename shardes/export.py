"""Writing a model in Hugging Face format, one parameter at a time."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardes import __version__
from shardes.errors import UserError
from shardes.files import flush_to_disk, sync_directory, write_atomically
from shardes.safetensors_writer import write_header, write_values
from shardes.session import Session
from shardes.shards import Shard

MAX_FILE_BYTES = 5 * 2**30

# What a model directory holds besides weights: tokenizer, chat template, generation config, own code.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*.py",
)


@dataclass(frozen=True)
class _File:
    """One safetensors file: which parameters, and how many bytes each takes."""

    name: str
    shards: tuple[Shard, ...]


def check_destination(out: Path) -> None:
    """Refuses to write where something is.

    Raises:
        UserError: ``out`` exists and is not an empty directory.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"OUT_DIR {out} exists already; give a directory that does not, or remove it first")


def export_model(
    session: Session,
    out: Path,
    *,
    iteration: int,
    settings: Mapping[str, Any],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes the centre as a Hugging Face directory; a collective of all ranks, rank 0 writes.

    Parameters are gathered one at a time, tied ones once. Everything goes to a temporary directory, which is
    renamed at the end, so ``out`` either does not exist or is complete.

    Args:
        session: The model; its weights after ``iteration`` updates.
        out: A directory that does not exist or is empty.
        iteration: For the model card.
        settings: The same; what the run was told.
        max_file_bytes: Files are no larger, unless one parameter is.
    """
    is_main = session.mesh.world.is_main
    digest = session.digest()
    out = out.resolve()
    temporary = out.with_name(f".{out.name}.incomplete")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_companions(session, temporary, _model_card(session, iteration, settings, digest))
    files = _plan(session.backend.shards, session.backend.dtype.itemsize, max_file_bytes)
    for file in files:
        if is_main:
            with (temporary / file.name).open("wb") as stream:
                dtype = session.backend.dtype
                write_header(stream, [(shard.name, dtype, shard.shape) for shard in file.shards])
                for shard in file.shards:
                    values = session.weights.gather_centre(shard)
                    assert values is not None, "rank 0 receives every gathered parameter"
                    write_values(stream, values)
                flush_to_disk(stream)
        elif session.mesh.replica == 0:
            for shard in file.shards:
                session.weights.gather_centre(shard)
    if is_main:
        _write_index(temporary, files, session.backend.dtype.itemsize)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
        sync_directory(out.parent)
    session.mesh.world.barrier()


def _plan(shards: tuple[Shard, ...], itemsize: int, max_file_bytes: int) -> list[_File]:
    groups: list[list[Shard]] = [[]]
    size = 0
    for shard in shards:
        num_bytes = shard.num_elements * itemsize
        if groups[-1] and size + num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += num_bytes
    return [
        _File(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, start=1)
    ]


def _write_index(directory: Path, files: list[_File], itemsize: int) -> None:
    weight_map = {shard.name: file.name for file in files for shard in file.shards}
    num_elements = sum(shard.num_elements for file in files for shard in file.shards)
    index = {"metadata": {"total_size": num_elements * itemsize}, "weight_map": weight_map}
    write_atomically(
        directory / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n"
    )


def _write_companions(session: Session, directory: Path, model_card: str) -> None:
    base = session.config.model.path
    for pattern in _COMPANIONS:
        for path in sorted(base.glob(pattern)):
            shutil.copyfile(path, directory / path.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = session.config.model.dtype
    write_atomically(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_atomically(directory / "README.md", model_card)


def _model_card(session: Session, iteration: int, settings: Mapping[str, Any], digest: str) -> str:
    config = session.config
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- evolution-strategies
- shardes
---

# {config.model.path.name}, fine-tuned with evolution strategies

The weights after {iteration} iterations of evolution strategies (Qiu et al. 2025, arXiv 2509.24372) on the
task `{config.task.name or config.task.reward}`, made with shardes {__version__}. No gradient was computed.

- base model: `{config.model.path.name}`, weights digest `{session.identity["base_weights_digest"]}`
- these weights: dtype {config.model.dtype}, digest of the master `{digest}`

```json
{json.dumps(settings, indent=2, sort_keys=True)}
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""
