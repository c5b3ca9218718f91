"""Screening: problems on which all members have earned the same are asked less often (``task.screening``)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from shardes.config.task import ScreeningConfig
from shardes.errors import UserError
from shardes.es.shaping import RewardTable, rewards_by_prompt
from shardes.noise import Draw, data_order
from shardes.tasks.base import Task


@dataclass(frozen=True)
class AskedProblems:
    """Problems of an iteration that are asked.

    Attributes:
        rows: Their rows, in the order in which they were drawn.
        weights: Weight of each in members' rewards; None: all weigh the same.
        num_left_out: Number of problems that were drawn and are not asked.
    """

    rows: Sequence[int]
    weights: Sequence[float] | None = None
    num_left_out: int = 0


class Screening:
    """Chooses which problems are asked, by what members have earned on them before.

    All of it follows from the updates' records in the journal, the seed and the iteration.

    Args:
        settings: Section ``task.screening`` of the configuration.
        seed: ``es.seed``.
        numbers: Number of each row in the data, by which the journal knows it; None: the row's index.
    """

    def __init__(self, settings: ScreeningConfig, *, seed: int, numbers: Sequence[int] | None = None) -> None:
        self._settings, self._seed, self._numbers = settings, seed, numbers
        # By number: what all members earned the last time, and how many times in a row.
        self._agreed: dict[int, tuple[float, int]] = {}

    def choose(self, drawn: Sequence[int], *, iteration: int) -> AskedProblems:
        """Return the problems to ask, of those that were drawn.

        Of n screened ones, ``ceil(keep_fraction * n)`` are asked, drawn at random: so there always is one.
        With ``importance_weights``, each of these weighs n over this number, and the weights of all that are
        asked add up to the number of those that were drawn.

        Args:
            drawn: Rows.
            iteration: The iteration.
        """
        screened = [place for place, row in enumerate(drawn) if self._is_screened(row)]
        if not screened:
            return AskedProblems(drawn)
        # Of the decimal number that was given: 0.7 * 10 is more than 7 in floating point.
        count = math.ceil(Fraction(repr(self._settings.keep_fraction)) * len(screened))
        order = data_order(
            len(screened), seed=self._seed, iteration=iteration, count=count, draw=Draw.SCREENED
        )
        kept = {screened[place] for place in order.tolist()}
        weight = {place: len(screened) / count for place in screened}
        places = [place for place in range(len(drawn)) if place in kept or place not in weight]
        weights = [weight.get(place, 1.0) for place in places] if self._settings.importance_weights else None
        return AskedProblems([drawn[place] for place in places], weights, len(drawn) - len(places))

    def learn(self, asked: AskedProblems, table: RewardTable) -> dict[str, Any]:
        """Take in what members have earned; return what the journal's record of the update has of it.

        Args:
            asked: What they were asked.
            table: Reward of each member for each problem that it answered, by place among these; None where
                none of its answers counts.
        """
        agreed: dict[float, list[int]] = {}
        informative: list[int] = []
        by_place = rewards_by_prompt(table)
        for place, row in enumerate(asked.rows):
            rewards = by_place.get(place, [])
            if len(rewards) < 2:
                continue  # there is nothing to compare
            same = min(rewards) == max(rewards)
            (agreed.setdefault(rewards[0], []) if same else informative).append(self._number(row))
        record = {
            "num_problems": len(asked.rows),
            "num_left_out": asked.num_left_out,
            "informative": informative,
            "agreed": [[reward, numbers] for reward, numbers in agreed.items()],
        }
        self._take(record)
        return record

    def resume(self, updates: Iterable[Mapping[str, Any]]) -> None:
        """Take in the journal's records of updates, in order.

        Raises:
            UserError: One of them does not say what was learned.
        """
        for iteration, update in enumerate(updates):
            if update.get("screening") is None:
                raise UserError(
                    f"run.dir: the journal's update of iteration {iteration} does not say what "
                    "task.screening has learned, so it is not known what to ask; give another run.dir"
                )
            self._take(update["screening"])

    def _take(self, record: Mapping[str, Any]) -> None:
        for reward, numbers in record["agreed"]:
            for number in numbers:
                last, times = self._agreed.get(number, (reward, 0))
                self._agreed[number] = (reward, times + 1 if last == reward else 1)
        for number in record["informative"]:
            self._agreed.pop(number, None)

    def _is_screened(self, row: int) -> bool:
        _, times = self._agreed.get(self._number(row), (0.0, 0))
        return times >= self._settings.patience

    def _number(self, row: int) -> int:
        return row if self._numbers is None else self._numbers[row]


def make_screening(settings: ScreeningConfig | None, task: Task, *, seed: int) -> Screening | None:
    """Return the screening of a task's problems; None if all are asked.

    Args:
        settings: Section ``task.screening`` of the configuration.
        task: The task; rows that were left out of it keep their numbers.
        seed: ``es.seed``.
    """
    if settings is None:
        return None
    if task.all_train is None:
        return Screening(settings, seed=seed)
    place = {id(row): number for number, row in enumerate(task.all_train)}
    return Screening(settings, seed=seed, numbers=[place[id(row)] for row in task.train])
