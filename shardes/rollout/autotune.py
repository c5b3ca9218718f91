"""What ``auto`` is: numbers that a run finds for itself when it begins, and then keeps."""

from collections.abc import Callable, Sequence

from shardes.config.schema import Config
from shardes.distributed.group import Group, Mesh
from shardes.rollout.evaluator import Evaluator
from shardes.rollout.probe import find_members_per_forward, find_micro_batch_size
from shardes.runs.journal import recorded_setting
from shardes.tasks.base import Row


def resolve_auto(
    config: Config,
    rollout: Evaluator,
    *,
    rows: Sequence[Row],
    first_rows: Sequence[Row],
    population: int,
    mesh: Mesh,
) -> Config:
    """Puts numbers for ``auto`` into a configuration and into the rollout; a collective of all ranks.

    They decide the last bits of results: a run that has begun keeps those of its journal.

    Args:
        config: What the run was told.
        rollout: Answers.
        rows: All problems that are trained on.
        first_rows: Those of the first iteration.
        population: Members of the first iteration.
        mesh: All ranks.

    Returns:
        The configuration without ``auto``, but for ``rollout.gather``.
    """
    settings = config.rollout

    def find_size() -> int:
        return find_micro_batch_size(
            rollout, rows, num_rows=len(first_rows), mesh=mesh, sigma=config.es.sigma
        )

    def find_count() -> int:
        return find_members_per_forward(rollout, first_rows, population=population, mesh=mesh)

    if settings.micro_batch_size == "auto":
        size = _kept_or_found("micro_batch_size", find_size, config=config, world=mesh.world)
        rollout.micro_batch_size = size
        settings = settings.model_copy(update={"micro_batch_size": size})
    if settings.is_batched and settings.members_per_forward == "auto":
        count = _kept_or_found("members_per_forward", find_count, config=config, world=mesh.world)
        rollout.members_per_forward = count
        if count > 1:  # else it stays auto: with 1, members would not be evaluated as terms
            settings = settings.model_copy(update={"members_per_forward": count})
    return config.model_copy(update={"rollout": settings})


def _kept_or_found(key: str, find: Callable[[], int], *, config: Config, world: Group) -> int:
    """What the run was begun with; otherwise what is found now."""
    kept: int | None = world.broadcast_json(recorded_setting(config.run.dir, f"rollout.{key}"))
    return find() if kept is None else kept
