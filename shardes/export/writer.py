"""Writing of a model in Hugging Face format, one parameter at a time."""

import fnmatch
import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from shardes.backends.gathered_model import make_buckets
from shardes.backends.shard import Shard
from shardes.errors import UserError
from shardes.export.model_card import model_card
from shardes.models.checkpoint import StoredTensor, read_whole
from shardes.models.files import INDEX, WEIGHTS, read_json_object
from shardes.models.safetensors_writer import write_header, write_values
from shardes.runs.journal import History
from shardes.session import Session
from shardes.utils.files import flush_to_disk, sync_directory, write_atomically
from shardes.utils.progress import progress
from shardes.weights.export_view import gather_centre, stored_as
from shardes.weights.master import Weights

MAX_FILE_BYTES = 5 * 2**30

# Everything else beside the weights belongs to the model, under names that its tokenizer or code may know.
_NOT_COPIED = (
    "config.json",
    "README.md",
    ".*",
    # Weights in any form, and what tells their files.
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.ggml",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.npz",
    "*.index.json",
    "*.incomplete",
    # Of an adapter, which would be applied to the exported weights, or of somebody's training.
    "adapter_config.json",
    "trainer_state.json",
    "*_results.json",
    "*.log",
    "events.out.*",
)
# Folders that transformers reads, and the files in them.
_COPIED_FOLDERS = {"additional_chat_templates": "*.jinja"}


def check_destination(out: Path) -> None:
    """Check that ``out`` can be written.

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
    history: History | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the centre as a Hugging Face directory; a collective of all ranks, rank 0 writes.

    Parameters are gathered one at a time, tied ones once, and stored under the names, and in the pieces, that
    the base model's files have; buffers are copied from these. Everything goes to a temporary directory,
    which is renamed at the end, so ``out`` either does not exist or is complete.

    Args:
        session: Session whose weights have had ``iteration`` updates.
        out: Directory to write; it must not exist, or be empty.
        iteration: Number of updates, for the model card.
        settings: Configuration of the run, for the model card.
        history: Contents of the run's journal, for the model card; rank 0's is used.
        dtype: Dtype that the master is rounded to; None: the model's, in which it was evaluated.
        max_file_bytes: Largest size of a file, unless one parameter is larger.
    """
    is_main, dtype = session.mesh.world.is_main, dtype or session.backend.dtype
    digest = session.digest()
    out = out.resolve()
    temporary = out.with_name(f".{out.name}.incomplete")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        config = session.config
        card = model_card(
            base=config.model.directory,
            base_digest=session.identity["base_weights_digest"],
            task=config.task.name or config.task.reward or "rewards of its own",
            iteration=iteration,
            dtype=_name_of(dtype),
            digest=digest,
            settings=settings,
            history=history,
        )
        _copy_companions(config.model.directory, temporary)
        conversion = session.backend.conversion
        is_untied = conversion is not None and conversion.is_untied
        _write_config(config.model.directory, temporary, dtype=_name_of(dtype), is_untied=is_untied)
        write_atomically(temporary / "README.md", card)
    files = _plan(session.backend.shards, dtype.itemsize, max_file_bytes)
    last, buffers = list(files)[-1], {} if session.weights.base is None else session.weights.base.buffers
    what, num_shards = f"writing {out.name}", len(session.backend.shards)
    shown = progress(session.backend.shards, what=what, total=num_shards, unit="parameters")
    for file, shards in files.items():
        if is_main:
            with (temporary / file).open("wb") as stream:
                tensors = [each for shard in shards for each in stored_as(session.weights, shard)]
                extra = buffers if file == last else {}
                write_header(
                    stream,
                    [(name, dtype, shape) for name, shape in tensors]
                    + [(name, stored.dtype, stored.shape) for name, stored in extra.items()],
                )
                # Files have the parameters in their order.
                for shard in islice(shown, len(shards)):
                    values = gather_centre(session.weights, shard, dtype=dtype)
                    assert values is not None, "rank 0 receives every gathered parameter"
                    write_values(stream, values)
                for stored in extra.values():
                    write_values(stream, read_whole(stored))
                flush_to_disk(stream)
        elif session.mesh.replica == 0:
            for shard in shards:
                gather_centre(session.weights, shard, dtype=dtype)
    if is_main:
        if len(files) > 1:
            _write_index(temporary, files, session.weights, itemsize=dtype.itemsize, buffers=buffers)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
        sync_directory(out.parent)
    session.mesh.world.barrier()


def _plan(shards: Sequence[Shard], itemsize: int, max_file_bytes: int) -> dict[str, list[Shard]]:
    """Return the parameters that each safetensors file holds, by the file's name."""
    by_name = {shard.name: shard for shard in shards}
    sizes = {name: shard.num_elements * itemsize for name, shard in by_name.items()}
    groups = make_buckets(sizes, max_bytes=max_file_bytes)
    files = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        files = [WEIGHTS]
    return {file: [by_name[name] for name in names] for file, names in zip(files, groups, strict=True)}


def _write_index(
    directory: Path,
    files: Mapping[str, Sequence[Shard]],
    weights: Weights,
    *,
    itemsize: int,
    buffers: Mapping[str, StoredTensor],
) -> None:
    weight_map = {
        name: file
        for file, shards in files.items()
        for shard in shards
        for name, _ in stored_as(weights, shard)
    }
    weight_map |= dict.fromkeys(buffers, list(files)[-1])
    num_bytes = itemsize * sum(shard.num_elements for shards in files.values() for shard in shards)
    num_bytes += sum(stored.num_elements * stored.dtype.itemsize for stored in buffers.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_atomically(directory / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy_companions(base: Path, directory: Path) -> None:
    """Copy what a model directory holds besides weights: tokenizer, chat templates, own code, licence."""
    found = [path for path in sorted(base.iterdir()) if path.is_file()]
    for path in found:
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _NOT_COPIED):
            shutil.copyfile(path, directory / path.name)
    for folder, pattern in _COPIED_FOLDERS.items():
        files = [path for path in sorted((base / folder).glob(pattern)) if path.is_file()]
        if files:
            (directory / folder).mkdir()
        for path in files:
            shutil.copyfile(path, directory / folder / path.name)


def _write_config(base: Path, directory: Path, *, dtype: str, is_untied: bool) -> None:
    """Write config.json with the dtype, under its old name as well, and without ties that were none."""
    config = read_json_object(base / "config.json", key="model.path")
    parts = [config]
    if isinstance(config.get("text_config"), dict):
        parts.append(config["text_config"])
    for part in parts:
        if part is config or {"dtype", "torch_dtype"} & part.keys():
            part |= {"dtype": dtype, "torch_dtype": dtype}
        if is_untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    config.pop("transformers_weights", None)  # the files have the usual names
    write_atomically(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
