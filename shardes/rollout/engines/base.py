"""The seam between the algorithm and what answers: engines load members, generate, and score completions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from shardes.config.schema import RolloutConfig
from shardes.distributed.group import Group
from shardes.es.update import Perturbation
from shardes.rollout.batching import LikelihoodBatch, MicroBatch
from shardes.rollout.prompts import PromptBatch


@dataclass(frozen=True)
class Completions:
    """Completions of a micro-batch of prompts.

    Attributes:
        tokens: Token ids of each row, up to and including the one that ended it.
        are_finite: For each row, whether all the logits were by which a token was chosen.
    """

    tokens: list[list[int]]
    are_finite: list[bool]

    @property
    def is_finite(self) -> bool:
        """Return whether the logits of all rows were finite."""
        return all(self.are_finite)


EngineOutput = Completions | list[torch.Tensor]
"""Completions of a ``MicroBatch``; or, of a ``LikelihoodBatch``, the log-likelihoods of each row's tokens."""


class Engine(ABC):
    """Answers prompts with the members, or with the centre, that are loaded.

    An engine is made with the keyword arguments ``backend``, ``weights``, ``mesh``, ``tokenizer``,
    ``settings`` (the section ``rollout``), ``seed`` and ``timer``, and is named in ``engines/registry.py``.

    ``begin`` comes first, then any number of loads, each followed by any number of micro-batches.

    Attributes:
        members_per_forward: Members that are loaded together, at most.
        is_exact: Whether tokens depend on nothing but the weights and the micro-batch: then a run gives the
            same bytes on every number of ranks. It is recorded in the journal's header.
    """

    members_per_forward: int
    is_exact: bool

    @property
    def facts(self) -> dict[str, Any]:
        """Return what answers depend on besides weights and prompts, JSON-able; a resumed run has the same.

        It is recorded in the journal's header, with the engine's name.
        """
        return {}

    @property
    @abstractmethod
    def group(self) -> Group:
        """Return the ranks that load and answer together; known once ``begin`` was called."""

    @property
    def forward_is_collective(self) -> bool:
        """Return whether the ranks of a replica must generate and score equally often."""
        return False

    @property
    def ranks_per_forward(self) -> int:
        """Return how many ranks compute parts of the same forward, and must be given the same micro-batch."""
        return 1

    @property
    def num_loads(self) -> int:
        """Return how many ranks of ``group`` load members of their own, in step; 1: all load the same."""
        return 1

    @property
    @abstractmethod
    def gather(self) -> str | None:
        """Return how weights are gathered, as ``rollout.gather`` names it; None while that is not known."""

    @property
    def can_step_down(self) -> bool:
        """Return whether there is a way to go on that takes less memory."""
        return False

    @property
    def num_prefilled_tokens(self) -> int:
        """Return how many tokens of prompts were computed so far, rather than known; 0: not counted."""
        return 0

    def expect_cohorts(self, count: int, *, size: int, max_context: int) -> None:  # noqa: B027
        """Learn how much is asked again; ``bytes_for`` then counts what is kept for it.

        Args:
            count: Number of cohorts that this rank has under way at the same time, and that are kept at most.
            size: Number of episodes of the largest cohort, on any rank.
            max_context: Largest number of tokens of an episode, its last answer included.
        """

    @abstractmethod
    def begin(self, num_bytes: int) -> None:
        """Make members of the current centre loadable; a collective of all ranks.

        Args:
            num_bytes: The most that a micro-batch takes besides weights, see ``bytes_for``.
        """

    def check(self, *, sigma: float) -> None:  # noqa: B027 - most engines load members as weights
        """Compare members as they are loaded with members as weights; a collective of all ranks.

        Args:
            sigma: Scale of the noise of the members that are compared.

        Raises:
            UserError: They compute different logits.
        """

    @abstractmethod
    def load(self, members: Sequence[Perturbation]) -> None:
        """Load members, as many as share a forward; a collective of ``group`` where weights are gathered.

        Row i of a micro-batch of several members is answered by member ``i % len(members)``.
        """

    @abstractmethod
    def load_centre(self) -> None:
        """Load the centre; otherwise as ``load``."""

    def expect(self, batches: Sequence[MicroBatch | LikelihoodBatch]) -> None:  # noqa: B027
        """Learn which micro-batches will be asked next, in this order; an engine may begin with them all.

        Args:
            batches: Micro-batches, on this rank's device; the same objects are passed to ``generate`` or
                ``log_likelihood``.
        """

    @abstractmethod
    def generate(self, batch: MicroBatch, *, prompts: PromptBatch) -> Completions:
        """Generate a completion of each prompt by each member that is loaded, side by side.

        A batch of a cohort begins with what its episodes have been asked and have answered since the load,
        which need not be computed again, and may be changed all the same. Where forwards are collectives,
        ranks ask batches of cohorts at the same time, and one that has none any more asks another batch as
        ``IDLE_COHORT``.

        Args:
            batch: The prompts, on this rank's device.
            prompts: The batch of problems that they are a part of; the same for all calls after a load.
        """

    @abstractmethod
    def log_likelihood(self, batch: LikelihoodBatch) -> list[torch.Tensor]:
        """Return the log-likelihoods of the tokens of each completion by each member, side by side.

        Args:
            batch: Prompts and completions, on this rank's device.

        Returns:
            float32 of shape [tokens of the completion], one for each row.
        """

    @abstractmethod
    def bytes_for(self, batch: MicroBatch | LikelihoodBatch) -> int:
        """Return about how many bytes a micro-batch takes besides weights.

        For a batch of a cohort, with what is kept of all cohorts, at the lengths of this one.
        """

    @abstractmethod
    def fits(self, batch: MicroBatch | LikelihoodBatch, *, prompts: PromptBatch) -> bool:
        """Return whether this rank has the memory for a micro-batch; a collective of ``group``."""

    def step_down(self) -> None:
        """Go on in a way that takes less memory; a collective of all ranks."""
        raise NotImplementedError("can_step_down says that there is none")

    def release(self) -> None:  # noqa: B027 - an engine need not keep anything
        """Free what is kept between micro-batches."""

    @abstractmethod
    def with_settings(self, settings: RolloutConfig) -> Self:
        """Return an engine over the same weights that answers by other settings."""
