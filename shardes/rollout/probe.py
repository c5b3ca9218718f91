"""How many prompts fit into a forward: ``rollout.micro_batch_size: auto``."""

import heapq
import logging
from collections.abc import Sequence

from shardes.distributed import Mesh
from shardes.rollout.rollout import Rollout
from shardes.tasks.base import Row

logger = logging.getLogger(__name__)

# With as many prompts the rollout mode is chosen, if that is to be chosen, too: a mode that shares weights
# better is worth more than larger micro-batches.
USUAL_SIZE = 32


def find_micro_batch_size(
    rollout: Rollout, rows: Sequence[Row], *, num_rows: int, mesh: Mesh, sigma: float
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
    rollout.mode.perturb(iteration=0, direction=0, sigma=sigma)
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
