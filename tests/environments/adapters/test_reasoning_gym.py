"""The adapter of reasoning_gym, with the package itself."""

import re

import pytest

pytest.importorskip("reasoning_gym")

from shardes.environments.adapters.reasoning_gym import make


def _play(factory, index, completion, **row):
    environment = factory()
    question = environment.reset(index=index, **row)
    observation, reward, is_done = environment.step(completion)
    environment.close()
    assert (observation, is_done) == ("", True)
    return question, reward, environment.numbers


def test_questions_and_scores_are_the_data_sets_own() -> None:
    import reasoning_gym

    factory = make("chain_sum", {"max_terms": 3, "seed": 5})
    theirs = reasoning_gym.create_dataset("chain_sum", seed=5, size=100, max_terms=3)
    for index in (0, 7, 99):
        entry = theirs[index]
        question, reward, numbers = _play(factory, index, f" {entry['answer']}\n")
        assert (question, reward, numbers) == (entry["question"], 1.0, {"success": 1.0})
        for wrong in ("", "nonsense", f"It is {entry['answer']}."):
            _, reward, numbers = _play(factory, index, wrong)
            assert (reward, numbers) == (theirs.score_answer(wrong, entry), {"success": 0.0})
    assert (
        _play(factory, 100_000, "")[0] != _play(factory, 100_001, "")[0]
    )  # beyond the size that it begins with


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("whole", "  {}\n"),
        ("last_line", "I add.\nThe answer:\n {} \n\n"),
        ("tag", "<answer>0</answer> no, <answer> {} </answer>."),
    ],
)
def test_the_answer_is_the_part_that_is_chosen(answer: str, completion: str) -> None:
    import reasoning_gym

    right = reasoning_gym.create_dataset("chain_sum", seed=0, size=9)[4]["answer"]
    for choice in ("whole", "last_line", "tag"):
        factory = make("chain_sum", {"answer": choice})
        success = _play(factory, 4, completion.format(right))[2]["success"]
        assert success == (choice == answer or (answer == "whole" and choice == "last_line"))


def test_a_system_prompt_asks_for_tags_and_rows_replace_arguments() -> None:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    factory = make("chain_sum", {"system": "default", "min_terms": 2, "max_terms": 2})
    messages, reward, _ = _play(factory, 0, "<answer>no</answer>", min_terms=6, max_terms=6, other="ignored")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[0]["content"] == SYSTEM_PROMPTS["default"].strip()
    assert (messages[1]["content"].count("+") + messages[1]["content"].count("-"), reward) == (5, 0.0)
    terms = messages[1]["content"].rpartition(":")[2].strip(" =?.\n").replace(" ", "")
    right = str(sum(int(term) for term in re.findall(r"[+-]?\d+", terms)))
    assert _play(factory, 0, f"<answer>{right}</answer>", min_terms=6, max_terms=6)[1] == 1.0
    assert _play(factory, 0, right, min_terms=6, max_terms=6)[1] == 0.0


def test_an_answer_that_the_scorer_cannot_read_is_wrong() -> None:
    assert _play(make("prime_factorization", {}), 0, "nonsense")[1:] == (0.0, {"success": 0.0})


def test_data_sets_that_make_their_items_at_once_are_no_larger_than_needed() -> None:
    for name in ("acre", "word_ladder", "gsm_symbolic"):
        factory = make(name, {})
        first = _play(factory, 3, "")[0]
        _play(factory, 600, "")
        assert _play(make(name, {}), 3, "")[0] == first


def test_data_sets_mix_in_a_composite() -> None:
    parts = [
        {"name": "chain_sum", "weight": 1, "config": {"max_terms": 2}},
        {"name": "leg_counting", "weight": 1},
    ]
    factory = make("composite", {"datasets": parts})
    questions = [_play(factory, index, "")[0] for index in range(12)]
    assert 0 < sum("legs" in question for question in questions) < 12


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("chain_sums", {}, r"Unknown data set of reasoning_gym: 'chain_sums'; nearest: chain_sum"),
        ("chain_sum", {"max_term": 3}, r"'max_term'; nearest: max_terms"),
        ("chain_sum", {"size": 3}, r"remove size"),
        ("chain_sum", {"min_terms": 9}, r"cannot make chain_sum .*max_terms must be >= min_terms"),
        (
            "chain_sum",
            {"answer": "first"},
            r"argument answer is 'first'; it has to be one of whole, last_line, tag",
        ),
        ("chain_sum", {"system": "simpel"}, r"nearest: simple"),
        ("chain_sum", {"seed": -1}, r"seed is -1"),
    ],
)
def test_bad_names_and_arguments_are_told(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, arguments)
