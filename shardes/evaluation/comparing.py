"""Compare models with a base: intervals, pass@k, problems gained and lost, and divergence, JSON-able."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from shardes.evaluation.coverage import gained_and_lost, numbers_to_draw, pass_at_k
from shardes.evaluation.drawing import Drawing
from shardes.evaluation.measuring import ModelResult, SetResult
from shardes.evaluation.summary import estimate, ratio_estimate


def compare_results(
    results: Sequence[ModelResult], *, drawing: Drawing, pass_reward: float
) -> dict[str, Any]:
    """Return the statistics of some models, and their differences from the first one.

    Intervals hold 95%, by bootstrap over problems with fixed random numbers. Those of differences are paired:
    a resample has the same problems of both models.

    Args:
        results: Results of the models; the first is the base. At least one.
        drawing: How answers were drawn.
        pass_reward: Least reward of an answer that passes.
    """
    base = results[0]
    ks = numbers_to_draw(drawing.num_answers)
    return {
        "settings": {
            "num_samples": drawing.num_answers,
            "temperature": drawing.temperature if drawing.num_answers else None,
            "seed": drawing.seed,
            "pass_reward": pass_reward,
        },
        "main_set": next(iter(base.sets)),
        "models": [
            {
                "model": result.name,
                "iteration": result.iteration,
                "kl": _divergence(result),
                "no_kl": result.no_divergence or None,
                "sets": {
                    name: _set_statistics(found, base.sets[name], ks=ks, is_base=result is base)
                    for name, found in result.sets.items()
                },
            }
            for result in results
        ],
    }


def _divergence(result: ModelResult) -> dict[str, Any] | None:
    """Return the nats per token by which the base finds its own answers likelier than a model does."""
    if not result.divergences:
        return None
    nats, tokens = zip(*result.divergences, strict=True)
    return vars(ratio_estimate(nats, tokens))


def _set_statistics(found: SetResult, base: SetResult, *, ks: Sequence[int], is_base: bool) -> dict[str, Any]:
    """Return the statistics of a model on one set."""
    paired = _Pairs(found, base)
    statistics: dict[str, Any] = {"num_problems": len(found.rows)}
    columns: dict[str, Callable[[SetResult], Sequence[float | None]]] = {
        "reward": lambda each: each.rewards,
        "solved": lambda each: [None if value is None else float(value) for value in each.solved],
        "tokens": lambda each: each.lengths,
    }
    if found.num_answers:
        columns["sampled_reward"] = lambda each: each.drawn_rewards
        for k in ks:
            columns[f"pass@{k}"] = partial(_coverage, k=k)
    for name, column in columns.items():
        statistics[name] = vars(estimate(column(found), samples_per_problem=1))
        if not is_base:
            statistics[f"{name}_change"] = vars(paired.change(column))
    if not is_base:
        statistics |= paired.gained_and_lost()
    return statistics | {
        "num_failures": found.num_failures,
        "is_finite": found.is_finite,
        "problems": _problems(found),
    }


def _coverage(found: SetResult, *, k: int) -> list[float | None]:
    """Return pass@k of each problem; None where fewer answers count."""
    return [
        pass_at_k(num_answers, num_passes, k) if num_answers >= k else None
        for num_answers, num_passes in zip(found.num_answers, found.num_passes, strict=True)
    ]


def _problems(found: SetResult) -> list[dict[str, Any]]:
    """Return what is known of each problem."""
    columns: dict[str, Sequence[Any]] = {
        "row": found.rows,
        "reward": found.rewards,
        "solved": found.solved,
        "tokens": found.lengths,
        "num_samples": found.num_answers,
        "num_passes": found.num_passes,
        "sampled_reward": found.drawn_rewards,
    }
    known = {name: values for name, values in columns.items() if values}
    return [dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True)]


@dataclass(frozen=True)
class _Pairs:
    """Results of a model and of the base on the problems that both were asked."""

    found: SetResult
    base: SetResult

    def _both(self, found: Sequence[Any], base: Sequence[Any]) -> tuple[list[int], list[Any], list[Any]]:
        """Return the rows of both, and the values of each."""
        after = dict(zip(self.found.rows, found, strict=True)) if found else {}
        before = dict(zip(self.base.rows, base, strict=True)) if base else {}
        rows = [row for row in before if row in after]
        return rows, [before[row] for row in rows], [after[row] for row in rows]

    def change(self, column: Callable[[SetResult], Sequence[float | None]]) -> Any:
        """Return the estimate of the mean difference between the model and the base."""
        _, before, after = self._both(column(self.found), column(self.base))
        differences = [
            None if old is None or new is None else new - old for old, new in zip(before, after, strict=True)
        ]
        return estimate(differences, samples_per_problem=1)

    def gained_and_lost(self) -> dict[str, Any]:
        """Return the rows that only one of the two has solved, and the share of each kind."""
        rows, before, after = self._both(self.found.solved, self.base.solved)
        statistics: dict[str, Any] = {}
        is_known = [None not in pair for pair in zip(before, after, strict=True)]
        for name, places in zip(("gained", "lost"), gained_and_lost(before, after), strict=True):
            of_kind = set(places)
            shares = [float(place in of_kind) if known else None for place, known in enumerate(is_known)]
            share = estimate(shares, samples_per_problem=1)
            statistics[name] = {"rows": [rows[place] for place in places], "share": vars(share)}
        return statistics
