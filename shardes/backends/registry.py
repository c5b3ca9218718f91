"""The backends by name, with the facts that are needed before one is built.

The configuration and the plan decide by these facts, never by a backend's name, so that a new backend is one
file and one entry here. No backend is imported before it is used.
"""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BackendSpec:
    """A backend and its capabilities.

    Attributes:
        name: Value of ``parallel.backend``.
        reference: ``module:class`` of the backend, a subclass of ``Backend``.
        gathers: Supported values of ``rollout.gather``, fastest first.
        auto_gather: Value that ``rollout.gather: auto`` has if members are evaluated one by one; None if it
            depends on free memory.
        auto_reason: Explanation of ``auto_gather`` for the log.
        default_shard_size: Ranks to a replica if ``parallel.shard_size`` is null; None means all ranks.
        is_sharded: Whether the ranks of a replica hold different elements.
        needs_same_batch: Whether the ranks of a replica compute parts of one forward.
        always_in_process_group: Whether a process group is needed even for one rank.
        uses_deepspeed_file: Whether ``parallel.deepspeed`` may be set.
    """

    name: str
    reference: str
    gathers: tuple[str, ...] = ("iteration", "member", "layer")
    auto_gather: str | None = None
    auto_reason: str = ""
    default_shard_size: int | None = None
    is_sharded: bool = True
    needs_same_batch: bool = False
    always_in_process_group: bool = True
    uses_deepspeed_file: bool = False

    def load(self) -> Any:
        """Import and return the backend's class."""
        module, _, name = self.reference.partition(":")
        return getattr(importlib.import_module(module), name)


_SPECS = (
    BackendSpec("zero3", "shardes.backends.zero3:Zero3Backend", uses_deepspeed_file=True),
    BackendSpec("fsdp", "shardes.backends.fsdp:FsdpBackend"),
    BackendSpec(
        "tensor_parallel",
        "shardes.backends.tensor_parallel:TensorParallelBackend",
        gathers=("layer",),
        auto_gather="layer",
        auto_reason="no rank ever holds a whole model",
        needs_same_batch=True,
    ),
    BackendSpec(
        "single",
        "shardes.backends.single:SingleBackend",
        gathers=("member", "iteration", "layer"),
        auto_gather="member",
        auto_reason="every rank holds a whole model, so nothing is gathered",
        default_shard_size=1,
        is_sharded=False,
        always_in_process_group=False,
    ),
)

BACKENDS = {spec.name: spec for spec in _SPECS}
