"""Tokens drawn at random: their distribution, and what their random numbers depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shardes.rollout.sampling import TokenSampler
from tests.helpers.decoding import BUDGET, composed, decoded, random_prompts


def draws(sampling, logits, *, count):
    uniforms = torch.from_numpy(
        np.concatenate(
            [
                sampling.uniforms(iteration=1, prompts=[i], samples=[0], num_tokens=1000)[0].numpy()
                for i in range(count // 1000)
            ]
        )
    )
    tokens = sampling.draw(logits.expand(count, -1), uniforms)
    return np.bincount(tokens.numpy(), minlength=logits.shape[-1]) / count


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.6, None, 1.0), (1.3, 5, 1.0), (1.0, None, 0.7), (0.8, 9, 0.8), (1.0, 500, 0.01)],
)
def test_draws_have_the_distribution_of_transformers_warpers(temperature, top_k, top_p):
    logits = 2 * torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    wanted = warpers(None, logits).softmax(dim=-1)[0].double().numpy()
    count = 40_000
    found = draws(TokenSampler(5, temperature=temperature, top_k=top_k, top_p=top_p), logits, count=count)
    assert np.array_equal(found > 0, wanted > 1e-9) or found[wanted == 0].sum() == 0
    assert np.abs(found - wanted).max() < 5 * np.sqrt(0.25 / count)
    assert found[wanted == 0].sum() == 0


def test_random_numbers_depend_on_what_is_drawn_and_on_nothing_else():
    sampling = TokenSampler(7, temperature=1.0)

    def numbers(iteration=2, prompts=(4,), samples=(1,), num_tokens=6):
        return sampling.uniforms(
            iteration=iteration, prompts=prompts, samples=samples, num_tokens=num_tokens
        ).tolist()

    (row,) = numbers()
    assert numbers(num_tokens=3) == [row[:3]]
    assert numbers(prompts=(9, 4), samples=(0, 1))[1] == row
    others = [numbers(iteration=3), numbers(prompts=(5,)), numbers(samples=(0,))]
    assert all(not set(row) & set(other[0]) for other in others)
    assert not set(row) & set(
        TokenSampler(8, temperature=1.0)
        .uniforms(iteration=2, prompts=[4], samples=[1], num_tokens=6)[0]
        .tolist()
    )
    assert all(0 <= value < 1 for value in row)


def test_every_turn_of_an_episode_has_random_numbers_of_its_own():
    sampling = TokenSampler(7, temperature=1.0)

    def numbers(num_tokens=6, **turn):
        return sampling.uniforms(
            iteration=2, prompts=[4, 5], samples=[1, 0], num_tokens=num_tokens, **turn
        ).tolist()

    turns = [numbers(turn=turn) for turn in range(5)]
    assert turns[0] == numbers()
    values = [value for rows in turns for row in rows for value in row]
    assert len(set(values)) == len(values)
    # Where a turn begins does not depend on how long answers may be.
    assert [row[:2] for row in turns[3]] == numbers(num_tokens=2, turn=3)


def test_a_drawn_answer_does_not_depend_on_its_neighbours(models):
    model, sampling = models["llama"], TokenSampler(3, temperature=1.5, top_p=0.95)
    prompts = random_prompts(5)

    def answers(order):
        batch = composed([prompts[i] for i in order])
        problems = [order[row] for row in batch.rows]
        uniforms = sampling.uniforms(
            iteration=0, prompts=problems, samples=[0] * len(order), num_tokens=BUDGET
        )
        found = decoded(model, replace(batch, uniforms=uniforms), eos_ids=[3, 9], sampling=sampling)
        return dict(zip(problems, found, strict=True))

    everyone = answers(range(13))
    assert len({tuple(answer) for answer in everyone.values()}) == 13
    assert answers(list(range(12, -1, -1))) == everyone
    some = [11, 2, 7, 5, 8]
    assert answers(some) == {i: everyone[i] for i in some}


@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (5, 1.0), (None, 0.8)])
def test_rows_without_random_numbers_take_the_most_likely_token(top_k, top_p):
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    sampling = TokenSampler(5, temperature=2.0, top_k=top_k, top_p=top_p)
    numbers = torch.linspace(0, 0.99, 20)
    drawn, most_likely = sampling.draw(logits, numbers), logits.argmax(dim=-1)
    is_greedy = torch.arange(20) % 3 == 0
    assert (drawn != most_likely)[is_greedy].any()
    found = sampling.draw(logits, numbers.masked_fill(is_greedy, -1.0))
    assert torch.equal(found, torch.where(is_greedy, most_likely, drawn))
