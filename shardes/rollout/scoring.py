"""Calling a reward function whose failures are data."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from shardes.tasks.base import Prompt, Row, Task

logger = logging.getLogger(__name__)

# Beyond it, the squares in the standard deviation would overflow.
MAX_REWARD = 1e100


@dataclass
class Scores:
    """Rewards of some answers.

    Attributes:
        values: One per answer; None where the reward failed or does not apply.
        num_failures: How often it raised or returned something that is no usable number.
    """

    values: list[float | None]
    num_failures: int


class Scorer:
    """Calls a task's reward.

    Args:
        task: Whose reward.
        on_error: What an answer counts whose reward failed: ``exclude``, or this number.

    Attributes:
        first_failure: What went wrong the first time, for messages.
    """

    def __init__(self, task: Task, *, on_error: str | float) -> None:
        self._task = task
        self._substitute = None if isinstance(on_error, str) else float(on_error)
        self.first_failure: str | None = None

    def score(self, rows: Sequence[Row], prompts: Sequence[Prompt], completions: Sequence[str]) -> Scores:
        """Scores answers in one call; if that fails, one by one, so that only the failing ones suffer."""
        if not rows:
            return Scores([], 0)
        keys = sorted({key for row in rows for key in row} - {"prompt", "prompts", "completions"})
        answers = list(zip(rows, prompts, completions, strict=True))
        together = self._try(answers, keys)
        if together is not None:
            return together
        failed = Scores([self._substitute], 1)
        if len(answers) == 1:
            return failed
        alone = [self._try([answer], keys) or failed for answer in answers]
        return Scores([s.values[0] for s in alone], sum(s.num_failures for s in alone))

    def _try(self, answers: Sequence[tuple[Row, Prompt, str]], keys: Sequence[str]) -> Scores | None:
        """The scores of some answers, or None if the reward failed as a whole."""
        rows, prompts, completions = zip(*answers, strict=True)
        columns = {key: [row.get(key) for row in rows] for key in keys}
        try:
            return self._checked(self._task.reward(list(prompts), list(completions), **columns), len(rows))
        except (Exception, SystemExit) as error:
            self._note(error)
            return None

    def _checked(self, values: Sequence[float | None], wanted: int) -> Scores:
        if len(values) != wanted:
            raise ValueError(f"the reward returned {len(values)} values for {wanted} completions")
        scores = Scores([], 0)
        for value in values:
            if value is None:
                scores.values.append(None)
            elif abs(float(value)) < MAX_REWARD:
                scores.values.append(float(value))
            else:
                self._note(ValueError(f"the reward returned {value!r}, which is no usable number"))
                scores.values.append(self._substitute)
                scores.num_failures += 1
        return scores

    def _note(self, error: BaseException) -> None:
        if self.first_failure is None:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
            self.first_failure = f"{type(error).__name__}: {error}{where}"
            logger.warning("a reward failed, and further ones are only counted: %s", self.first_failure)
