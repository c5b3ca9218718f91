"""A model of the hub for a plan: its small files, and the headers of the weights, which stay there."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shardes.config.schema import ModelConfig
from shardes.errors import UserError
from shardes.models.checkpoint import Checkpoint, StoredTensor
from shardes.models.headers import ANY_DTYPES, quantised_error
from shardes.models.hub import fetch, find_commit, weights_of
from shardes.utils.hub_cache import hub_place
from shardes.utils.messages import one_line

logger = logging.getLogger(__name__)

# Requests for headers at a time; a large model has more than a hundred files.
_NUM_REQUESTS = 8


def without_weights(model: ModelConfig, *, recorded: str | None) -> ModelConfig:
    """Return a model of the hub with the directory of its files, of which the weights may be missing.

    Raises:
        UserError: There is no such model, or the run began with another commit (``find_commit``).
        StorageError: The cache of the hub cannot be written.
    """
    commit = find_commit(model, recorded=recorded)
    return model.fetched(fetch(str(model.hub_id), commit, has_weights=False), commit=commit)


def headers_from_hub(directory: Path) -> Checkpoint | None:
    """Return the tensors of a model in the hub's cache from the headers that the hub has of its weights.

    Returns:
        A checkpoint whose values cannot be read; None if the hub has not been reached.

    Raises:
        UserError: The model has no weights that can be read, or a header is damaged.
    """
    from huggingface_hub import HfApi, errors

    name, commit = hub_place(directory) or ("", "")
    api = HfApi()
    try:
        wanted = weights_of(directory, api.list_repo_files(name, revision=commit))
        files = [each for each in wanted if each.endswith(".safetensors")]
        with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
            headers = pool.map(
                lambda file: api.parse_safetensors_file_metadata(name, file, revision=commit), files
            )
            found = {file: header.tensors for file, header in zip(files, headers, strict=True)}
    except errors.SafetensorsParsingError as error:
        raise UserError(f"model.path: {name}: {one_line(error)}") from None
    except UserError:
        raise
    except Exception as error:  # the client's, and its HTTP library's: a plan is possible without
        logger.warning("%s: the headers of its weights cannot be looked at: %s", name, one_line(error))
        return None
    tensors = {
        tensor: _stored(directory / file, tensor, info)
        for file, infos in found.items()
        for tensor, info in infos.items()
    }
    return Checkpoint(directory, tensors=tensors) if tensors else None


def _stored(path: Path, name: str, info: Any) -> StoredTensor:
    """Return the place of a tensor, as its entry in a header has it, counted from the end of the header.

    Raises:
        UserError: It has a dtype that no parameter has.
    """
    if info.dtype not in ANY_DTYPES:
        raise quantised_error(f"model.path: {path}: {name}", info.dtype)
    return StoredTensor(path, info.data_offsets[0], ANY_DTYPES[info.dtype], tuple(info.shape))
