"""Strategy: the directions of an iteration's members, and the update from their rewards."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shardes.config.schema import EsConfig
from shardes.es.member import MemberResult
from shardes.es.optimizers import Adam, AdamVersion1, Decay, Momentum, Optimizer, PlainStep
from shardes.es.reuse import Reused, reuse
from shardes.es.schedules import between, factor
from shardes.es.shaping import RewardTable, shape
from shardes.es.step_rule import WINDOW, reliability, step_factor
from shardes.es.update import UPDATE_VERSION, Perturbation, Update
from shardes.noise.parts import part_of_direction


class Strategy:
    """The algorithm as pure functions of the iteration and of members' results; equal on every rank.

    Args:
        settings: Section ``es`` of the configuration.
        num_elements: Number of trained weights.
    """

    def __init__(self, settings: EsConfig, *, num_elements: int) -> None:
        self._settings = settings
        self._optimizer = optimizer_of(settings)
        self._num_elements = num_elements

    def num_members(self, iteration: int) -> int:
        """Return the number of members of an iteration."""
        population = self._settings.population
        if isinstance(population, int):
            return population
        return population[max(first for first in population if first <= iteration)]

    def sigma(self, iteration: int) -> float:
        """Return the scale of the noise."""
        settings = self._settings
        return between(
            settings.sigma,
            settings.sigma if settings.final_sigma is None else settings.final_sigma,
            schedule=settings.sigma_schedule,
            iteration=iteration,
            num_iterations=settings.iterations,
        )

    def alpha(self, iteration: int) -> float:
        """Return the step size."""
        settings = self._settings
        return settings.alpha_at(self.sigma(iteration)) * factor(
            settings.alpha_schedule,
            iteration=iteration,
            num_iterations=settings.iterations,
            warmup_iterations=settings.warmup_iterations,
        )

    def perturbation(self, member: int, *, iteration: int) -> Perturbation:
        """Return a member's direction and signed sigma; antithetic pairs 2n, 2n + 1 differ in the sign."""
        sigma, noise_iteration = self.sigma(iteration), self._noise_iteration(iteration)
        if not self._settings.antithetic:
            return Perturbation(noise_iteration, member, sigma)
        return Perturbation(noise_iteration, member // 2, -sigma if member % 2 else sigma)

    def in_order(self, members: Iterable[int]) -> list[int]:
        """Return members in the order in which they are evaluated, those that perturb the same part in a row.

        No result depends on it: between two such members, nothing has to be restored.
        """
        num_parts, share = self._settings.subspaces, 2 if self._settings.antithetic else 1
        return sorted(members, key=lambda member: (part_of_direction(member // share, num_parts), member))

    def _noise_iteration(self, iteration: int) -> int:
        """Return the first of the iterations that share this iteration's directions."""
        return iteration - iteration % self._settings.noise_reuse

    def problems_of(self, member: int, *, num_problems: int) -> list[int] | None:
        """Return the indices of the problems that a member answers; None: all of the iteration's.

        Members take turns in the order of the batch, so that every problem is answered about equally often;
        the two of an antithetic pair answer the same.
        """
        count = self._settings.prompts_per_member
        if count is None or count >= num_problems:
            return None
        turn = member // 2 if self._settings.antithetic else member
        return [(turn * count + place) % num_problems for place in range(count)]

    def shaped(
        self,
        rewards: Sequence[float | None],
        results: Sequence[MemberResult],
        *,
        weights: Sequence[float] | None = None,
    ) -> list[float]:
        """Compute the shaped rewards of all members of an iteration, in order.

        Args:
            rewards: Rewards by the rule for failed rewards; None for excluded members.
            results: Results of the same members.
            weights: Weight of each of the iteration's problems; None: all weigh the same.
        """
        settings = self._settings
        table = reward_table(results) if settings.shaping == "per_prompt" else None
        of_prompts: Mapping[Hashable, float] | None = None if weights is None else dict(enumerate(weights))
        return shape(
            rewards, how=settings.shaping, clip=settings.clip_shaped, table=table, weights=of_prompts
        )

    def alpha_factor(
        self, stats: Mapping[str, float | None], *, past: Sequence[Mapping[str, Any]]
    ) -> tuple[float, dict[str, float | None]]:
        """Return the factor of alpha that ``step_rule`` finds, and what it measured, by name.

        Args:
            stats: ``reward_stats`` of the iteration's members.
            past: Records of the updates before, oldest first; at least the last ``WINDOW - 1``, or all.
        """
        if self._settings.step_rule == "none":
            return 1.0, {}
        last = [record["instruments"].get("reward_snr") for record in past][-(WINDOW - 1) :]
        found = reliability([*last, stats["reward_snr"]])
        return step_factor(found), {"reward_reliability": found}

    @property
    def reuses_members(self) -> bool:
        """Return whether the next iteration will want to know what this one's members earned."""
        return self._settings.member_reuse is not None

    def reused(self, *, past: Sequence[Mapping[str, Any]]) -> Reused | None:
        """Weigh the last iteration's members for the estimate of now; None if they are not used again.

        Args:
            past: Records of the updates before, oldest first; at least the last one, if there is any.
        """
        share, last = self._settings.member_reuse, past[-1] if past else {}
        shaped = last.get("shaped", [])
        if share is None or not any(shaped):
            return None
        members = [self.perturbation(n, iteration=last["iteration"]) for n in range(len(shaped))]
        # d * c_m / sigma, with the sign of an antithetic pair's second member.
        logs = [self._num_elements * last["coefficients"][p.direction] / p.sigma for p in members]
        return reuse(shaped, logs, least_share=share)

    def update(
        self,
        shaped: Sequence[float],
        *,
        iteration: int,
        alpha_factor: float = 1.0,
        reused: Reused | None = None,
    ) -> Update:
        """Compute the update's coefficients: ``alpha / N * Z_n`` for each direction.

        The noise of an antithetic pair's second member is the negative of the first's, so the difference of
        their shaped rewards counts for the direction. The factor alpha is left to the optimizer where it does
        not belong to the gradient.

        Args:
            shaped: Shaped rewards of all members, in order.
            iteration: Iteration of the members.
            alpha_factor: Factor of alpha, see ``alpha_factor``.
            reused: Members of the iteration before, which count as much as so many members of this one as
                they are effective; None: none.
        """
        alpha = self.alpha(iteration) * alpha_factor
        num_effective = 0.0 if reused is None else reused.effective_members
        scale = self._optimizer.gradient_scale(alpha) / (len(shaped) + num_effective)
        coefficients = self._by_direction(shaped, scale=scale)
        reused_values = [] if reused is None else reused.values
        both = self._clipped(coefficients + self._by_direction(reused_values, scale=scale * num_effective))
        noise_iteration = self._noise_iteration(iteration)
        return Update(
            iteration,
            both[: len(coefficients)],
            alpha,
            None if noise_iteration == iteration else noise_iteration,
            tuple(both[len(coefficients) :]),
        )

    def _by_direction(self, values: Sequence[float], *, scale: float) -> list[float]:
        """Return the coefficients of directions, given a value for each member, as float32 values."""
        if self._settings.antithetic:
            values = [first - second for first, second in zip(values[::2], values[1::2], strict=True)]
        return [float(np.float32(scale * value)) for value in values]

    def _clipped(self, coefficients: list[float]) -> list[float]:
        """Return the coefficients, scaled down if the update is longer than ``max_update_norm``.

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
    """Return the reward of each member for each problem that it answered."""
    tables: list[Mapping[Hashable, float | None]] = []
    for result in results:
        problems = range(len(result.by_problem)) if result.problems is None else result.problems
        tables.append(dict(zip(problems, result.by_problem, strict=True)))
    return tables


def optimizer_of(settings: EsConfig, *, update_version: int = UPDATE_VERSION) -> Optimizer:
    """Return the optimizer that ``es.optimizer`` names.

    Args:
        settings: Section ``es`` of the configuration.
        update_version: Version of the updates that a journal was begun with.
    """
    if settings.optimizer == "momentum":
        return Momentum(settings.momentum)
    if settings.optimizer == "adam":
        first, second = settings.adam_betas
        adam = AdamVersion1 if update_version == 1 else Adam
        return adam((first, second), settings.adam_epsilon)
    return PlainStep()


def decay_of(settings: EsConfig) -> Decay | None:
    """Return the decay that ``es.weight_decay`` asks for; None if it is 0."""
    if settings.weight_decay == 0:
        return None
    return Decay(settings.weight_decay, is_anchored=settings.decay_towards == "base")


def version_of_updates(settings: EsConfig) -> int:
    """Return the version of docs/updates.md that new runs have: the first with all that they need."""
    return 2 if settings.member_reuse is None else 3
