"""Draw the next token with random numbers that can be computed again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardes.config.schema import RolloutConfig
from shardes.noise import sampling_uniforms


@dataclass(frozen=True)
class TokenSampler:
    """Sampler of tokens at a temperature, by given random numbers.

    The draws are a pure function of seed, iteration, prompt, sample, turn and position, so that all members
    are judged with the same random numbers, on any rank and in any order.

    Attributes:
        seed: Seed of the run, ``es.seed``.
        temperature: Divisor of the logits; above 0.
        top_k: Number of the most likely tokens that are drawn from; None: all.
        top_p: Probability that the tokens drawn from, the most likely ones, reach together; 1: all tokens.
    """

    seed: int
    temperature: float
    top_k: int | None = None
    top_p: float = 1.0

    def uniforms(
        self,
        *,
        iteration: int,
        prompts: Sequence[int],
        samples: Sequence[int],
        num_tokens: int,
        turn: int = 0,
    ) -> torch.Tensor:
        """Compute the random numbers by which the tokens of some answers are drawn.

        Args:
            iteration: Number of updates of the weights.
            prompts: Index of each answer's prompt in the batch of problems.
            samples: Index of each answer among those to its prompt.
            num_tokens: Largest number of tokens of an answer.
            turn: Number of answers that the model has given before in the same episodes.

        Returns:
            Uniform numbers, float32 in [0, 1) of shape [answers, num_tokens], on the CPU.
        """
        rows = [
            sampling_uniforms(
                seed=self.seed,
                iteration=iteration,
                prompt=prompt,
                sample=sample,
                count=num_tokens,
                turn=turn,
            )
            for prompt, sample in zip(prompts, samples, strict=True)
        ]
        return torch.from_numpy(np.stack(rows))

    def draw(self, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        """Draw one token for each row, by inverting the cumulative distribution.

        Args:
            logits: Logits of the next token, floating point of shape [rows, vocabulary].
            uniforms: Random number of each row, float32 in [0, 1) of shape [rows]; below 0 for the most
                likely token.

        Returns:
            Token ids, int64 of shape [rows].
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
        drawn = (place if order is None else order.gather(1, place)).squeeze(1)
        return torch.where(uniforms < 0, logits.argmax(dim=-1), drawn)


def make_sampler(settings: RolloutConfig, *, seed: int) -> TokenSampler | None:
    """Return the sampler that the section ``rollout`` describes; None at temperature 0 (greedy decoding)."""
    if settings.temperature == 0:
        return None
    return TokenSampler(seed, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
