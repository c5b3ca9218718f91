"""Models of the Hugging Face hub: their files, fetched by the hub's own client into its own cache.

Progress bars, the place of the cache, offline mode and tokens are huggingface_hub's, as its variables say
(HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN). Nothing heavy is imported before a file is
asked for.
"""

import errno
import glob
import logging
import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from shardes.config.schema import ModelConfig
from shardes.errors import StorageError, UserError
from shardes.models.files import INDEX, WEIGHTS, check_model_directory, read_json_object, read_model_config
from shardes.utils.hub_cache import find_cached
from shardes.utils.messages import listed, one_line

logger = logging.getLogger(__name__)

# What a model directory has besides weights: by the ends of names (none: LICENSE and the like).
_SMALL = {".json", ".txt", ".jinja", ".model", ".tiktoken", ".vocab", ".bpe", ".codes", ".py", ""}
_MORE_TEMPLATES = "additional_chat_templates"
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def check_model(model: ModelConfig) -> None:
    """Refuse a model directory that is none; one of the hub is looked at when it is fetched.

    Raises:
        UserError: The directory cannot be used, or there is a revision of it.
    """
    if model.hub_id is not None:
        return
    if model.revision is not None and os.path.lexists(model.path):
        raise UserError(
            f"model.revision: got {model.revision!r}, but model.path {model.path} is a directory, which has "
            "no revisions; remove one of the two (model.revision=null)"
        )
    check_model_directory(model.path)


def find_commit(model: ModelConfig, *, recorded: str | None = None) -> str:
    """Return the commit that a model of the hub has at its revision; of its files, config.json is fetched.

    Args:
        model: The model, which is one of the hub.
        recorded: The commit with which the run began; None: it is new.

    Raises:
        UserError: There is no such model or revision, neither there nor in the cache, or the run began with
            another commit.
        StorageError: The cache cannot be written.
    """
    from huggingface_hub import hf_hub_download

    name, revision = str(model.hub_id), model.revision or recorded
    try:
        file = hf_hub_download(name, "config.json", revision=revision)
    except Exception as error:  # the client's, which are many, and its HTTP library's
        raise _explained(error, name, revision) from None
    # In the cache, config.json lies in a directory with the name of the commit.
    commit = Path(file).parent.name
    if recorded is not None and commit != recorded:
        raise UserError(
            f"model.revision: {model.revision} of {name} is the commit {commit}, but this run was begun with "
            f"{recorded}; leave out model.revision to go on with that, or give another run.dir"
        )
    return commit


def fetch(name: str, commit: str, *, has_weights: bool = True) -> Path:
    """Fetch the files of a commit that are not in the cache yet, and return their directory.

    These are configuration, tokenizer and code, and the weights that transformers would load: no pickles, no
    copies in other formats.

    Args:
        name: Name of the model on the hub.
        commit: The commit, in full.
        has_weights: Whether the weights are wanted.

    Raises:
        UserError: They cannot be fetched, or there are no weights that can be read.
        StorageError: The cache cannot be written.
    """
    from huggingface_hub import HfApi, snapshot_download

    directory = find_cached(name, commit)
    if directory is not None and _is_whole(directory, has_weights=has_weights):
        return directory
    try:
        names = HfApi().list_repo_files(name, revision=commit)
        fetched = snapshot_download(
            name, revision=commit, allow_patterns=[glob.escape(each) for each in names if _is_small(each)]
        )
        directory = Path(fetched)
        if has_weights:
            wanted = weights_of(directory, names)
            if not wanted:
                raise UserError(f"model.path: {name} {_what_it_has(names)}")
            logger.info("%s, commit %s: fetching what is missing of %d files", name, commit, len(wanted))
            snapshot_download(name, revision=commit, allow_patterns=[glob.escape(each) for each in wanted])
    except (UserError, StorageError):
        raise
    except Exception as error:
        if directory is not None and _is_whole(directory, has_weights=has_weights, is_known=True):
            return directory
        raise _explained(error, name, commit) from None
    return directory


def weights_of(directory: Path, names: Collection[str]) -> list[str]:
    """Return the names of the files of weights that transformers would load, the index among them.

    Args:
        directory: Directory with config.json and the index, if there is one.
        names: Names of all files that there are, or will be.

    Raises:
        UserError: config.json or the index is damaged.
    """
    config = directory / "config.json"
    first = read_model_config(config).get("transformers_weights")
    if not isinstance(first, str):
        first = WEIGHTS if WEIGHTS in names else INDEX
    if first not in names:
        return []
    if not first.endswith(".index.json"):
        return [first]
    weight_map = read_json_object(directory / first, key="model.path").get("weight_map")
    found = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({first, *(each for each in found if isinstance(each, str))})


def _is_small(name: str) -> bool:
    """Return whether a file of a repository is wanted besides weights."""
    path = PurePosixPath(name)
    if path.parent.name:
        return str(path.parent) == _MORE_TEMPLATES and path.suffix == ".jinja"
    is_index = name.endswith(".index.json") and not name.endswith(".safetensors.index.json")
    return not name.startswith(".") and path.suffix in _SMALL and not is_index


def _is_whole(directory: Path, *, has_weights: bool, is_known: bool = False) -> bool:
    """Return whether a directory of the cache has what is wanted of it.

    Args:
        directory: The directory, which has config.json.
        has_weights: Whether the weights are wanted.
        is_known: Whether the hub cannot be asked for more, so that weights are enough. Another program may
            have fetched these without the tokenizer.
    """
    if not is_known and not any(path for pattern in _TOKENIZERS for path in directory.glob(pattern)):
        return False
    if not has_weights:
        return is_known or (directory / "tokenizer_config.json").is_file()
    return has_all_weights(directory)


def has_all_weights(directory: Path) -> bool:
    """Return whether all files of weights are there that transformers would load."""
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    wanted = weights_of(directory, names)
    return bool(wanted) and names.issuperset(wanted)


def _what_it_has(names: Collection[str]) -> str:
    """Return what a repository without readable weights has, and what to do about it."""
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    packed = sorted(name for name in names if name.endswith(".gguf"))
    others = sorted(name for name in names if name.endswith(".safetensors"))
    has = f"has no {WEIGHTS} and no {INDEX}, so no weights"
    if others:
        return f"{has}. There is {listed(others)}, which transformers does not load by that name"
    if pickled:
        return (
            f"{has}. {pickled[0]} is a pickle, which is never loaded: take a revision with safetensors "
            "(model.revision; the hub often has one as refs/pr/N), or convert it"
        )
    if packed:
        return f"{has}. {packed[0]} is not read: give the model that it was made of"
    return f"{has}; give a model that generates text"


def _explained(error: Exception, name: str, revision: str | None) -> UserError | StorageError:
    """Return the error that tells a person why a model cannot be fetched, and what to do."""
    from huggingface_hub import constants, errors

    endpoint, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    there = name if revision is None else f"{name} at {revision}"
    no_directory = f"model.path: {name} is no directory here, and"
    log_in = "log in (hf auth login, or HF_TOKEN)"
    elsewhere = (
        f"or fetch it where there is a network (hf download {name}), and bring the cache here (HF_HOME)"
    )
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"model.path: {name} is gated: ask for access at {endpoint}/{name}, then {log_in}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{no_directory} {endpoint} has no such model, or a private one; check the name, or {log_in}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"model.revision: {name} has no revision {revision!r}; give a branch, a tag or a commit of "
            f"{endpoint}/{name}"
        )
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{no_directory} it is no name on the hub either; wanted: ORGANISATION/MODEL")
    # Of the HTTP library, which is not the same one in all versions, come errors of the network alone.
    is_of_network = type(error).__module__.partition(".")[0].startswith("httpx") or (
        isinstance(error, errors.HfHubHTTPError) and error.response.status_code >= 500
    )
    if is_of_network or isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            return UserError(
                f"{no_directory} HF_HUB_OFFLINE is set, and {there} is not wholly in the cache {cache}; "
                f"unset it, {elsewhere}"
            )
        cause = error if is_of_network else error.__cause__
        reason = "" if cause is None else f" ({one_line(cause)})"
        return UserError(
            f"{no_directory} {endpoint} cannot be reached{reason}; {there} is not wholly in the cache "
            f"{cache} either. Check the network and HF_ENDPOINT, {elsewhere}"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return UserError(f"model.path: {there} has no config.json; give a whole model, as an adapter is none")
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(f"{cache}: no room for {name}; make some, or set HF_HOME to another place")
        if isinstance(error, PermissionError):
            return UserError(
                f"HF_HOME: {cache} cannot be written ({error.strerror}); set it to another place"
            )
    return UserError(
        f"model.path: {there} cannot be fetched from {endpoint}: {type(error).__name__}: {one_line(error)}; "
        "start again, as what was fetched is kept"
    )
