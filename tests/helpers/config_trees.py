"""The smallest configuration, and small changes of it."""

import copy

MINIMAL = {
    "model": {"path": "a/model"},
    "run": {"dir": "a/run"},
    "rollout": {"max_new_tokens": 5},
    "es": {"iterations": 7},
    "task": {"name": "countdown", "data": "a/data.jsonl"},
}


def with_key(key, value):
    """The minimal tree with one dotted key set; a value of ... removes it."""
    tree = copy.deepcopy(MINIMAL)
    *sections, last = key.split(".")
    target = tree
    for section in sections:
        target = target.setdefault(section, {})
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return tree
