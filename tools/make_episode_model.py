"""Make the model of the quickstart of episodes: configs/environments/guess_number/model.

The model guesses a number from 10 to 99 that is in a given range, and is told "higher" or "lower" after each
guess. It was trained on episodes in which each guess is, by chance, one of two: 10, whatever has been said
(48%); or the middle of what is left (52%), of which a model this small is never quite sure. Decoded greedily,
it nearly always says 10, in all its six guesses; bisecting is latent.

The ranges of the first NUM_HELDOUT rows are not trained on, here or by the configuration, which holds them
out. Everything is a function of the constants below: on one machine and with one version of torch, a second
run writes the same bytes.

    python tools/make_episode_model.py
"""

import math
import shutil
import tempfile
from pathlib import Path

import click
import torch
from make_quickstart_model import BATCH_SIZE, EOS_ID, PAD_ID, make_model, train_model
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from shardes.environments.builtin.guess_number import make_puzzle, num_ranges

SEED = 0
NUMBERS, SIZES = (10, 99), (16, 32)
NUM_GUESSES = 6
NUM_HELDOUT = 256
BISECTED_SHARE = 0.52
NUM_STEPS = 1200
# Size of the numbers' first embeddings; other tokens have 0.05.
NUMBER_SCALE = 0.15

USER, MODEL = "<user>", "<model>"
WORDS = (USER, MODEL, "higher", "lower", *map(str, range(NUMBERS[0], NUMBERS[1] + 1)))
CHARACTERS = "0123456789-?"
VOCABULARY_SIZE = 128
# "<user>10-59<model>", then "34<eos>", then "<user>higher<model>35<eos>" and so on.
PROMPT_LENGTH, TURN_LENGTH = 5, 5
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}<eos>"
    "{% else %}<user>{{ message.content }}{% endif %}"
    "{% if message.role != 'assistant' and (add_generation_prompt or not loop.last) %}<model>{% endif %}"
    "{% endfor %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level BPE tokenizer without merges, with one token for each number and each word."""
    tokens = ["<pad>", "<eos>", *WORDS, *CHARACTERS]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        unk_token="<pad>",
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )
    tokenizer.add_tokens(list(WORDS))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class Corpus:
    """Corpus of which batches of episodes are drawn, as token ids.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        indices = range(NUM_HELDOUT, num_ranges(numbers=NUMBERS, sizes=SIZES))
        puzzles = [make_puzzle(index, numbers=NUMBERS, sizes=SIZES) for index in indices]
        self.ends = torch.tensor([[puzzle.low, puzzle.high] for puzzle in puzzles])
        vocabulary = tokenizer.get_vocab()
        self.user, self.model, self.higher, self.lower, self.dash = (
            vocabulary[token] for token in (USER, MODEL, "higher", "lower", "-")
        )
        self.offset = vocabulary[str(NUMBERS[0])] - NUMBERS[0]

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Draw ``BATCH_SIZE`` episodes, of uniform ranges and numbers.

        Returns:
            Token ids int64 of shape [episodes, tokens].
        """
        which, secret, *ways = torch.rand(
            2 + NUM_GUESSES, BATCH_SIZE, generator=generator, dtype=torch.float64
        )
        start, end = self.ends[(which * len(self.ends)).long()].unbind(1)
        number = start + (secret * (end - start + 1)).long()
        low, high = start, end
        is_over = torch.zeros_like(low, dtype=torch.bool)
        constant = torch.zeros_like
        said = [constant(low) + self.user, low + self.offset, constant(low) + self.dash, high + self.offset]
        said.append(constant(low) + self.model)
        for way in ways:
            guess = ((low + high) // 2).where(way < BISECTED_SHARE, NUMBERS[0])
            is_higher = number > guess
            answer = torch.where(is_higher, self.higher, self.lower)
            words = [guess + self.offset, constant(low) + EOS_ID]
            said += [word.masked_fill(is_over, PAD_ID) for word in words]
            is_over = is_over | (guess == number)
            words = [constant(low) + self.user, answer, constant(low) + self.model]
            said += [word.masked_fill(is_over, PAD_ID) for word in words]
            low = torch.maximum(low, guess + 1).where(is_higher, low)
            high = torch.minimum(high, guess - 1).where(~is_higher, high)
        return torch.stack(said, dim=1)[:, : PROMPT_LENGTH + TURN_LENGTH * NUM_GUESSES - 3]


def arrange_numbers(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """Give neighbouring numbers embeddings that are alike, so that a model this small learns to bisect."""
    first, last = NUMBERS
    weight = model.get_input_embeddings().weight
    frequencies = torch.linspace(0, math.pi / 2, weight.shape[1] // 2)
    angles = torch.arange(first, last + 1)[:, None] * frequencies
    start = tokenizer.get_vocab()[str(first)]
    with torch.no_grad():
        weight[start : start + len(angles)] = (
            NUMBER_SCALE * math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=1)
        )


def is_guess(place: torch.Tensor) -> torch.Tensor:
    """Return whether the tokens at these places are the model's."""
    return (place - PROMPT_LENGTH) % TURN_LENGTH < 2


@click.command(help=__doc__)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).parent.parent / "configs" / "environments" / "guess_number",
    help="Directory to make; model/ in it is replaced.",
)
def main(out: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = make_tokenizer()
    model = make_model(seed=SEED, vocabulary_size=VOCABULARY_SIZE)
    arrange_numbers(model, tokenizer)
    train_model(
        model,
        Corpus(tokenizer).draw,
        num_steps=NUM_STEPS,
        prompt_length=PROMPT_LENGTH,
        seed=SEED,
        is_answer=is_guess,
    )
    out.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=out))
    try:
        model.save_pretrained(temporary / "model")
        tokenizer.save_pretrained(temporary / "model")
        # A directory cannot be renamed over one that has files.
        shutil.rmtree(out / "model", ignore_errors=True)
        (temporary / "model").replace(out / "model")
    finally:
        shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
