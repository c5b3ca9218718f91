"""Put the parts of a run together: the basis of training, evaluation and export."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardes.backends.base import Backend
from shardes.backends.build import make_backend
from shardes.backends.registry import BACKENDS
from shardes.config.schema import Config
from shardes.distributed.group import Group, Mesh, make_mesh
from shardes.distributed.launch import process_group
from shardes.distributed.stop import Stop
from shardes.errors import UserError
from shardes.es.arithmetic import check_arithmetic
from shardes.es.strategy import decay_of, optimizer_of, version_of_updates
from shardes.es.update import Update
from shardes.models.build import skeleton_of
from shardes.models.checkpoint import Checkpoint
from shardes.models.node_fetch import fetch_for_job
from shardes.models.trial import check_forward, may_be_of_model
from shardes.noise import NOISE_VERSION
from shardes.noise.kinds.registry import make_kind
from shardes.utils.progress import progress
from shardes.utils.timers import PhaseTimer
from shardes.utils.version import VERSION
from shardes.weights.master import Weights
from shardes.weights.master_digest import master_digest

logger = logging.getLogger(__name__)

# Blocks of elements that a part of the parameters should have (``es.subspaces``).
_BLOCKS_OF_PART = 4


@dataclass(frozen=True)
class Session:
    """A model spread over ranks, with its base weights loaded.

    Attributes:
        config: Validated configuration.
        mesh: Ranks of the job, as replicas by ranks of a replica.
        backend: Backend that holds the shards of the working weights.
        weights: Master shards of this rank.
        identity: Versions, digests and parameter table that identify base weights and noise, JSON-able; part
            of the journal's header.
        timer: Seconds by phase of an iteration.
        stop: Flag that is set once the job has been asked to stop.
    """

    config: Config
    mesh: Mesh
    backend: Backend
    weights: Weights
    identity: dict[str, Any]
    timer: PhaseTimer
    stop: Stop

    def replay(self, updates: list[dict[str, Any]]) -> None:
        """Apply past updates to the base weights, which gives the weights of the run bit for bit.

        Args:
            updates: ``update`` records of the journal, in order.
        """
        for update in progress(updates, what="replaying the journal", total=len(updates), unit="iterations"):
            self.weights.update(Update.of_record(update))
        self.weights.centre()

    def follow(self, header: dict[str, Any], run_dir: Path) -> None:
        """Check that the base weights are a journal's, and compute updates as it was begun with.

        Args:
            header: First record of the journal.
            run_dir: Run directory, for messages.

        Raises:
            UserError: The base model or the noise definition is not the journal's.
        """
        for key in ("noise_version", "parameters_sha256", "base_weights_digest", "base_buffers_sha256"):
            wanted, found = header.get(key), self.identity.get(key)
            if wanted != found:
                raise UserError(
                    f"RUN_DIR {run_dir}: {key} of the run is {wanted}, but of model.path "
                    f"{self.config.model.directory} it is {found}; give the run its base model back"
                )
        self.use_update_version(header.get("update_version", 1))

    def use_update_version(self, version: int) -> None:
        """Compute updates from here on as a version of docs/updates.md has them.

        Args:
            version: Version in the journal's header; 1 if it has none.
        """
        optimizer = optimizer_of(self.config.es, update_version=version)
        if type(optimizer) is not type(self.weights.optimizer) and self.mesh.world.is_main:
            logger.warning(
                "this run was begun with version %d of the updates, whose %s has not the same bits "
                "on every processor (docs/updates.md): it goes on with that, and its weights can be restored "
                "on machines like the one that it ran on. Runs that begin now have version %d",
                version,
                self.config.es.optimizer,
                version_of_updates(self.config.es),
            )
        self.weights.optimizer = optimizer

    def digest(self, *, is_rounded: bool = False, compare: bool = True) -> str:
        """Return the weights digest of this rank's replica, 16 hexadecimal digits; a collective of all ranks.

        Args:
            is_rounded: Digest the centre, which an export holds, instead of the master.
            compare: Compare the digests of all replicas.

        Raises:
            RuntimeError: Replicas hold different weights.
        """
        return self.combined(master_digest(self.weights, is_rounded=is_rounded), compare=compare)

    def summed(self, parts: list[float]) -> list[float]:
        """Return float64 sums, element by element, over the ranks of a replica; a collective of these."""
        return self.mesh.shard.sum_float64(parts) if self.backend.is_sharded else parts

    def combined(self, part: int, *, compare: bool = True) -> str:
        """Return the digest whose parts, one per rank of a replica, add up modulo 2^64; see ``digest``."""
        return _combined(self.mesh, self.backend, part, compare=compare)


@contextmanager
def join_job(config: Config, *, stop: Stop) -> Iterator[Group]:
    """Join the job that a launcher has started, for several sessions one after another.

    Args:
        config: Validated configuration, whose section ``parallel`` all sessions have.
        stop: Flag by which this process can be asked to stop; other ranks can ask, too.

    Yields:
        The group of all ranks, which ends with the context.
    """
    with process_group(
        timeout_seconds=config.parallel.timeout_seconds,
        always=BACKENDS[config.parallel.backend].always_in_process_group,
        stop=stop,
        stop_seconds=config.run.stop_seconds,
    ) as world:
        yield world


@contextmanager
def job_with_model(
    config: Config, *, stop: Stop, recorded: str | None = None
) -> Iterator[tuple[Config, Group | None]]:
    """Have the model's files here, for what reads them before a session is opened.

    For a model of the hub, the job is joined, so that each machine fetches once; a directory needs no job.

    Args:
        config: Validated configuration.
        stop: Flag by which this process can be asked to stop; other ranks can ask, too.
        recorded: The commit with which the run began (``recorded_commit``); None: it is new.

    Yields:
        The configuration for ``open_session``, and the ranks of the job if it was joined.

    Raises:
        UserError: The model cannot be fetched, or the run began with another commit of it.
        StorageError: The cache of the hub cannot be written.
    """
    if config.model.is_here:
        yield config, None
        return
    with join_job(config, stop=stop) as world:
        yield _with_model(config, world, recorded=recorded), world


def _with_model(config: Config, world: Group, *, recorded: str | None = None) -> Config:
    model = fetch_for_job(config.model, world, recorded=recorded)
    return config.model_copy(update={"model": model})


@contextmanager
def open_session(
    config: Config, *, stop: Stop | None = None, world: Group | None = None
) -> Iterator[Session]:
    """Join the job, build the model over its ranks, and load the base weights.

    A model of the hub is fetched if that was not done before (``job_with_model``).

    Args:
        config: Validated configuration.
        stop: Flag by which this process can be asked to stop; other ranks can ask, too. None: a new one.
        world: Ranks of a job that was joined before, whose flag ``stop`` is; None: the job is joined here,
            and left with the context.

    Yields:
        The session, whose weights are the base weights.

    Raises:
        UserError: The model or the configuration cannot be used.
    """
    if config.parallel.threads_per_rank is not None:
        torch.set_num_threads(config.parallel.threads_per_rank)
    checkpoint = Checkpoint(config.model.directory) if config.model.is_here else None
    parallel = config.parallel
    spec = BACKENDS[parallel.backend]
    stop = stop or Stop()
    with join_job(config, stop=stop) if world is None else nullcontext(world) as world:
        if checkpoint is None:
            config = _with_model(config, world)
            checkpoint = Checkpoint(config.model.directory)
        config = config.on_device(world.device.type)
        shard_size = parallel.shard_size or spec.default_shard_size
        check_arithmetic(world.device)
        mesh = make_mesh(world, shard_size=shard_size, timeout_seconds=parallel.timeout_seconds)
        backend = make_backend(config, group=mesh.shard, checkpoint=checkpoint)
        weights = Weights(
            backend,
            seed=config.es.seed,
            kind=make_kind(config.es.noise, rank=config.es.rank, num_parts=config.es.subspaces),
            dtype=torch.float32 if config.weights.master == "float32" else backend.dtype,
            trainable=config.es.trainable,
            optimizer=optimizer_of(config.es),
            decay=decay_of(config.es),
            on_host=config.weights.master_device == "cpu",
        )
        _check_shapes(weights)
        weights.load(checkpoint)
        base_digest = _combined(mesh, backend, master_digest(weights), compare=True)
        identity = _identity(weights, checkpoint, base_digest, update_version=version_of_updates(config.es))
        logger.info(
            "%s on %d rank(s), %d replica(s), %s, %s; %d of %d parameters are trained",
            parallel.backend,
            world.world_size,
            mesh.num_replicas,
            world.device.type,
            config.model.dtype,
            sum(shard.num_elements for shard in weights.trained),
            sum(shard.num_elements for shard in backend.shards),
        )
        try:
            yield Session(config, mesh, backend, weights, identity, PhaseTimer(), stop)
        except Exception as error:
            # A config.json that fits the files' shapes may still describe a model that cannot compute.
            if may_be_of_model(error):
                check_forward(skeleton_of(config), like=error)
            raise
        backend.close()


def _check_shapes(weights: Weights) -> None:
    """Check that the noise has a rule for the shape of each trained parameter, and blocks for its parts.

    Raises:
        UserError: It has no rule for one of them, or too few blocks.
    """
    for shard in weights.trained:
        try:
            weights.kind.check_shape(shard.shape)
        except ValueError as error:
            raise UserError(
                f"es.noise: {shard.name}: {error}; freeze it (es.trainable: ['.*', '!{shard.name}']), or "
                "use another es.noise"
            ) from None
    num_parts, num_blocks = weights.kind.num_parts, 0
    for shard in weights.trained:
        parts = weights.kind.parts_of(shard.num_elements)
        num_blocks += 0 if parts is None else -(-shard.num_elements // parts.block)
    if num_parts > 1 and num_blocks < _BLOCKS_OF_PART * num_parts:
        raise UserError(
            f"es.subspaces: got {num_parts}, but the trained parameters have only {num_blocks} blocks of "
            f"elements, and a part needs {_BLOCKS_OF_PART} or it may have none; give at most "
            f"{max(num_blocks // _BLOCKS_OF_PART, 1)}"
        )


def _combined(mesh: Mesh, backend: Backend, digest: int, *, compare: bool) -> str:
    if backend.is_sharded:
        digest = mesh.shard.sum_int64(digest)
    if compare and mesh.num_replicas > 1:
        first = mesh.world.broadcast_json(digest)
        if mesh.world.any(digest != first):
            found = mesh.world.gather_int64([digest - (digest >> 63 << 64)])
            shown = ", ".join(
                f"{found[rank][0] & 0xFFFFFFFFFFFFFFFF:016x} in replica {rank // mesh.shard.world_size}"
                for rank in range(0, mesh.world.world_size, mesh.shard.world_size)
            )
            raise RuntimeError(
                f"replicas hold different weights, so one of them was corrupted; their digests: {shown}. "
                "The journal is good: go on with the same command, and look at the machine that differs"
            )
    return f"{digest:016x}"


def _identity(
    weights: Weights, checkpoint: Checkpoint, base_digest: str, *, update_version: int
) -> dict[str, Any]:
    table = [[shard.param_id, shard.name, list(shard.shape)] for shard in weights.trained]
    # Few models have any; the digest of the weights is of parameters alone.
    buffers = {"base_buffers_sha256": checkpoint.buffers_sha256()} if checkpoint.buffers else {}
    return buffers | {
        "noise_version": NOISE_VERSION,
        "update_version": update_version,
        "shardes_version": VERSION,
        "base_headers_sha256": checkpoint.header_sha256,
        "base_weights_digest": base_digest,
        "parameters_sha256": hashlib.sha256(json.dumps(table).encode()).hexdigest(),
        "parameters": table,
    }
