"""The strategy: how many members look where in an iteration, and how their rewards become an update."""

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from shardes.config.schema import EsConfig
from shardes.es.member import MemberResult
from shardes.es.optimizers import Adam, Decay, Momentum, Optimizer, PlainStep
from shardes.es.schedules import between, factor
from shardes.es.shaping import RewardTable, shape
from shardes.es.update import Perturbation, Update


class Strategy:
    """Pure functions of the iteration and of what members earned: every rank computes the same.

    Args:
        settings: The algorithm.
        num_elements: How many weights are trained.
    """

    def __init__(self, settings: EsConfig, *, num_elements: int) -> None:
        self._settings = settings
        self._optimizer = optimizer_of(settings)
        self._num_elements = num_elements

    def num_members(self, iteration: int) -> int:
        """Members of an iteration."""
        population = self._settings.population
        if isinstance(population, int):
            return population
        return population[max(first for first in population if first <= iteration)]

    def sigma(self, iteration: int) -> float:
        """The scale of the noise."""
        settings = self._settings
        return between(
            settings.sigma,
            settings.sigma if settings.final_sigma is None else settings.final_sigma,
            schedule=settings.sigma_schedule,
            iteration=iteration,
            num_iterations=settings.iterations,
        )

    def alpha(self, iteration: int) -> float:
        """The step size."""
        settings = self._settings
        return settings.alpha_at(self.sigma(iteration)) * factor(
            settings.alpha_schedule,
            iteration=iteration,
            num_iterations=settings.iterations,
            warmup_iterations=settings.warmup_iterations,
        )

    def perturbation(self, member: int, *, iteration: int) -> Perturbation:
        """Where a member looks; those of an antithetic pair, 2n and 2n + 1, look in opposite directions."""
        sigma, noise_iteration = self.sigma(iteration), self._noise_iteration(iteration)
        if not self._settings.antithetic:
            return Perturbation(noise_iteration, member, sigma)
        return Perturbation(noise_iteration, member // 2, -sigma if member % 2 else sigma)

    def _noise_iteration(self, iteration: int) -> int:
        """The first of the iterations that have the same directions."""
        return iteration - iteration % self._settings.noise_reuse

    def problems_of(self, member: int, *, num_problems: int) -> list[int] | None:
        """Which of the iteration's problems a member answers; None: all of them.

        Members take turns in the order of the batch, so that every problem is answered about equally often;
        the two of an antithetic pair answer the same.
        """
        count = self._settings.prompts_per_member
        if count is None or count >= num_problems:
            return None
        turn = member // 2 if self._settings.antithetic else member
        return [(turn * count + place) % num_problems for place in range(count)]

    def shaped(self, rewards: Sequence[float | None], results: Sequence[MemberResult]) -> list[float]:
        """The shaped rewards of all members of an iteration, in order.

        Args:
            rewards: By the rule for failed rewards; None for members that are excluded.
            results: What else is known of them.
        """
        settings = self._settings
        table = reward_table(results) if settings.shaping == "per_prompt" else None
        return shape(rewards, how=settings.shaping, clip=settings.clip_shaped, table=table)

    def update(self, shaped: Sequence[float], *, iteration: int) -> Update:
        """What the weights are moved by: ``alpha / N * Z_n`` for each direction.

        The noise of an antithetic pair's second member is the negative of the first's, so the difference of
        their shaped rewards counts for the direction. The factor alpha is left to the optimizer where it does
        not belong to the gradient.

        Args:
            shaped: Of all members, in order.
            iteration: Which.
        """
        alpha = self.alpha(iteration)
        scale = self._optimizer.gradient_scale(alpha) / len(shaped)
        if self._settings.antithetic:
            shaped = [first - second for first, second in zip(shaped[::2], shaped[1::2], strict=True)]
        coefficients = [float(np.float32(scale * value)) for value in shaped]
        noise_iteration = self._noise_iteration(iteration)
        return Update(
            iteration,
            self._clipped(coefficients),
            alpha,
            None if noise_iteration == iteration else noise_iteration,
        )

    def _clipped(self, coefficients: list[float]) -> list[float]:
        """Shortened to ``max_update_norm``.

        The noise has independent elements of variance 1, so ``sqrt(d * sum c_n^2)`` is the root of the mean
        square of the length of ``sum c_n eps_n``, and from d = 10^5 on, lengths differ from it by less than a
        percent. Nothing has to be computed on the shards for it.
        """
        longest = self._settings.max_update_norm
        if longest is None:
            return coefficients
        norm = math.sqrt(self._num_elements * math.fsum(value**2 for value in coefficients))
        if norm <= longest:
            return coefficients
        return [float(np.float32(value * (longest / norm))) for value in coefficients]


def reward_table(results: Sequence[MemberResult]) -> RewardTable:
    """What each member earned for each of the iteration's problems."""
    tables: list[Mapping[Hashable, float | None]] = []
    for result in results:
        problems = range(len(result.by_problem)) if result.problems is None else result.problems
        tables.append(dict(zip(problems, result.by_problem, strict=True)))
    return tables


def optimizer_of(settings: EsConfig) -> Optimizer:
    """What ``es.optimizer`` means."""
    if settings.optimizer == "momentum":
        return Momentum(settings.momentum)
    if settings.optimizer == "adam":
        first, second = settings.adam_betas
        return Adam((first, second), settings.adam_epsilon)
    return PlainStep()


def decay_of(settings: EsConfig) -> Decay | None:
    """What ``es.weight_decay`` means; None if there is none."""
    if settings.weight_decay == 0:
        return None
    return Decay(settings.weight_decay, is_anchored=settings.decay_towards == "base")
