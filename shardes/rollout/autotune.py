"""What ``auto`` is: numbers that a run finds for itself when it begins, and then keeps.

They decide the last bits of results, so a run that goes on keeps those of its journal.
"""

import heapq
import logging
from collections.abc import Callable, Sequence
from typing import Any

from shardes.config.schema import Config
from shardes.distributed.group import Group, Mesh
from shardes.es.update import Perturbation
from shardes.rollout.evaluator import Evaluator
from shardes.tasks.base import Row

logger = logging.getLogger(__name__)

# With as many prompts the gather mode is chosen, if that is to be chosen, too: a mode that shares weights
# better is worth more than larger micro-batches.
USUAL_SIZE = 32
# More members than this in a forward save little more.
MOST_MEMBERS = 64


def resolve_auto(
    config: Config,
    evaluator: Evaluator,
    *,
    recorded: Callable[[str], Any],
    rows: Sequence[Row],
    first_rows: Sequence[Row],
    population: int,
    mesh: Mesh,
) -> Config:
    """Put numbers for ``auto`` into a configuration and into the evaluator; a collective of all ranks.

    Args:
        config: The run's configuration.
        evaluator: Answers.
        recorded: Returns the setting of a dotted key with which the run began; None if it is new.
        rows: All problems that are trained on.
        first_rows: Those of the first iteration.
        population: Members of the first iteration.
        mesh: The ranks.

    Returns:
        The configuration without ``auto``, but for ``rollout.gather``.
    """
    settings, racing = config.rollout, config.es.racing
    num_rows = len(first_rows) if racing is None else max(1, len(first_rows) // racing.rounds)

    def find_size() -> int:
        return find_micro_batch_size(evaluator, rows, num_rows=num_rows, mesh=mesh, sigma=config.es.sigma)

    def find_count() -> int:
        return find_members_per_forward(evaluator, first_rows, population=population, mesh=mesh)

    if settings.micro_batch_size == "auto":
        size = _recorded_or_found("rollout.micro_batch_size", find_size, recorded, world=mesh.world)
        evaluator.micro_batch_size = size
        settings = settings.model_copy(update={"micro_batch_size": size})
    if settings.members_per_forward == "auto":
        count = _recorded_or_found("rollout.members_per_forward", find_count, recorded, world=mesh.world)
        evaluator.engine.members_per_forward = count
        if count > 1:  # else it stays auto: with 1, members would not share forwards at all
            settings = settings.model_copy(update={"members_per_forward": count})
    return config.model_copy(update={"rollout": settings})


def _recorded_or_found(
    key: str, find: Callable[[], int], recorded: Callable[[str], Any], *, world: Group
) -> int:
    """Return what the run was begun with; otherwise what is found now."""
    known: int | None = world.broadcast_json(recorded(key))
    return find() if known is None else known


def find_micro_batch_size(
    evaluator: Evaluator, rows: Sequence[Row], *, num_rows: int, mesh: Mesh, sigma: float
) -> int:
    """Try the longest problems with a perturbed model until every rank has the memory; a collective.

    The first try is the largest that gives all ranks work that share an iteration's problems, the next are
    half as large.

    Args:
        evaluator: Answers; it is left with the size that was found.
        rows: The problems.
        num_rows: How many of them a member is asked at a time: an iteration's, or those of a portion.
        mesh: The ranks.
        sigma: Scale of the noise.

    Returns:
        Prompts per forward, the same number on every rank.
    """
    longest = heapq.nlargest(num_rows, rows, key=lambda row: len(str(row)))
    evaluator.micro_batch_size = USUAL_SIZE
    evaluator.begin(evaluator.prepare(longest[:USUAL_SIZE], iteration=0))
    engine = evaluator.engine
    engine.load([Perturbation(0, 0, sigma)])
    per_row = evaluator.samples_per_prompt
    num_sharers = engine.group.world_size // (engine.ranks_per_forward * engine.num_loads)
    size = -(-len(longest) * per_row // num_sharers)
    while True:
        evaluator.micro_batch_size = size
        is_short = not evaluator.fits(evaluator.prepare(longest[: -(-size // per_row)], iteration=0))
        if not mesh.world.any(is_short) or size == 1:
            break
        size = -(-size // 2)
    logger.info("rollout.micro_batch_size: auto is %d", size)
    return size


def find_members_per_forward(
    evaluator: Evaluator, rows: Sequence[Row], *, population: int, mesh: Mesh
) -> int:
    """Find how many members every rank has the memory for, by a formula; a collective.

    Args:
        evaluator: Answers, with members that share forwards; it is left with the number that was found.
        rows: Problems of an iteration.
        population: Members of an iteration.
        mesh: The ranks.

    Returns:
        The same number on every rank: a power of two, and no larger than what holds the population.
    """
    count = MOST_MEMBERS
    while count > 1 and count // 2 >= population:
        count //= 2
    evaluator.engine.members_per_forward = 1
    prompts = evaluator.prepare(rows, iteration=0)
    evaluator.begin(prompts)
    while count > 1:
        evaluator.engine.members_per_forward = count
        if not mesh.world.any(not evaluator.fits(prompts)):
            break
        count //= 2
    evaluator.engine.members_per_forward = count
    logger.info("rollout.members_per_forward: auto is %d", count)
    return count
