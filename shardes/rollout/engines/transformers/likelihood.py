"""Scoring given completions without generating: how likely a model finds each of their tokens."""

import torch
from torch import nn

from shardes.models.build import last_positions
from shardes.rollout.batching import LikelihoodBatch


@torch.no_grad()
def log_likelihoods(model: nn.Module, batch: LikelihoodBatch) -> list[torch.Tensor]:
    """Return the log-likelihood of every token of each completion, given all tokens before it; one forward.

    Padding needs no mask: it stands on the right, where a causal model cannot see it.

    Args:
        model: A causal language model.
        batch: What to score, on the model's device.

    Returns:
        For each row, float32 of shape [tokens of its completion], on that device.
    """
    width = batch.input_ids.shape[1]
    first = min(batch.prompt_lengths) - 1  # the position whose logits speak of the first scored token
    kept = last_positions(width - first, width=width, device=batch.input_ids.device)
    logits = model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=kept).logits
    scores = []
    for i, (start, end) in enumerate(zip(batch.prompt_lengths, batch.lengths, strict=True)):
        # Row by row, so that float32 copies of logits stay small.
        row = logits[i, start - 1 - first : end - 1 - first].float()
        wanted = batch.input_ids[i, start:end]
        scores.append(row.gather(1, wanted[:, None]).squeeze(1) - row.logsumexp(dim=1))
    return scores
