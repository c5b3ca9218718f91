"""The backends by name, with the facts that are needed before one is built.

The configuration and the plan decide by these facts, never by a backend's name, so that a new backend is one
file and one entry here. No backend is imported before it is used.
"""

from dataclasses import dataclass
from typing import Any

from shardes.utils.references import load_class


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
        own_engine: Value of ``rollout.engine`` that answers with this backend, and with no other; None: any
            engine that is no backend's own.
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
    own_engine: str | None = None

    def load(self) -> Any:
        """Import and return the backend's class."""
        return load_class(self.reference)


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
        "vllm",
        "shardes.backends.vllm.backend:VllmBackend",
        gathers=("layer",),
        auto_gather="layer",
        auto_reason="vLLM's own parameters are perturbed where they are",
        needs_same_batch=True,
        own_engine="vllm",
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
