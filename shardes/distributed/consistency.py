"""Ranks must do the same work: what they are about to do is compared before it is done."""

import hashlib
import json
from pathlib import Path
from typing import Any

from shardes.config.schema import Config
from shardes.distributed.group import Group


def check_consistency(world: Group, **things: Any) -> None:
    """Compares things over all ranks; one collective of a few bytes.

    Args:
        world: All ranks.
        **things: What must be the same everywhere: bytes, or what can be represented as JSON. Underscores of
            names become spaces in the message.

    Raises:
        RuntimeError: On every rank, if two ranks differ; it names the things, the ranks and their hashes.
    """
    names = sorted(things)
    found = world.gather_int64([_hash(things[name]) for name in names])
    differences = []
    for place, name in enumerate(names):
        ranks: dict[int, list[int]] = {}
        for rank, hashes in enumerate(found):
            ranks.setdefault(hashes[place], []).append(rank)
        if len(ranks) > 1:
            parts = [
                f"{value & 0xFFFFFFFFFFFFFFFF:016x} on rank(s) {_listed(of)}" for value, of in ranks.items()
            ]
            differences.append(f"{name.replace('_', ' ')}: {', '.join(parts)}")
    if differences:
        raise RuntimeError(
            "the ranks of the job disagree, so it was ended before anything was written; the hashes of "
            + "; of ".join(differences)
            + ". Do all machines have the same files, versions and command line?"
        )


def shared_settings(config: Config) -> dict[str, Any]:
    """What all ranks must have been told alike: every key but paths, which may differ between machines."""
    return {
        f"{section}.{key}": value
        for section, keys in _without_paths(config.model_dump()).items()
        for key, value in keys.items()
    }


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items() if not isinstance(part, Path)}
    return [_without_paths(part) for part in value] if isinstance(value, list) else value


def _hash(thing: Any) -> int:
    data = thing if isinstance(thing, bytes) else json.dumps(thing, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
