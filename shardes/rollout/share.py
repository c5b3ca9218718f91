"""A rank's share of the micro-batches of an evaluation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkShare:
    """A rank's share of the micro-batches that some ranks answer for the same members.

    Attributes:
        place: Its place among those that take turns.
        num_places: How many take turns.
        leader: The place that has a micro-batch whenever one of the ranks that call alike has.
        is_counted: Whether what this rank's engine returns counts, and is not another rank's as well.
    """

    place: int
    num_places: int
    leader: int
    is_counted: bool
