"""Greedy decoding over a transformers model and its cache."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import DynamicCache

# Tokens between two looks at whether every row has finished. A look is a host sync, and in lock-step also a
# collective; decoding up to this many tokens too many costs less than looking after each.
TOKENS_PER_CHECK = 4


@torch.no_grad()
def decode_greedily(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    any_rank: Callable[[bool], bool] = bool,
) -> torch.Tensor:
    """The most likely token at each step, until every row has produced an end-of-sequence token.

    Args:
        model: A causal language model.
        input_ids: int64 of shape [rows, length], padded on the left.
        attention_mask: int64 of the same shape.
        max_new_tokens: The longest answer.
        eos_ids: Tokens that end an answer; the answer includes its first one.
        pad_id: Fills what follows it.
        any_rank: Whether the flag is set on any rank. In lock-step every rank goes on until all are done.

    Returns:
        int64 of shape [rows, new tokens], on the device of ``input_ids``.
    """
    cache = DynamicCache(config=model.config)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    ends = torch.tensor(list(eos_ids), dtype=torch.int64, device=input_ids.device)
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    tokens: list[torch.Tensor] = []
    step_ids = input_ids
    while True:
        logits = model(
            input_ids=step_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        token = torch.where(finished, pad_id, logits[:, -1].argmax(dim=-1))
        tokens.append(token)
        finished = finished | torch.isin(token, ends)
        if len(tokens) == max_new_tokens:
            break
        if len(tokens) % TOKENS_PER_CHECK == 0 and not any_rank(not bool(finished.all())):
            break
        step_ids = token[:, None]
        position_ids = position_ids[:, -1:] + 1
        attention_mask = torch.cat([attention_mask, torch.ones_like(step_ids)], dim=1)
    return torch.stack(tokens, dim=1)


def answer_tokens(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    """A row of decoded tokens up to and including its first end-of-sequence token."""
    ends = set(eos_ids)
    length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:length]
