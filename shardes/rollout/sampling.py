"""Choosing the next token: the most likely one, or one drawn with random numbers that replay."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardes.config.schema import RolloutConfig
from shardes.noise import sampling_uniforms


@dataclass(frozen=True)
class TokenSampler:
    """How tokens are drawn.

    The draws are a pure function of seed, iteration, prompt, sample and position, so that all members are
    judged with the same random numbers, whatever rank answers and in whichever order.

    Attributes:
        seed: The run's.
        temperature: Divides the logits; above 0.
        top_k: Only that many of the most likely tokens are drawn from; None: all.
        top_p: Only the most likely tokens that together reach this probability are.
    """

    seed: int
    temperature: float
    top_k: int | None = None
    top_p: float = 1.0

    def uniforms(
        self, *, iteration: int, prompts: Sequence[int], samples: Sequence[int], num_tokens: int
    ) -> torch.Tensor:
        """The random numbers of some answers.

        Args:
            iteration: The weights' number of updates.
            prompts: Each answer's prompt, as its place in the batch of problems.
            samples: Each answer's place among those of its prompt.
            num_tokens: The longest answer.

        Returns:
            float32 in [0, 1) of shape [answers, num_tokens], on the CPU.
        """
        rows = [
            sampling_uniforms(
                seed=self.seed, iteration=iteration, prompt=prompt, sample=sample, count=num_tokens
            )
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        return torch.from_numpy(np.stack(rows))

    def draw(self, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """One token for each row, by inverting the cumulative distribution.

        Args:
            logits: [rows, vocabulary].
            uniforms: float32 in [0, 1) of shape [rows].

        Returns:
            int64 of shape [rows].
        """
        scaled = logits.float() / self.temperature
        order = None
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            scaled, order = scaled.topk(self.top_k, dim=-1)
        elif self.top_p < 1:
            scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        cumulative = scaled.softmax(dim=-1).double().cumsum(dim=-1)
        total = cumulative[:, -1:]
        if self.top_p < 1:
            # Sorted: the tokens before which less than top_p has been reached.
            num_kept = (cumulative < self.top_p * total).sum(dim=-1, keepdim=True) + 1
            total = cumulative.gather(1, num_kept.clamp(max=cumulative.shape[-1]) - 1)
        threshold = uniforms.double()[:, None] * total
        place = (cumulative <= threshold).sum(dim=-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
        return (place if order is None else order.gather(1, place)).squeeze(1)


def make_sampler(settings: RolloutConfig, *, seed: int) -> TokenSampler | None:
    """Return what draws tokens by the settings; None if the most likely ones are taken."""
    if settings.temperature == 0:
        return None
    return TokenSampler(seed, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
