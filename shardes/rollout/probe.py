"""How many prompts fit into a forward, and how many members: what ``auto`` is of either."""

import heapq
import logging
from collections.abc import Sequence

from shardes.distributed.group import Mesh
from shardes.es.update import Perturbation
from shardes.rollout.evaluator import Evaluator
from shardes.tasks.base import Row

logger = logging.getLogger(__name__)

# With as many prompts the rollout mode is chosen, if that is to be chosen, too: a mode that shares weights
# better is worth more than larger micro-batches.
USUAL_SIZE = 32
# More members than this in a forward save little more.
MOST_MEMBERS = 64


def find_micro_batch_size(
    rollout: Evaluator, rows: Sequence[Row], *, num_rows: int, mesh: Mesh, sigma: float
) -> int:
    """Tries the longest problems under a perturbed model until every rank has the memory; a collective.

    The first try is the largest that gives all ranks work that share an iteration's problems, the next are
    half as large. The size decides the last bits of results, so a run keeps the one that it began with.

    Args:
        rollout: Answers; it is left with the size that was found.
        rows: The problems.
        num_rows: How many of them an iteration asks.
        mesh: All ranks.
        sigma: Scale of the noise.

    Returns:
        The same number on every rank.
    """
    longest = heapq.nlargest(num_rows, rows, key=lambda row: len(str(row)))
    rollout.micro_batch_size = USUAL_SIZE
    rollout.begin(rollout.prepare(longest[:USUAL_SIZE], iteration=0))
    rollout.mode.perturb(Perturbation(0, 0, sigma))
    per_row = rollout.samples_per_prompt
    size = -(-len(longest) * per_row // rollout.num_sharers)
    while True:
        rollout.micro_batch_size = size
        is_short = not rollout.fits(rollout.prepare(longest[: -(-size // per_row)], iteration=0))
        if not mesh.world.any(is_short) or size == 1:
            break
        size = -(-size // 2)
    logger.info("rollout.micro_batch_size: auto is %d", size)
    return size


def find_members_per_forward(rollout: Evaluator, rows: Sequence[Row], *, population: int, mesh: Mesh) -> int:
    """How many members every rank has the memory for, by a formula; a collective.

    Like the size of a micro-batch it decides the last bits of results, so a run keeps what was found.

    Args:
        rollout: Answers, in a batched mode; it is left with the number that was found.
        rows: Problems of an iteration.
        population: Members of an iteration.
        mesh: All ranks.

    Returns:
        The same number on every rank: a power of two, and no larger than what holds the population.
    """
    count = MOST_MEMBERS
    while count > 1 and count // 2 >= population:
        count //= 2
    rollout.members_per_forward = 1
    problems = rollout.prepare(rows, iteration=0)
    rollout.begin(problems)
    while count > 1:
        rollout.members_per_forward = count
        if not mesh.world.any(not rollout.fits(problems)):
            break
        count //= 2
    rollout.members_per_forward = count
    logger.info("rollout.members_per_forward: auto is %d", count)
    return count
