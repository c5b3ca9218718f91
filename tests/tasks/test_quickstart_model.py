import importlib.util
import json
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardes.tasks.builtin.countdown import (
    answer_reward,
    check_row,
    problem_key,
    short_format_reward,
    short_prompt,
    split_problems,
)

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(QUICKSTART / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")


def rows_of(name):
    return [json.loads(line) for line in (QUICKSTART / name).read_text().splitlines()]


TRAIN, HELDOUT = rows_of("train.jsonl"), rows_of("heldout.jsonl")


def solutions_of(row):
    """Every solution without parentheses, by brute force and Python's own arithmetic."""
    for a, b, c in set(permutations(row["numbers"])):
        for text in (f"{a}{first}{b}{second}{c}" for first in "+-*" for second in "+-*"):
            if eval(text) == row["target"]:
                yield text


def test_the_tokenizer_that_auto_tokenizer_loads_is_the_one_that_was_made(tokenizer):
    expected = {"<pad>": 0, "<eos>": 1, "<answer>": 2, "</answer>": 3}
    expected |= {character: index for index, character in enumerate("0123456789+-*/", start=4)}
    assert {token: tokenizer.get_vocab()[token] for token in expected} == expected
    assert len(tokenizer) == 24
    text = "3 5 2=13:<answer>3*5-2</answer><eos>"
    assert tokenizer(text)["input_ids"] == [7, 18, 9, 18, 6, 19, 5, 7, 20, 2, 7, 16, 9, 15, 6, 3, 1]
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.chat_template is None


def test_what_is_encoded_is_decoded(tokenizer):
    for row in TRAIN + HELDOUT:
        text = f"{short_prompt(row)}<answer>{next(solutions_of(row))}</answer>"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 9 + 7
        assert tokenizer.decode(ids) == text
        # The tags are what the reward reads, so they must not be skipped as special.
        assert tokenizer.decode([0, 0, *ids, 1, 0], skip_special_tokens=True) == text


def test_prompts_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["1 2=3:", "3 5 2=13:"], padding=True)
    assert batch["input_ids"][0][:3] == [0, 0, 0]
    assert batch["attention_mask"][0] == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_the_model_is_small_float32_and_tied(model, tokenizer):
    assert sum(parameter.numel() for parameter in model.parameters()) == 76_352
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.model_type == "qwen2"
    assert model.config.vocab_size == 32 >= len(tokenizer)
    generation = model.generation_config
    assert (generation.do_sample, generation.pad_token_id, generation.eos_token_id) == (False, 0, 1)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_every_row_is_a_valid_solvable_problem():
    for name, rows in ("train", TRAIN), ("heldout", HELDOUT):
        for line, row in enumerate(rows, start=1):
            check_row(row, f"{name}.jsonl line {line}")
            assert set(row) == {"numbers", "target"}
            assert any(True for _ in solutions_of(row))
            assert 10 <= row["target"] <= 99


def test_no_row_is_there_twice_and_no_problem_on_both_sides():
    texts = [short_prompt(row) for row in TRAIN + HELDOUT]
    assert len(set(texts)) == len(texts)
    assert not {problem_key(row) for row in TRAIN} & {problem_key(row) for row in HELDOUT}
    # All orders of a problem's numbers are there, so none is left over for the model's pre-training.
    for rows in (TRAIN, HELDOUT):
        prompts = {short_prompt(row) for row in rows}
        for row in rows:
            for order in permutations(row["numbers"]):
                assert short_prompt({**row, "numbers": order}) in prompts


def test_the_rows_are_those_that_the_tool_makes_and_the_model_was_trained_on_none_of_them():
    path = Path(__file__).parents[2] / "tools" / "make_quickstart_model.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    rows = [row for row, _ in tool.make_problems().values()]
    pretraining, train, heldout = split_problems(rows, shares=tool.SHARES, seed=tool.SEED)
    assert (len(pretraining), len(train), len(heldout)) == (2900, 788, 418)
    assert (tool.in_hash_order(train), tool.in_hash_order(heldout)) == (TRAIN, HELDOUT)
    assert not {problem_key(row) for row in pretraining} & {problem_key(row) for row in TRAIN + HELDOUT}


def generate(model, tokenizer, rows, **options):
    prompts = tokenizer([short_prompt(row) for row in rows], return_tensors="pt", padding=True)
    ids = model.generate(**prompts, max_new_tokens=8, **options)
    texts = tokenizer.decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    columns = {key: [row[key] for row in rows] for key in ("numbers", "target")}
    parts = answer_reward([], texts, **columns), short_format_reward([], texts)
    return texts, list(zip(*parts, strict=True))


def test_the_base_model_scores_nothing_greedily(model, tokenizer):
    _, parts = generate(model, tokenizer, HELDOUT)
    assert sum(answer + 0.1 * form for answer, form in parts) / len(parts) < 0.02


def test_solving_is_latent_in_the_base_model(model, tokenizer):
    torch.manual_seed(0)
    texts, parts = generate(model, tokenizer, HELDOUT, do_sample=True)
    answers, formats = (sum(column) / len(parts) for column in zip(*parts, strict=True))
    assert 0.05 < answers < 0.3
    assert 0.3 < formats < 0.6
    assert any("*" in text for text in texts)
