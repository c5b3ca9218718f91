"""Snapshots of made-up parameters, spread over ranks in every way, and ways to damage their files."""

import json

import torch

from shardes.backends.layout import Layout, Split, flat_layout
from shardes.backends.shard import Shard
from shardes.runs.snapshot import write_manifest, write_part

SHAPES = {"a.weight": (7, 10), "b.bias": (13,), "c.weight": (4, 6), "d.empty": (0,), "e.scalar": ()}
# How a parameter is spread, by its shape and the number of ranks.
LAYOUTS = {
    "flat": lambda shape, size: flat_layout(_size(shape), world_size=size),
    "rows": lambda shape, size: Layout(shape, (size,), (Split(0),)),
    "columns": lambda shape, size: Layout(shape, (size,), (Split(len(shape) - 1 if shape else 0),)),
    "stacked": lambda shape, size: Layout(shape, (size,), (Split(0, num_pieces=2),)),
    "copies": lambda shape, size: Layout(shape, (size,), (None,)),
    "grid": lambda shape, size: Layout(shape, (size, 2), (Split(len(shape) - 1 if shape else 0), Split(0))),
}


def _size(shape):
    return torch.Size(shape).numel()


def ranks_of(kind, size):
    """Each rank's shards of every parameter."""
    places = (
        [(i, j) for i in range(size) for j in range(2)] if kind == "grid" else [(i,) for i in range(size)]
    )
    return [
        [
            Shard(
                name,
                param_id,
                shape,
                torch.empty(0),
                LAYOUTS[kind](shape, size).spans(place) if _size(shape) else (),
                is_copy=kind == "copies" and place != (0,),
            )
            for param_id, (name, shape) in enumerate(SHAPES.items())
        ]
        for place in places
    ]


def whole_values(dtype):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(_size(shape), generator=generator).to(dtype) for name, shape in SHAPES.items()}


def local_values(shard, whole):
    """What a rank holds of a parameter, run after run."""
    return torch.cat([span.inside(whole[shard.name]).reshape(-1) for span in shard.spans])


def write_snapshot(directory, ranks, whole, *, iteration=3, digest="0f"):
    directory.mkdir(parents=True)
    files = []
    for rank, shards in enumerate(ranks):
        masters = [(s.name, s, local_values(s, whole)) for s in shards if s.spans and not s.is_copy]
        files.append(write_part(directory / f"rank-{rank:05d}.safetensors", masters))
    write_manifest(directory, iteration=iteration, digest=digest, states_digest="0", files=files)
    return directory


def manifest_of(directory):
    return json.loads((directory / "manifest.json").read_text())


def damage(path, kind):
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "a directory":
        path.unlink()
        path.mkdir()
    else:
        changed = {
            "empty": b"",
            "truncated": data[:-2],
            "halved": data[: len(data) // 2],
            "longer": data + b"{",
            "zeroed": bytes(len(data)),
            "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            "header": data[:20] + b"#" + data[21:],
        }[kind]
        assert changed != data
        path.write_bytes(changed)
