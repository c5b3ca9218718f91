"""The place of this process in a job, as the launcher's variables tell it; nothing heavy is imported."""

import os
from dataclasses import dataclass

from shardes.errors import UserError

_REMEDY = (
    "torchrun, deepspeed and accelerate launch set all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
    "MASTER_PORT: start the ranks with one of them, set what is missing on every rank, or unset RANK and "
    "WORLD_SIZE for one process"
)


@dataclass(frozen=True)
class Place:
    """Place of this process among the ranks of a job.

    Attributes:
        rank: Index of this process.
        world_size: Number of ranks.
        local_rank: Index of this process on its machine; None if the launcher does not say.
        address: Host and port at which the ranks meet; None for a process that nothing launched.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    address: tuple[str, int] | None = None


def read_place() -> Place:
    """Read the launcher's variables.

    Raises:
        UserError: They are half set, empty, or not numbers that fit together.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if not given:
        return Place(local_rank=_local_rank())
    is_alone = "RANK" not in given and given["WORLD_SIZE"] == "1"
    missing = [] if is_alone else [name for name in ("RANK", "WORLD_SIZE") if not os.environ.get(name)]
    if not missing and _number("WORLD_SIZE", at_least=1) > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        found = ", ".join(f"{name}={value!r}" for name, value in given.items())
        names = ", ".join(f"{name} ({'empty' if name in os.environ else 'not set'})" for name in missing)
        raise UserError(
            f"{missing[0]}: the launcher's variables are half set: {found}, but {names}; {_REMEDY}"
        )
    world_size = _number("WORLD_SIZE", at_least=1)
    rank = 0 if is_alone else _number("RANK", at_least=0)
    if rank >= world_size:
        raise UserError(f"RANK: got {rank}, but WORLD_SIZE is {world_size}; ranks count from 0; {_REMEDY}")
    address = None
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        port = _number("MASTER_PORT", at_least=0)
        if port > 65535 or (port == 0 and world_size > 1):
            raise UserError(f"MASTER_PORT: got {port}; wanted: a port that is free on rank 0's machine")
        address = os.environ["MASTER_ADDR"], port
    return Place(rank, world_size, _local_rank(), address)


def num_local_ranks() -> int:
    """Return the number of ranks on this machine: where the launcher does not say, of the job."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _local_rank() -> int | None:
    return _number("LOCAL_RANK", at_least=0) if "LOCAL_RANK" in os.environ else None


def _number(name: str, *, at_least: int) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit()) or int(text) < at_least:
        raise UserError(f"{name}: got {text!r}; wanted: a number of at least {at_least}; {_REMEDY}")
    return int(text)
