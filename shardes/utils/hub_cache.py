"""The places of models in the cache of huggingface_hub: what is there already, and what a place says."""

from pathlib import Path


def find_cached(name: str, revision: str | None) -> Path | None:
    """Return the directory of a model's revision in the cache; None if it has no config.json there.

    Args:
        name: Name of the model on the hub.
        revision: Branch, tag or commit; None: the main branch, as it was when it was last asked for.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name of a model
        return None
    return Path(found).parent if isinstance(found, str) else None


def hub_place(directory: Path) -> tuple[str, str] | None:
    """Return name and commit of a model from its directory in a cache of the hub; None for another.

    The hub calls a model the child of what is named as its base, so a guess would not do.
    """
    *_, repository, snapshots, commit = ("", "", "", *directory.resolve().parts)
    kind, *parts = repository.split("--")
    if kind != "models" or snapshots != "snapshots" or len(parts) not in (1, 2) or not all(parts):
        return None
    return "/".join(parts), commit
