"""Prompts as tokens, cut into micro-batches from the data alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from shardes.errors import UserError
from shardes.tasks.base import Prompt


@dataclass(frozen=True)
class MicroBatch:
    """Prompts that go through the model together, padded on the left.

    Attributes:
        rows: Which prompts, as indices into the sequence that was cut.
        input_ids: int64 of shape [rows, length].
        attention_mask: int64 of the same shape; 0 on padding.
    """

    rows: tuple[int, ...]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(
            self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device)
        )


def tokenize(prompt: Prompt, tokenizer: Any) -> list[int]:
    """The tokens of a prompt; chat messages go through the tokenizer's chat template.

    Raises:
        UserError: Chat messages, but the tokenizer has no template; or a prompt of no tokens.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise UserError(
            "task: the prompts are chat messages, but the model's tokenizer has no chat template; use an "
            "instruct model, or prompts of plain text"
        )
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    if not ids:
        raise UserError(f"task: the prompt {prompt!r} has no tokens; give every problem a non-empty prompt")
    return list(ids)


def compose(prompts: Sequence[list[int]], *, micro_batch_size: int, pad_id: int) -> list[MicroBatch]:
    """Cuts tokenised prompts, sorted by length (then by index), into micro-batches.

    The cut depends on nothing but its arguments, so the tensors that a forward sees, and with them the bits
    it computes, are the same for every number of ranks.
    """
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    batches = []
    for low in range(0, len(order), micro_batch_size):
        rows = tuple(order[low : low + micro_batch_size])
        width = max(len(prompts[row]) for row in rows)
        input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, width - len(prompts[row]) :] = torch.tensor(prompts[row])
            attention_mask[i, width - len(prompts[row]) :] = 1
        batches.append(MicroBatch(rows, input_ids, attention_mask))
    return batches
