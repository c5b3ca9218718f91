"""Tokenise the prompts of a likelihood task and the completions that may follow them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardes.errors import UserError
from shardes.rollout.batching import tokenize
from shardes.tasks.base import Choices, Prompt, as_text


@dataclass(frozen=True)
class ChoiceSet:
    """Pairs of a prompt and a completion that make up a batch of likelihood problems.

    Attributes:
        prompts: Prompt of each row.
        choices: Completions of each row, and the index of the right one.
        pairs: Token ids of prompt and completion of each pair; the pairs of a row are consecutive.
        first_pairs: Index of each row's first pair, then the total number of pairs; length rows + 1.
    """

    prompts: Sequence[Prompt]
    choices: Sequence[Choices]
    pairs: Sequence[tuple[list[int], list[int]]]
    first_pairs: Sequence[int]


def make_choice_set(
    prompts: Sequence[Prompt], choices: Sequence[Choices], tokenizer: Any, *, max_positions: int | None
) -> ChoiceSet:
    """Tokenise each prompt and its completions.

    Prompt and completion are tokenised apart, so that a prompt's tokens do not depend on the completion. A
    prompt without text becomes the tokenizer's first token (``bos``); where there is none, the completion's
    first token takes its place and is not scored itself.

    Args:
        prompts: Prompt of each row.
        choices: Completions of each row.
        tokenizer: Tokenizer of the model.
        max_positions: Number of positions of the model; None: no limit.

    Raises:
        UserError: A completion has no tokens to score, or more than the model has positions for.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    first_pairs = [0]
    for prompt, choice in zip(prompts, choices, strict=True):
        start = tokenize(prompt, tokenizer) if prompt else []
        if not start and tokenizer.bos_token_id is not None:
            start = [tokenizer.bos_token_id]
        for completion in choice.completions:
            tokens = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
            pair = (start, tokens) if start else (tokens[:1], tokens[1:])
            if not pair[1]:
                raise UserError(
                    f"task: the completion {completion!r} of the prompt {as_text(prompt)[:80]!r} has no "
                    "tokens to score; give every completion some text"
                )
            length = len(pair[0]) + len(pair[1])
            if max_positions is not None and length > max_positions:
                raise UserError(
                    f"task: the prompt {as_text(prompt)[:80]!r} and a completion of it have {length} tokens, "
                    f"but the model has {max_positions} positions (max_position_embeddings); shorten or drop "
                    "them"
                )
            pairs.append(pair)
        first_pairs.append(len(pairs))
    return ChoiceSet(prompts, choices, pairs, first_pairs)
