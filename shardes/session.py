"""Putting the parts of a run together: what training, evaluation and export have in common."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardes import __version__
from shardes.backends import Backend, make_backend
from shardes.checkpoint import Checkpoint
from shardes.config import Config
from shardes.distributed import Group, process_group
from shardes.errors import UserError
from shardes.es.weights import Weights
from shardes.modeling import load_tokenizer
from shardes.noise import NOISE_VERSION, NoiseKind
from shardes.rollout.rollout import Rollout
from shardes.rollout.scoring import Scorer
from shardes.runs.journal import JOURNAL_VERSION
from shardes.spans import Spans
from shardes.tasks.base import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A model spread over ranks, with its base weights loaded.

    Attributes:
        config: What the run was told.
        group: The ranks.
        backend: Where the shards live.
        weights: The master shards.
        identity: What the weights and the noise are; part of the journal's header.
        spans: Where the time goes.
    """

    config: Config
    group: Group
    backend: Backend
    weights: Weights
    identity: dict[str, Any]
    spans: Spans

    def replay(self, updates: list[dict[str, Any]]) -> None:
        """Applies past updates to the base weights: afterwards they are those of the run, bit for bit."""
        for update in updates:
            coefficients = update["coefficients"]
            self.weights.update(
                iteration=update["iteration"],
                directions=range(len(coefficients)),
                coefficients=coefficients,
            )
        self.weights.centre()

    def check_base(self, header: dict[str, Any], run_dir: Path) -> None:
        """Refuses to replay a journal over other weights than those it was written over.

        Raises:
            UserError: The base model or the noise definition is not the journal's.
        """
        for key in ("noise_version", "parameters_sha256", "base_weights_digest"):
            if header[key] != self.identity[key]:
                raise UserError(
                    f"RUN_DIR {run_dir}: {key} of the run is {header[key]}, but of model.path "
                    f"{self.config.model.path} it is {self.identity[key]}; give the run its base model back"
                )

    def digest(self) -> str:
        """The weights digest, in hexadecimal; a collective."""
        return _digest(self.group, self.backend, self.weights)


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Joins the job, builds the model over its ranks, and loads the base weights.

    Raises:
        UserError: The model or the configuration cannot be used.
    """
    if config.parallel.threads_per_rank is not None:
        torch.set_num_threads(config.parallel.threads_per_rank)
    checkpoint = Checkpoint(config.model.path)
    needs_group = config.parallel.backend == "zero3"
    with process_group(timeout_seconds=config.parallel.timeout_seconds, always=needs_group) as group:
        backend = make_backend(config, group=group)
        weights = Weights(
            backend,
            seed=config.es.seed,
            kind=NoiseKind(config.es.noise),
            dtype=torch.float32 if config.weights.master == "float32" else backend.dtype,
        )
        weights.load(checkpoint)
        identity = _identity(backend, checkpoint, _digest(group, backend, weights))
        logger.info(
            "%s on %d rank(s), %s, %s",
            config.parallel.backend,
            group.world_size,
            group.device.type,
            config.model.dtype,
        )
        yield Session(config, group, backend, weights, identity, Spans())


def make_rollout(session: Session, task: Task) -> tuple[Rollout, Scorer]:
    """What answers and scores a task's problems with a session's model."""
    config = session.config
    scorer = Scorer(task, on_error=config.task.on_reward_error)
    rollout = Rollout(
        session.backend,
        task=task,
        tokenizer=load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code),
        group=session.group,
        scorer=scorer,
        mode=config.rollout.mode,
        micro_batch_size=config.rollout.micro_batch_size,
        max_new_tokens=config.rollout.max_new_tokens,
        spans=session.spans,
    )
    return rollout, scorer


def _digest(group: Group, backend: Backend, weights: Weights) -> str:
    digest = weights.digest()
    return f"{group.sum_int64(digest) if backend.is_sharded else digest:016x}"


def _identity(backend: Backend, checkpoint: Checkpoint, base_digest: str) -> dict[str, Any]:
    table = [[shard.param_id, shard.name, list(shard.shape)] for shard in backend.shards]
    return {
        "journal_version": JOURNAL_VERSION,
        "noise_version": NOISE_VERSION,
        "shardes_version": __version__,
        "base_headers_sha256": checkpoint.header_sha256,
        "base_weights_digest": base_digest,
        "parameters_sha256": hashlib.sha256(json.dumps(table).encode()).hexdigest(),
    }
