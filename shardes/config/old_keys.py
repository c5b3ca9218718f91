"""Names that keys had in older versions: still read, with one warning that says what they are called now."""

import functools
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

from shardes.errors import UserError

logger = logging.getLogger(__name__)

# Old names, and the keys that have their meaning; of these, the first may not be given beside the old one.
_OLD_KEYS = {
    "es.schedule": ("es.alpha_schedule",),
    "log.to": ("log.report_to",),
    "rollout.mode": ("rollout.gather", "rollout.members_per_forward"),
}
_GATHERS = {
    "auto": "auto",
    "members": "iteration",
    "prompts": "member",
    "stream": "layer",
    "batched": "auto",
    "batched_stream": "layer",
}
_OLD_MEMBERS_PER_FORWARD = 16


def apply_changes(tree: dict[str, Any], changes: Iterable[tuple[str, Any]] = (), *, source: str) -> None:
    """Set dotted keys in a tree of sections, and give its old keys their new names; the tree is changed.

    What is changed takes the place of what the tree has, whichever of its names either is given by.

    Args:
        tree: Sections of keys, not checked yet.
        changes: Dotted keys and their values; sections on the way are made.
        source: Where the tree comes from, for messages.

    Raises:
        UserError: A key is given by its old and by its new name, or ``rollout.mode`` has no known value.
    """
    changes, told = list(changes), list[str]()
    names = {key for key, _ in changes}
    for old, new in _OLD_KEYS.items():
        if old in names:
            _refuse_both(old, new[0], given=names, source="the overrides")
            section, _, key = new[0].partition(".")
            if isinstance(tree.get(section), dict):
                tree[section].pop(key, None)
        elif names.intersection(new):
            told += _rename(tree, [old], source=source)
    for key, value in changes:
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[last] = value
    told += _rename(tree, _OLD_KEYS, source=source)
    if told:
        warn_once(
            f"{source}: keys of an older version are read as what they are now: {'; '.join(sorted(told))}"
        )


def current_name(key: str) -> str:
    """Return the name that a dotted key has today."""
    return _OLD_KEYS.get(key, (key,))[0]


def rename_in_header(header: dict[str, Any]) -> None:
    """Give the keys in the header of an old version's journal their new names; the header is changed."""
    settings = header.get("settings", {})
    for old, new in _OLD_KEYS.items():
        if old in settings:
            settings[new[0]] = settings.pop(old)
    list(_rename(header.get("config", {}), _OLD_KEYS, source="journal.jsonl"))


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning on rank 0, unless this process has logged it before."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def _rename(tree: dict[str, Any], olds: Iterable[str], *, source: str) -> Iterator[str]:
    """Give old keys of a tree their new names, in place; yield what each of those found is now."""
    for old in olds:
        section, key = old.split(".")
        keys = tree.get(section)
        if not isinstance(keys, dict) or key not in keys:
            continue
        new = _OLD_KEYS[old][0]
        _refuse_both(old, new, given={f"{section}.{each}" for each in keys}, source=source)
        value = keys.pop(key)
        if old == "rollout.mode":
            keys |= _keys_of_mode(value, members=keys.get("members_per_forward"), source=source)
            yield (
                f"{old}: {value} is rollout.gather: {keys['gather']} and rollout.members_per_forward: "
                f"{keys['members_per_forward']}"
            )
        else:
            keys[new.partition(".")[2]] = value
            yield f"{old} is {new}"


def _keys_of_mode(mode: Any, *, members: Any, source: str) -> dict[str, Any]:
    """Return the keys that say what ``rollout.mode`` said beside an old ``members_per_forward``."""
    if not isinstance(mode, str) or mode not in _GATHERS:
        raise UserError(
            f"{source}: rollout.mode: got {mode!r}; it is now rollout.gather: auto, iteration, member or "
            f"layer (the old values, {', '.join(_GATHERS)}, are still read)"
        )
    if not mode.startswith("batched"):
        members = 1  # what else was given meant nothing
    elif members is None:
        members = _OLD_MEMBERS_PER_FORWARD
    elif members == 1:
        members = "auto"  # 1 would not evaluate members as terms; auto keeps the 1 that a journal has
    return {"gather": _GATHERS[mode], "members_per_forward": members}


def _refuse_both(old: str, new: str, *, given: Iterable[str], source: str) -> None:
    if {old, new} <= set(given):
        raise UserError(f"{source}: {old} is the old name of {new}, and both are given; remove {old}")
