"""Make the addition problems and their model: configs/addition/{model/, train.jsonl, heldout.jsonl}.

A second small task for studies of the algorithm, of the quickstart's kind: the model adds two numbers of
two digits ("37+48=" wants "085"), and the larger part of what it was trained on forgets the carry. Everything
is a function of the constants below.

    python tools/make_addition_model.py
"""

from pathlib import Path
from random import Random

import click
import torch
from make_quickstart_model import (
    BATCH_SIZE,
    make_model,
    make_tokenizer,
    train_model,
    write_rows,
)

SEED = 0
RIGHT_SHARE = 0.45
NUM_STEPS = 400
PROMPT_LENGTH = 6  # "37+48=", one token a character
NUM_HELDOUT, NUM_TRAIN = 400, 1600


def answer(a: int, b: int, *, carries: bool) -> str:
    """Return the sum in three digits, with or without the carry."""
    return f"{a + b:03d}" if carries else f"{(a // 10 + b // 10) % 10 * 10 + (a + b) % 10:03d}"


@click.command(help=__doc__)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).parent.parent / "configs" / "addition",
    help="Directory to write to.",
)
def main(out: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    Random(SEED).shuffle(pairs)
    heldout, train = pairs[:NUM_HELDOUT], pairs[NUM_HELDOUT : NUM_HELDOUT + NUM_TRAIN]
    seen = pairs[NUM_HELDOUT + NUM_TRAIN :]

    tokenizer, model = make_tokenizer(), make_model()
    texts = [f"{a}+{b}={answer(a, b, carries=carries)}<eos>" for a, b in seen for carries in (True, False)]
    ids = torch.tensor(tokenizer(texts)["input_ids"])

    def draw(generator: torch.Generator) -> torch.Tensor:
        which, right = torch.rand(2, BATCH_SIZE, generator=generator, dtype=torch.float64)
        return ids[(which * len(seen)).long() * 2 + (right >= RIGHT_SHARE).long()]

    train_model(model, draw, num_steps=NUM_STEPS, prompt_length=PROMPT_LENGTH)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    for name, part in ("train", train), ("heldout", heldout):
        rows = [{"prompt": f"{a}+{b}=", "sum": answer(a, b, carries=True)} for a, b in part]
        write_rows(out / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
