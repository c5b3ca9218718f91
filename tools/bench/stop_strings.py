"""Measure the host's search for stop texts: in windows of last tokens, and by decoding whole answers.

Answers are pieces of this repository's documents, in a byte-level BPE that is trained on them, and their last
tokens are a stop text. They are checked together as they grow: after every token, as the decode loop does on
a CPU, or after every 8, as on a GPU. Then the end of each is looked for once more, where the loop cuts it.
Both sides must find the same. Seconds are of processor time, as other processes may be at work.

    python tools/bench/stop_strings.py --json benchmarks/stop-strings-cpu.json
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import tokenizers
import torch
import transformers
from common import ROOT, Row, machine_facts, show, write_report
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shardes.rollout.stop_strings import GrowingAnswer, StopStrings

STOPS = ("</answer>", "\n\nQuestion:")
CHECK_EVERY = (1, 8)

Search = Callable[[torch.Tensor, int], int]


def documents() -> str:
    """Return the text that answers are made of."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text() for path in paths)
    return text.replace("</answer>", "")


def trained_tokenizer(text: str) -> Any:
    """Train a byte-level BPE of 8192 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def answers(tokenizer: Any, text: str, *, count: int, length: int) -> torch.Tensor:
    """Return pieces of the text, each ending with a stop text, int64 of shape [count, length]."""
    tokens, end = tokenizer(text)["input_ids"], tokenizer(STOPS[0])["input_ids"]
    length -= len(end)
    stride = (len(tokens) - length) // count
    return torch.tensor([tokens[i * stride :][:length] + end for i in range(count)])


def search_whole(stop: StopStrings) -> tuple[Search, Callable[[list[int]], int | None]]:
    """Return a check that decodes whole answers, and a search for the end that decodes all beginnings."""

    def check(tokens: torch.Tensor, num_tokens: int) -> int:
        return sum(map(stop.is_in, tokens[:, :num_tokens].tolist()))

    def find(tokens: list[int]) -> int | None:
        return next((end for end in range(1, len(tokens) + 1) if stop.is_in(tokens[:end])), None)

    return check, find


def search_windows(stop: StopStrings, num_answers: int) -> tuple[Search, Callable[[list[int]], int | None]]:
    """Return the library's check and search."""
    growing = [GrowingAnswer(stop) for _ in range(num_answers)]
    num_checked = 0

    def check(tokens: torch.Tensor, num_tokens: int) -> int:
        nonlocal num_checked
        new = tokens[:, num_checked:num_tokens].tolist()
        num_checked = num_tokens
        return sum(answer.has_stopped(added) for answer, added in zip(growing, new, strict=True))

    return check, stop.find


def measure(side: str, stop: StopStrings, tokens: torch.Tensor, *, every: int) -> tuple[Row, list[Any]]:
    """Measure one row of the table.

    Returns:
        The row, and the results of the search: the number of answers with a stop text at each check, then
        the number of tokens of each answer.
    """
    check, find = search_whole(stop) if side == "whole" else search_windows(stop, len(tokens))
    start = time.process_time()
    found: list[Any] = [check(tokens, end) for end in range(every, tokens.shape[1] + 1, every)]
    checked = time.process_time()
    found += map(find, tokens.tolist())
    seconds = {"checks": checked - start, "ends": time.process_time() - checked}
    return {"side": side, "check_every_tokens": every, "seconds": seconds}, found


@click.command()
@click.option("--answers", "num_answers", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--tokens", "num_tokens", type=click.IntRange(min=64), default=1024, show_default=True)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write all figures here.",
)
def main(*, num_answers: int, num_tokens: int, json_path: Path | None) -> None:
    """Measure the search for stop texts."""
    facts = machine_facts("cpu") | {
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
        "answers": num_answers,
        "tokens": num_tokens,
        "stops": list(STOPS),
    }
    show(facts)
    text = documents()
    tokenizer = trained_tokenizer(text)
    stop = StopStrings(STOPS, tokenizer)
    tokens = answers(tokenizer, text, count=num_answers, length=num_tokens)
    click.echo("\nchecks every | side    | checks, s | ends, s")
    rows = []
    for every in CHECK_EVERY:
        found = []
        for side in ("whole", "windows"):
            row, what = measure(side, stop, tokens, every=every)
            rows.append(row)
            found.append(what)
            seconds = row["seconds"]
            click.echo(f"{every:>12} | {side:<7} | {seconds['checks']:>9.2f} | {seconds['ends']:>7.2f}")
        if found[0] != found[1]:
            raise click.ClickException("the two sides do not find the same")
    write_report(json_path, facts=facts, rows=rows)


if __name__ == "__main__":
    main()
