"""Sampler of an iteration's problems: a pure function of the seed and the iteration."""

from typing import Literal

from shardes.noise import data_order

ProblemOrder = Literal["random", "epochs", "fixed"]


def draw_batch(
    num_problems: int, *, batch_size: int | None, sampling: ProblemOrder, seed: int, iteration: int
) -> list[int]:
    """Return the indices of an iteration's problems.

    Args:
        num_problems: Number of problems of the task.
        batch_size: Number of problems to draw; None, or more than there are: all, in their order.
        sampling: ``random``: different ones, drawn anew. ``epochs``: the next ones of a sequence in which all
            problems follow each other in random order, then all of them in another, and so on; a batch that
            reaches from one pass into the next may have a problem twice. ``fixed``: the same in every
            iteration, drawn once.
        seed: ``es.seed``, which the draws depend on.
        iteration: The iteration.
    """
    if batch_size is None or batch_size >= num_problems:
        return list(range(num_problems))
    if sampling == "epochs":
        epoch, place = divmod(iteration * batch_size, num_problems)
        order: list[int] = []
        while len(order) < place + batch_size:
            order += data_order(num_problems, seed=seed, iteration=epoch, count=num_problems).tolist()
            epoch += 1
        return order[place : place + batch_size]
    draw = 0 if sampling == "fixed" else iteration
    return data_order(num_problems, seed=seed, iteration=draw, count=batch_size).tolist()
