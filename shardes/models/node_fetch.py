"""Fetching of a model of the hub for all ranks of a job, once on each machine."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from shardes.config.schema import ModelConfig
from shardes.distributed.group import Group
from shardes.distributed.place import read_place
from shardes.models.files import check_model_directory
from shardes.models.hub import fetch, find_commit

logger = logging.getLogger(__name__)

# Interval at which ranks look whether those that fetch have done so.
_LOOK_SECONDS = 0.2


def fetch_for_job(model: ModelConfig, world: Group, *, recorded: str | None = None) -> ModelConfig:
    """Return a model of the hub with the directory of its files on this machine; a collective of all ranks.

    Rank 0 finds the commit. The first rank of each machine fetches, and the others wait, however long that
    takes. A rank that fails ends the job, as everywhere (``FailureMonitor``).

    Args:
        model: The model.
        world: Ranks of the job.
        recorded: The commit with which the run began, as rank 0 reads it; None: it is new.

    Raises:
        UserError: It cannot be fetched or used, or the run began with another commit.
        StorageError: The cache of the hub cannot be written.
    """
    name, found = str(model.hub_id), None
    with _bars_of_rank_0_alone(world):
        if world.is_main:
            found = find_commit(model, recorded=recorded)
            logger.info("%s is the commit %s", name, found)
        commit = str(world.broadcast_json(found))
        is_first = read_place().local_rank in (None, 0)
        fetching = [rank for rank, each in enumerate(world.gather_json(is_first)) if each]
        if is_first:
            fetch(name, commit)
            _tell(world, commit)
        _wait_for(world, fetching, commit)
        # With another cache than the first rank of its machine, a rank fetches for itself.
        directory = fetch(name, commit)
    check_model_directory(directory)
    return model.fetched(directory, commit=commit)


def _key(rank: int, commit: str) -> str:
    return f"fetched/{commit}/{rank}"


def _tell(world: Group, commit: str) -> None:
    if world.store is not None:
        world.store.set(_key(world.rank, commit), "here")


def _wait_for(world: Group, ranks: list[int], commit: str) -> None:
    """Wait until some ranks have fetched: no collective, whose time would run out with a large model."""
    for rank in ranks:
        while world.store is not None and not world.store.check([_key(rank, commit)]):
            time.sleep(_LOOK_SECONDS)


@contextmanager
def _bars_of_rank_0_alone(world: Group) -> Iterator[None]:
    """Keep the client's progress bars to rank 0; a person may have turned them off altogether."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hides = not world.is_main and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()
