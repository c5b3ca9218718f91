"""Completions that rewards judge together, and what they say of them; light, because workers import it."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from shardes.rewards.signature import GIVEN
from shardes.tasks.base import Prompt, Row

# Names that a reward has for other things than columns.
_RESERVED = GIVEN | {"prompt"}


@dataclass(frozen=True)
class RewardBatch:
    """Completions that are judged together.

    Attributes:
        prompts: One for each completion.
        completions: Texts.
        token_ids: Tokens of each completion.
        columns: By name, the rows' values, one for each completion; None where a row has none.
    """

    prompts: list[Prompt]
    completions: list[str]
    token_ids: list[list[int]]
    columns: dict[str, list[Any]]

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        token_ids: Sequence[list[int]],
    ) -> Self:
        """Make the batch of the completions for some rows."""
        keys = sorted({key for row in rows for key in row} - _RESERVED)
        columns = {key: [row.get(key) for row in rows] for key in keys}
        return cls(list(prompts), list(completions), list(token_ids), columns)

    def __len__(self) -> int:
        return len(self.completions)

    def with_columns(self, names: Collection[str]) -> Self:
        """Return a copy without the columns of other names."""
        return replace(self, columns={name: values for name, values in self.columns.items() if name in names})

    def alone(self) -> Iterator[Self]:
        """Yield each completion as a batch of its own."""
        for i in range(len(self)):
            yield type(self)(
                [self.prompts[i]],
                [self.completions[i]],
                [self.token_ids[i]],
                {key: [values[i]] for key, values in self.columns.items()},
            )


@dataclass(frozen=True)
class RewardOutput:
    """Rewards of a batch of completions, by all components of a task or by some of them.

    Attributes:
        components: By name, a component's values before weights, one per completion; None where the
            component failed or does not apply.
        has_failed: One per completion: whether a component raised, hung, or returned no usable number.
        first_failure: Message of the first failure; None if nothing failed.
        values: One per completion: the weighted sum that ``weighted`` computes; empty before.
    """

    components: dict[str, list[float | None]]
    has_failed: list[bool]
    first_failure: str | None = None
    values: list[float | None] = field(default_factory=list)

    @property
    def num_failures(self) -> int:
        """Return the number of completions whose reward failed."""
        return sum(self.has_failed)

    @classmethod
    def failed(cls, names: Iterable[str], num_completions: int, reason: str) -> Self:
        """Return the output of components that failed for every completion."""
        return cls({name: [None] * num_completions for name in names}, [True] * num_completions, reason)

    @classmethod
    def concatenated(cls, parts: Sequence["RewardOutput"]) -> Self:
        """Join outputs of the same components for consecutive parts of a batch."""
        return cls(
            {name: [v for part in parts for v in part.components[name]] for name in parts[0].components},
            [flag for part in parts for flag in part.has_failed],
            _first_failure(parts),
        )

    @classmethod
    def merged(cls, parts: Sequence["RewardOutput"]) -> Self:
        """Join outputs of different components for the same completions."""
        return cls(
            {name: values for part in parts for name, values in part.components.items()},
            [any(flags) for flags in zip(*(part.has_failed for part in parts), strict=True)],
            _first_failure(parts),
        )

    def weighted(self, weights: Mapping[str, float], *, substitute: float | None) -> Self:
        """Return a copy with ``values``: the sums of the components that apply, each times its weight.

        Args:
            weights: A weight for each component, by name.
            substitute: The value of a completion whose reward failed.

        A value is None where no component applies.
        """
        values: list[float | None] = []
        for i, has_failed in enumerate(self.has_failed):
            parts = [
                weights[name] * value
                for name, column in self.components.items()
                if (value := column[i]) is not None
            ]
            values.append(substitute if has_failed else math.fsum(parts) if parts else None)
        return replace(self, values=values)


def _first_failure(parts: Sequence[RewardOutput]) -> str | None:
    return next((part.first_failure for part in parts if part.first_failure is not None), None)
