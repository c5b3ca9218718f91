"""The schema of the section ``es``, the algorithm. docs/toolbox.md says what each key is for."""

import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from shardes.config.section import Section
from shardes.noise.kinds.registry import KindName


class RacingConfig(Section):
    """A race of an iteration's members: some stop before they have answered all problems."""

    rounds: int = Field(default=3, ge=2, lt=2**16)
    """Number of portions that an iteration's answers are asked in. A portion is made of whole micro-batches,
    so there must be as many of these (``rollout.micro_batch_size``)."""
    keep: float = Field(default=0.5, gt=0, lt=1)
    """Part of the racing members that goes on after each portion, at least two: those whose rewards are
    farthest from the middle, as many of the best as of the worst. With ``es.antithetic`` it is a part of the
    pairs: those whose two members differ most."""
    tolerance: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How much racing may change an update, as a part of the length that it has when all members answer
    everything. More members go on where stopping them is expected to change more. null: no limit."""

    def num_kept(self, count: int) -> int:
        """Return how many of so many members, or pairs, go on: at least one at each end of the ranking."""
        return min(count, max(2, math.ceil(self.keep * count - 1e-9)))


class EsConfig(Section):
    """The algorithm (Qiu et al. 2025, arXiv 2509.24372)."""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """The key of all noise and of the order of the data."""
    iterations: int = Field(gt=0, lt=2**32)
    """Number of iterations, each of which ends with an update."""
    population: Annotated[int, Field(ge=2, lt=2**24)] | dict[int, Annotated[int, Field(ge=2, lt=2**24)]] = 30
    """Members evaluated per iteration; or, by the iteration from which on it holds, beginning with 0."""
    antithetic: bool = False
    """Have members come in pairs that look in opposite directions. A pair has one direction, so the update
    computes half the noise. The population must be even."""
    noise: KindName = "gaussian"
    """``gaussian``: standard normal, as in the paper. ``rademacher``: +1 or -1, much cheaper to compute.
    ``low_rank``: of a matrix the product of two normal matrices of ``rank`` columns, of a vector standard
    normal; many members can then be evaluated in one forward (``rollout.members_per_forward``)."""
    rank: int = Field(default=1, gt=0, lt=2**16)
    """Columns of the factors of ``noise: low_rank``. The element's variance is 1 for every rank."""
    subspaces: int = Field(default=1, gt=0, lt=2**16)
    """Number of parts into which each iteration divides the parameters, in random blocks of elements. A
    member perturbs one of them alone, by sigma times the root of this number, so that perturbing and updating
    take as many times less. Not for ``low_rank``."""
    noise_reuse: int = Field(default=1, gt=0)
    """Number of iterations for which directions stay the same before new ones are drawn."""
    member_reuse: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    """Use the last iteration's members again, weighted by how likely they are around the centre of now. The
    number is the least effective number of them, as a share of all: weights that leave fewer are flattened
    until they leave so many. 0: the density ratios as they are; 1: equal weights. null: members are used
    once."""
    prompts_per_member: int | None = Field(default=None, gt=0)
    """Number of the iteration's problems that a member answers; members take turns, the two of an antithetic
    pair answer the same. null: every member answers all."""
    racing: RacingConfig | None = None
    """Have members answer the problems in portions, and stop those early that weigh little in the update;
    what they were not asked is estimated (docs/toolbox.md). null: every member answers everything."""
    sigma: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Scale of the noise on the weights."""
    sigma_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Curve on which sigma goes from ``sigma`` to ``final_sigma`` over the iterations."""
    final_sigma: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Sigma after the last iteration; null: it stays constant."""
    shaping: Literal["zscore", "centered_rank", "none", "per_prompt"] = "zscore"
    """Transformation of rewards for the update. ``zscore``: their distance from the mean in standard
    deviations, as in the paper. ``centered_rank``: their ranks, from -0.5 to 0.5. ``none``: themselves.
    ``per_prompt``: their distance from the mean of their prompt, over one standard deviation of all of these
    distances."""
    clip_shaped: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest magnitude of a shaped reward, to which larger ones are clipped. null: no limit."""
    alpha: float | Literal["auto"] = "auto"
    """Step size; ``auto`` is half of the iteration's sigma, as in the paper."""
    alpha_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """``linear`` lowers alpha from its value to 0 over the iterations, ``cosine`` along half a cosine."""
    warmup_iterations: int = Field(default=0, ge=0)
    """Number of iterations, from the first on, over which alpha rises to its value."""
    step_rule: Literal["none", "reliability"] = "none"
    """Rule by which the measured signal shortens steps. ``reliability``: alpha times the root of the share of
    the variance of members' rewards that other problems would confirm, estimated over eight iterations. It
    is at least a tenth."""
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """Rule that makes a step of the gradient. ``sgd``: alpha times the gradient, as in the paper.
    ``momentum``: a share of the steps before is added; 4 more bytes a parameter. ``adam``: its moments
    decide, elementwise; 8 more bytes a parameter. With ``weight_decay``, ``adam`` is what is called AdamW."""
    momentum: float = Field(default=0.9, gt=0, lt=1)
    """Share of a step that is added to the next one, for ``momentum``."""
    adam_betas: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2
    )
    """Shares of the first and the second moment that an iteration keeps, for ``adam``."""
    adam_epsilon: float = Field(default=1e-8, ge=1e-45, allow_inf_nan=False)
    """Added to the root of the second moment, for ``adam``, in float32, where less than 1e-45 would be 0."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Rate of decay: an update takes away alpha times this part of the distance from ``decay_towards``."""
    decay_towards: Literal["zero", "base"] = "zero"
    """``base``: the base model's weights, against forgetting; they are read again from their file in every
    update."""
    max_update_norm: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Largest length of what an iteration adds to the weights (with ``momentum``, to the momentum), as
    expected from its coefficients; longer ones are shortened. Not for ``adam``. null: no limit."""
    min_valid_fraction: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False)
    """Part of the population that must have a reward, or the iteration fails: rewards may fail, and logits
    may not be finite. One member is needed in any case."""
    trainable: list[str] = [".*"]
    """Patterns of the parameters that are trained: regular expressions for whole names as in the checkpoint.
    The last one that matches a name decides: with a ``!`` before it the parameter is frozen, otherwise
    trained. What none matches is frozen. Frozen parameters get no noise and take no master weights. The noise
    of the others does not depend on the choice."""

    @property
    def num_optimizer_states(self) -> int:
        """Return the number of float32 numbers that the optimizer keeps for each weight."""
        return {"sgd": 0, "momentum": 1, "adam": 2}[self.optimizer]

    def alpha_at(self, sigma: float) -> float:
        """Return the step size that goes with a scale of the noise, not yet scheduled."""
        return sigma / 2 if self.alpha == "auto" else self.alpha

    @field_validator("rank")
    @classmethod
    def _rank_is_for_low_rank(cls, value: int, info: ValidationInfo) -> int:
        if value != 1 and info.data.get("noise", "low_rank") != "low_rank":
            raise ValueError(
                f"got {value}, but es.noise is {info.data['noise']}, which has no rank; "
                "set es.noise: low_rank"
            )
        return value

    @field_validator("subspaces")
    @classmethod
    def _subspaces_have_elements(cls, value: int, info: ValidationInfo) -> int:
        if value != 1 and info.data.get("noise", "gaussian") == "low_rank":
            raise ValueError(
                f"got {value}, but es.noise is low_rank, whose matrices are products of factors, of which no "
                "block of elements can be left out; set es.noise: gaussian or rademacher, or leave "
                "es.subspaces at 1"
            )
        return value

    @field_validator("racing", mode="before")
    @classmethod
    def _racing_has_keys(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, dict | RacingConfig):
            raise ValueError(f"got {value!r}; give its keys, as in {{rounds: 3, keep: 0.5}}, or null")
        return value

    @field_validator("trainable")
    @classmethod
    def _trainable_are_patterns(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern.removeprefix("!"))
            except re.error as error:
                raise ValueError(f"got {value}; {pattern!r} is no regular expression: {error}") from None
        return value

    @field_validator("alpha")
    @classmethod
    def _alpha_is_positive(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0 < value < float("inf"):
            raise ValueError(f"must be a finite number above 0, or 'auto' (sigma / 2); got {value}")
        return value

    @field_validator("population")
    @classmethod
    def _population_begins_at_0(cls, value: int | dict[int, int]) -> int | dict[int, int]:
        if isinstance(value, dict) and (0 not in value or min(value) < 0):
            raise ValueError(f"got {value}; give the number of members from iteration 0 on, as in {{0: 30}}")
        return value

    @field_validator("antithetic")
    @classmethod
    def _pairs_have_two_members(cls, value: bool, info: ValidationInfo) -> bool:
        population = info.data.get("population", 30)
        sizes = population.values() if isinstance(population, dict) else [population]
        if value and any(size % 2 for size in sizes):
            raise ValueError(f"got true, but es.population is {population}; pairs take an even number")
        return value

    @model_validator(mode="after")
    def _every_key_does_something(self) -> Self:
        """Refuse what would be ignored: it was meant to be something else."""
        if (self.final_sigma is None) != (self.sigma_schedule == "constant"):
            raise ValueError(
                f"final_sigma is {self.final_sigma} and sigma_schedule {self.sigma_schedule}; give both, or "
                "neither"
            )
        for key, optimizer in (("momentum", "momentum"), ("adam_betas", "adam"), ("adam_epsilon", "adam")):
            if self.optimizer != optimizer and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} is {getattr(self, key)}, which only optimizer: {optimizer} has a use for; the "
                    f"optimizer is {self.optimizer}"
                )
        if self.optimizer == "adam" and self.max_update_norm is not None:
            raise ValueError(
                f"max_update_norm is {self.max_update_norm}, but adam's steps do not depend on the length of "
                "the gradient; remove it, and lower alpha instead"
            )
        if self.optimizer == "adam" and self.adam_betas[0] ** 2 >= self.adam_betas[1]:
            raise ValueError(
                f"adam_betas are {list(self.adam_betas)}; the second must be larger than the square of the "
                "first, or steps have no bound"
            )
        sizes = self.population.values() if isinstance(self.population, dict) else [self.population]
        units = [size // 2 if self.antithetic else size for size in sizes]
        if self.racing is not None and all(self.racing.num_kept(count) == count for count in units):
            raise ValueError(
                f"racing.keep is {self.racing.keep}, which keeps all of {max(units)} "
                f"{'pairs' if self.antithetic else 'members'}, so nobody would ever stop; give less, or a "
                "larger population"
            )
        if self.racing is not None and self.prompts_per_member is not None:
            raise ValueError(
                f"prompts_per_member is {self.prompts_per_member}, but racing compares members on the same "
                "problems; set prompts_per_member or racing to null"
            )
        if self.racing is not None and self.shaping == "per_prompt":
            raise ValueError(
                "shaping is per_prompt, which compares the members that answered a prompt, but after a round "
                "of racing only the best and the worst do; use shaping: zscore or centered_rank, or set "
                "racing to null"
            )
        if self.member_reuse is not None:
            for key, found, why in (
                ("noise_reuse", self.noise_reuse, "has the same directions twice already"),
                ("subspaces", self.subspaces, "keeps members in parts that the centre has left since"),
                ("optimizer", self.optimizer, "repeats all iterations' members already"),
                ("sigma_schedule", self.sigma_schedule, "makes the densities of two iterations incomparable"),
            ):
                if found != type(self).model_fields[key].default:
                    raise ValueError(
                        f"member_reuse is {self.member_reuse}, but {key} is {found}, which {why}; remove one "
                        "of the two"
                    )
        if self.racing is not None and self.step_rule != "none":
            raise ValueError(
                f"step_rule is {self.step_rule}, which measures members on problems that all of them answer, "
                "but racing stops some; remove one of the two"
            )
        if self.step_rule != "none" and self.prompts_per_member is not None:
            raise ValueError(
                f"step_rule is {self.step_rule}, which compares members on the same problems, but "
                f"prompts_per_member is {self.prompts_per_member}; remove one of the two"
            )
        if self.decay_towards != "zero" and self.weight_decay == 0:
            raise ValueError("decay_towards is base, but weight_decay is 0; set both, or neither")
        alpha = self.alpha_at(max(self.sigma, self.final_sigma or 0.0))
        if alpha * self.weight_decay > 1:
            raise ValueError(
                f"weight_decay is {self.weight_decay}, which times alpha {alpha} is more than all there is; "
                f"give at most {1 / alpha:g}"
            )
        return self
