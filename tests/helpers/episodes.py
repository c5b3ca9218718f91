"""Episodes of several turns, as micro-batches of a cohort."""

import torch

from shardes.rollout.batching import MicroBatch
from tests.helpers.decoding import PAD, VOCABULARY


def turn_batch(prompts, *, cohort):
    """The prompts of a turn by episode, in this order."""
    width = max(map(len, prompts.values()))
    rows = [[PAD] * (width - len(prompt)) + prompt for prompt in prompts.values()]
    masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts.values()]
    return MicroBatch(
        rows=tuple(prompts),
        input_ids=torch.tensor(rows),
        attention_mask=torch.tensor(masks),
        lengths=tuple(map(len, prompts.values())),
        cohort=cohort,
    )


def said(episode, turn):
    """What an episode is told after a turn: 1 to 4 tokens."""
    count = 1 + (3 * episode + turn) % 4
    return [2 + (7 * episode + 5 * turn + 11 * i) % (VOCABULARY - 2) for i in range(count)]


def lives(episode, turn):
    """Whether an episode has this turn: every third has two turns, every fourth one."""
    return turn < (2 if episode % 3 == 2 else 1 if episode % 4 == 3 else 9)


def next_prompts(prompts, answers, *, turn):
    """The prompts of the next turn."""
    return {
        episode: prompt + answer + said(episode, turn)
        for (episode, prompt), answer in zip(prompts.items(), answers, strict=True)
        if lives(episode, turn + 1)
    }
