"""Tokenise the prompts of a likelihood task and the completions that may follow them."""

from collections.abc import Sequence
from dataclasses import dataclass

from shardes.rollout.encoding import PromptEncoder, Question
from shardes.tasks.base import ChatTemplate, Choices, Prompt


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
    prompts: Sequence[Prompt], choices: Sequence[Choices], encoder: PromptEncoder, *, chat: ChatTemplate
) -> ChoiceSet:
    """Tokenise each prompt and its completions.

    A prompt without text becomes the tokenizer's first token (``bos``); where there is none, the completion's
    first token takes its place and is not scored itself.

    Args:
        prompts: Prompt of each row.
        choices: Completions of each row.
        encoder: Makes tokens of them.
        chat: The template of prompts that are chat messages.

    Raises:
        UserError: A completion has no tokens to score, or more than the model has positions for.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    first_pairs = [0]
    for prompt, choice in zip(prompts, choices, strict=True):
        encoded = encoder.encode(Question(prompt, chat, tuple(choice.completions)))
        pairs += [
            (list(start), list(ids)) for start, ids in zip(encoded.prompts, encoded.completions, strict=True)
        ]
        first_pairs.append(len(pairs))
    return ChoiceSet(prompts, choices, pairs, first_pairs)
