"""The meeting of a job's ranks, at the address that the launcher gives them.

The launcher's store holds one thing for this: where rank 0 listens, and the name of its attempt. A rank calls
it there and has met it once it answers, over the connection that then stays (see ``FailureMonitor``). So from
the first moment on, the ranks that are there know of each other's deaths, freezes and signals.
"""

import datetime
import json
import os
import socket
import time
from collections.abc import Sequence

import torch.distributed as dist

from shardes.distributed.connection import call, silence_of
from shardes.distributed.failure_monitor import FailureMonitor
from shardes.distributed.place import Place
from shardes.errors import JobError, UserError
from shardes.utils.reading import parse_json

# Key under which rank 0 writes where it listens, and the name of the attempt that it has begun.
_ATTEMPT = "attempt"
# Interval at which a rank looks for rank 0.
_LOOK_SECONDS = 0.05
# Longest that one call may take: who does not answer may be rank 0 of a former attempt.
_CALL_SECONDS = 5.0
# Stores that this process hosts. A program that joins one job after another, as the Python interface does,
# would find its port taken while anything of the first one is left; so it keeps its store, as torchrun does.
_hosted: dict[tuple[str, int], dist.TCPStore] = {}
# A process that does not even notice that the time is over is ended so much later.
_GRACE_SECONDS = 2.0


def meet(watch: FailureMonitor, place: Place, *, timeout_seconds: int) -> dist.Store:
    """Meet the other ranks, and return a store of this attempt alone; a collective of all ranks.

    torchrun keeps its store when it starts ranks anew, after a failure or because nodes have come or gone.
    There they would find the addresses of the dead. No variable that torchrun sets is the same on all ranks
    of an attempt and another in the next: each node counts its own restarts, and changes of membership are
    not counted. So rank 0 makes up a name. A rank cannot tell an old name from the new one, but only the
    living rank 0 answers, so a rank without an answer looks for another name.

    Args:
        watch: The monitor of this rank, which has started.
        place: Place of this rank in the job, with an address.
        timeout_seconds: Seconds that a rank waits for another.

    Raises:
        JobError: A rank did not come in time.
        UserError: The launcher's variables are not those of one job.
    """
    deadline = time.monotonic() + timeout_seconds
    watch.meet_within(timeout_seconds + _GRACE_SECONDS, _missing(place, [], timeout_seconds))
    if place.rank != 0:
        return _meet_rank_0(watch, place, deadline=deadline, timeout_seconds=timeout_seconds)
    is_host = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _open_store(place, is_host=is_host, seconds=timeout_seconds)
    port, name = watch.open()
    store.set(_ATTEMPT, json.dumps([port, name]))
    if missing := watch.wait_for_all(deadline - time.monotonic()):
        raise JobError(_missing(place, missing, timeout_seconds))
    return dist.PrefixStore(name, store)


def _meet_rank_0(watch: FailureMonitor, place: Place, *, deadline: float, timeout_seconds: int) -> dist.Store:
    assert place.address is not None, "a job has an address"
    store = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            if store is None:
                # A store that is not there yet would be waited for with pages of warnings.
                socket.create_connection(place.address, timeout=min(left, _CALL_SECONDS)).close()
                store = _open_store(place, is_host=False, seconds=timeout_seconds)
            if store.check([_ATTEMPT]):
                port, name = parse_json(store.get(_ATTEMPT))
                connection, messages = call(
                    (place.address[0], port),
                    rank=place.rank,
                    world_size=place.world_size,
                    token=name,
                    seconds=min(left, _CALL_SECONDS),
                    silence_seconds=silence_of(timeout_seconds),
                )
                watch.join(connection, messages)
                return dist.PrefixStore(name, store)
        except dist.DistError:
            store = None  # its host has ended; there may be another
        except (OSError, ValueError):
            pass  # rank 0 is not there yet, or was that of a former attempt
        time.sleep(_LOOK_SECONDS)
    raise JobError(_missing(place, [0], timeout_seconds))


def _open_store(place: Place, *, is_host: bool, seconds: float) -> dist.TCPStore:
    assert place.address is not None, "a job has an address"
    host, port = place.address
    if is_host and (hosted := _hosted.get(place.address)) is not None:
        hosted.set_timeout(datetime.timedelta(seconds=seconds))
        return hosted
    try:
        store = dist.TCPStore(
            host,
            port,
            is_master=is_host,
            timeout=datetime.timedelta(seconds=seconds),
            wait_for_workers=False,
        )
        if is_host:
            _hosted[place.address] = store
        return store
    except dist.DistNetworkError as error:
        if not is_host:
            raise
        reason = str(error).rpartition("message: ")[2]
        raise UserError(
            f"MASTER_PORT: rank 0 cannot listen on port {port} ({reason}); end what uses it, another job "
            "perhaps, or give all ranks another port"
        ) from None


def _missing(place: Place, ranks: Sequence[int], timeout_seconds: int) -> str:
    """Say whom a rank has waited for; if for no other rank, then for the host of the store."""
    assert place.address is not None, "a job has an address"
    host, port = place.address
    where = f"(MASTER_ADDR={host}, MASTER_PORT={port})"
    whom = (
        f"rank(s) {', '.join(map(str, ranks))} to join {where}"
        if ranks
        else f"rank 0 or its launcher {where}"
    )
    return (
        f"rank {place.rank} has waited {timeout_seconds} s (parallel.timeout_seconds) for {whom}: not "
        "started, ended, frozen, or not to be reached from here. See what they say themselves"
    )
