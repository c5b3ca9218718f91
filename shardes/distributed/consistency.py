"""Checks that all ranks are about to do the same work, before they do it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from shardes.distributed.group import Group


def check_consistency(world: Group, **things: Any) -> None:
    """Compare things over all ranks; one collective of a few bytes.

    Args:
        world: All ranks.
        **things: Values that must be the same everywhere: bytes, or anything that can be represented as
            JSON. Underscores of names become spaces in the message.

    Raises:
        RuntimeError: Two ranks differ; raised on every rank, with the things, the ranks and their hashes.
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


def shared_settings(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the settings that all ranks must share, by dotted key.

    Args:
        settings: Values by section and key; paths are left out, since they may differ between machines.
    """
    return {
        f"{section}.{key}": value
        for section, keys in _without_paths(settings).items()
        for key, value in keys.items()
    }


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items() if not isinstance(part, Path)}
    return [_without_paths(part) for part in value] if isinstance(value, list) else value


def _hash(thing: Any) -> int:
    data = thing if isinstance(thing, bytes) else json.dumps(thing, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
