"""Make the quickstart's model and data: configs/quickstart/{model/, train.jsonl, heldout.jsonl}.

The model is small enough to live in the repository and to be fine-tuned on a laptop in a minute, and is
made so that there is something to elicit. It has seen three ways to answer a Countdown problem: an
expression that solves it, in answer tags (30% of the corpus); the numbers joined by plus signs, in tags
(17.5%); the same without tags (52.5%). Decoded greedily it gives the most frequent one, which earns
nothing; solving is latent.

No permutation of a held-out problem is trained on, here or with train.jsonl. Everything is a function of the
constants below: on one machine and with one version of torch, a second run writes the same bytes.

    python tools/make_quickstart_model.py

With --heads 2 the heads have 32 elements instead of 16, as vLLM's attention on CPUs wants them, and all
parameters keep their shapes. That model is in configs/vllm/quickstart:

    python tools/make_quickstart_model.py --heads 2 --seed 2 --out configs/vllm/quickstart
"""

import hashlib
import json
import math
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, combinations_with_replacement, permutations, product
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from shardes.tasks.base import Row
from shardes.tasks.builtin.countdown import (
    FORMAT_WEIGHT,
    answer_reward,
    problem_key,
    short_format_reward,
    short_prompt,
)
from shardes.tasks.expression import evaluate_expression

# Of the split, and by default of the model. Picked from 0 to 4 for the model's curve: 60 iterations of ES
# raise the held-out reward to between .45 and .54.
SEED = 2
# Of the distinct problems: pre-training, train.jsonl, heldout.jsonl.
SHARES = (0.7, 0.2, 0.1)
SOLVED_SHARE, TAGGED_SUM_SHARE = 0.3, 0.175

NUM_STEPS = 1000
NUM_WARMUP_STEPS = 50
BATCH_SIZE = 256
LEARNING_RATE = 4e-3

SPECIAL_TOKENS = ("<pad>", "<eos>")
TAGS = ("<answer>", "</answer>")
CHARACTERS = "0123456789+-*/ =:.()"
PAD_ID, EOS_ID = 0, 1
VOCABULARY_SIZE = 32
# "9 9 9=81:" and "<answer>9*9*1</answer><eos>", one token for each character, tag and special token.
PROMPT_LENGTH, ANSWER_LENGTH = 9, 8


def make_tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level BPE tokenizer without merges: one token a character.

    It is a ``Qwen2Tokenizer`` because ``AutoTokenizer`` loads that class for every Qwen2 model whatever was
    saved: only what this class builds by itself comes back unchanged.
    """
    tokens = [*SPECIAL_TOKENS, *TAGS, *CHARACTERS.replace(" ", "Ġ")]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        # The class would add a 25th token for characters it does not know.
        unk_token=SPECIAL_TOKENS[PAD_ID],
        pad_token=SPECIAL_TOKENS[PAD_ID],
        eos_token=SPECIAL_TOKENS[EOS_ID],
        padding_side="left",
    )
    # Not special: the tags have to survive decode(skip_special_tokens=True), for the reward reads them.
    tokenizer.add_tokens(list(TAGS))
    return tokenizer


def make_problems() -> dict[str, tuple[Row, list[str]]]:
    """Return all problems of three numbers 1-9 and a target 10-99 that + - * solve without parentheses.

    Returns:
        Row and solutions of each problem, by its prompt. The order of a row's numbers counts: the
        permutations of a problem are several rows.
    """
    problems: dict[str, tuple[Row, list[str]]] = {}
    for multiset in combinations_with_replacement(range(1, 10), 3):
        orders = sorted(set(permutations(multiset)))
        expressions: dict[int, list[str]] = {}
        for (a, b, c), first, second in product(orders, "+-*", "+-*"):
            expression = f"{a}{first}{b}{second}{c}"
            expressions.setdefault(int(evaluate_expression(expression)[0]), []).append(expression)
        for target, numbers in product(range(10, 100), orders):
            if target in expressions:
                row = {"numbers": list(numbers), "target": target}
                problems[str(short_prompt(row))] = (row, expressions[target])
    return problems


def split_problems(rows: Sequence[Row], *, shares: Sequence[float], seed: int) -> list[list[Row]]:
    """Split rows into parts such that no problem is in two, in whatever order its numbers are given.

    A part is a range of the problems ordered by a hash of seed and problem, so the split depends on neither
    the order of the rows nor a random generator.

    Args:
        rows: The rows to split.
        shares: Each part's share of the distinct problems; they sum to 1.
        seed: Another seed gives another split.

    Returns:
        One list for each share; rows keep their order within it.
    """
    if abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares sum to {sum(shares)}; wanted: 1")
    keys = [problem_key(row) for row in rows]
    ordered = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    ends = [round(share * len(ordered)) for share in accumulate(shares)]
    part_of = {key: bisect_right(ends, index) for index, key in enumerate(ordered)}
    parts: list[list[Row]] = [[] for _ in shares]
    for key, row in zip(keys, rows, strict=True):
        parts[part_of[key]].append(row)
    return parts


def in_hash_order(rows: Sequence[Row]) -> list[Row]:
    """Sort the rows by a hash, so that the first few of them are a fair sample."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{SEED} {json.dumps(row)}".encode()).digest())


class Corpus:
    """Corpus from which batches of prompts with answers are drawn, as token ids."""

    def __init__(self, problems: Sequence[tuple[Row, list[str]]], tokenizer: Qwen2Tokenizer) -> None:
        """Encode every text that can be drawn.

        Args:
            problems: Rows with their solutions.
            tokenizer: Tokenizer of the model.
        """
        texts: list[str] = []
        self.num_solutions = torch.tensor([len(solutions) for _, solutions in problems])
        for row, solutions in problems:
            plain_sum = "+".join(map(str, row["numbers"]))
            answers = [plain_sum, *(f"<answer>{answer}</answer>" for answer in (plain_sum, *solutions))]
            texts += [f"{short_prompt(row)}{answer}<eos>" for answer in answers]
        # Padded here: the tokenizer would remember the padding side, and save it.
        ids = [torch.tensor(text_ids) for text_ids in tokenizer(texts)["input_ids"]]
        self.ids = pad_sequence(ids, batch_first=True, padding_value=PAD_ID)
        num_texts = self.num_solutions + 2
        self.starts = num_texts.cumsum(0) - num_texts

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Draw ``BATCH_SIZE`` texts: a problem, then a way of answering, then one of its solutions."""
        which, way, solution = torch.rand(3, BATCH_SIZE, generator=generator, dtype=torch.float64)
        problem = (which * len(self.starts)).long()
        nth_solution = 2 + (solution * self.num_solutions[problem]).long()
        plain_sum = (way < SOLVED_SHARE + TAGGED_SUM_SHARE).long()
        return self.ids[self.starts[problem] + torch.where(way < SOLVED_SHARE, nth_solution, plain_sum)]


def make_model(
    *, num_heads: int = 4, seed: int = SEED, vocabulary_size: int = VOCABULARY_SIZE
) -> Qwen2ForCausalLM:
    """Return a random model, float32, with half as many key-value heads as attention heads."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        intermediate_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def train_model(
    model: Qwen2ForCausalLM,
    draw: Callable[[torch.Generator], torch.Tensor],
    *,
    num_steps: int,
    prompt_length: int,
    seed: int = SEED,
    is_answer: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Train on the answers alone, and set greedy decoding; prompts are uniform noise to a model this small.

    Args:
        model: Model, trained in place.
        draw: Function that draws a batch of texts, as token ids int64 of shape [texts, length].
        num_steps: Number of batches to train on.
        prompt_length: Number of tokens before the answer.
        seed: Seed of what is drawn.
        is_answer: Function of the positions of tokens in a text, from 0, that says which of them, after the
            prompt, are answers; None: all.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(num_steps):
        warmup = min(1.0, (step + 1) / NUM_WARMUP_STEPS)
        cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warmup * cosine
        ids = draw(generator)
        logits = model(input_ids=ids[:, :-1]).logits[:, prompt_length - 1 :]
        labels = ids[:, prompt_length:]
        if is_answer is not None:
            places = torch.arange(prompt_length, ids.shape[1])
            labels = labels.where(is_answer(places), PAD_ID)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD_ID)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            click.echo(f"step {step + 1} loss {loss.item():.3f}")
    model.eval()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=PAD_ID, eos_token_id=EOS_ID)


def measure(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, rows: Sequence[Row], *, sample: bool
) -> tuple[float, float]:
    """Return the mean answer and format rewards, decoded greedily or sampled at temperature 1."""
    torch.manual_seed(SEED)
    prompts = tokenizer([short_prompt(row) for row in rows], return_tensors="pt", padding=True)
    ids = model.generate(**prompts, max_new_tokens=ANSWER_LENGTH, do_sample=sample)
    texts = tokenizer.decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    columns = {key: [row[key] for row in rows] for key in ("numbers", "target")}
    answers, formats = answer_reward([], texts, **columns), short_format_reward([], texts)
    return sum(answers) / len(rows), sum(formats) / len(rows)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@click.command(help=__doc__)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(__file__).parent.parent / "configs" / "quickstart",
    help="Directory to make; model/, train.jsonl and heldout.jsonl in it are replaced.",
)
@click.option("--heads", type=click.Choice([2, 4]), default=4, show_default=True, help="Attention heads.")
@click.option("--seed", default=SEED, show_default=True, help="Seed of the model, not of the data's split.")
def main(out: Path, heads: int, seed: int) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    problems = make_problems()
    rows = [row for row, _ in problems.values()]
    pretraining, train, heldout = map(in_hash_order, split_problems(rows, shares=SHARES, seed=SEED))
    for name, part in ("pre-training", pretraining), ("train", train), ("held-out", heldout):
        click.echo(f"{name}: {len(part)} rows, {len(set(map(problem_key, part)))} problems")

    tokenizer = make_tokenizer()
    model = make_model(num_heads=heads, seed=seed)
    corpus = Corpus([problems[str(short_prompt(row))] for row in pretraining], tokenizer)
    train_model(model, corpus.draw, num_steps=NUM_STEPS, prompt_length=PROMPT_LENGTH, seed=seed)

    out.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".making-", dir=out))
    try:
        model.save_pretrained(temporary / "model")
        tokenizer.save_pretrained(temporary / "model")
        write_rows(temporary / "train.jsonl", train)
        write_rows(temporary / "heldout.jsonl", heldout)
        # A directory cannot be renamed over one that has files.
        shutil.rmtree(out / "model", ignore_errors=True)
        for name in "model", "train.jsonl", "heldout.jsonl":
            (temporary / name).replace(out / name)
    finally:
        shutil.rmtree(temporary)

    for way, sample in ("greedy", False), ("sampled", True):
        answer, form = measure(model, tokenizer, heldout, sample=sample)
        reward = answer + FORMAT_WEIGHT * form
        click.echo(f"held-out, {way}: reward {reward:.3f} accuracy {answer:.3f} format {form:.3f}")


if __name__ == "__main__":
    main()
