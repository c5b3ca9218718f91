"""Safetensors files, whole and damaged."""

import json
import struct
from pathlib import Path

from safetensors.torch import save_file


def write_sharded(directory, parts):
    """One file per dictionary of tensors, and the index that transformers writes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, tensors in enumerate(parts, start=1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    write_index(directory, weight_map)
    return directory


def write_index(directory, weight_map):
    index = {"metadata": {}, "weight_map": weight_map}
    (Path(directory) / "model.safetensors.index.json").write_text(json.dumps(index))


def write_raw(path, header, data=b""):
    """A file with any header: bytes, or an object that becomes JSON."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(header)) + header + data)
    return Path(path)
