"""Problems as a model is asked them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardes.rewards.scorer import Scorer
from shardes.rollout.aggregate import ChoiceSet
from shardes.rollout.batching import MicroBatch
from shardes.rollout.engines.transformers.decoder import prefill_parts
from shardes.rollout.engines.transformers.likelihood import LikelihoodBatch
from shardes.tasks.base import Prompt, Row


@dataclass(frozen=True)
class PromptBatch:
    """A batch of rows, rendered, tokenised and cut once, then answered by every member.

    Attributes:
        rows: The problems.
        prompts: What is asked, one for each row.
        scorer: Has answers judged.
        samples_per_prompt: Answers to each; answer i is to prompt ``i // samples_per_prompt``.
        micro_batches: Prompts, once for each answer; or, for a likelihood task, prompts with completions.
        prefix: The tokens with which all prompts begin, int64 of shape [1, length]; None if they are few.
        choices: For a likelihood task, what may follow the prompts.
    """

    rows: Sequence[Row]
    prompts: list[Prompt]
    scorer: Scorer
    samples_per_prompt: int
    micro_batches: Sequence[MicroBatch | LikelihoodBatch]
    prefix: torch.Tensor | None = None
    choices: ChoiceSet | None = None

    def num_prefills(self, num_members: int) -> int:
        """The most forwards that a micro-batch of so many members, or fewer, takes before its first token."""
        batches = [batch for batch in self.micro_batches if isinstance(batch, MicroBatch)]
        parts = [prefill_parts(batch.lengths, num_members=num_members) for batch in batches]
        return max(map(len, parts), default=1)

    def fingerprint(self) -> bytes:
        """What the model is asked, token by token: equal for equal problems, templates and tokenizers."""
        return b"".join(batch.input_ids.cpu().numpy().tobytes() for batch in self.micro_batches)
