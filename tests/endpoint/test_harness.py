"""Harnesses: programs that play episodes through the endpoint, in processes of their own."""

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")

from shardes.config.task import TaskConfig
from shardes.endpoint.requests import SamplingSettings
from shardes.errors import UserError
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.turns import EpisodeLimits, TokenAnswer
from shardes.tasks.base import ChatTemplate
from tests.helpers.harness_player import HarnessPlayer, play
from tests.helpers.tokenizers import sentence_pieces

FILE = "tests/helpers/harnesses.py"
LIMITS = EpisodeLimits(max_new_tokens=20, max_context=1000, max_turns=10)
MODEL = "shardes-member-3"
# Tools are shown, and calls of them, and what they return.
CHAT = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Model:
    """Answers with a hash of what it is asked, and notes who asks; ``texts`` has other answers."""

    def __init__(self, tokenizer, texts=None, wait=0.0):
        self.tokenizer, self.texts, self.wait = tokenizer, texts or {}, wait
        self.turns = []

    def __call__(self, prompts, *, cohort):
        self.turns.append((cohort, [prompt.episode for prompt in prompts]))
        self.asked = prompts
        time.sleep(self.wait)
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt):
        draw = "" if prompt.is_greedy else prompt.draw
        text = hashlib.sha256(f"{prompt.token_ids}{draw}".encode()).hexdigest()[:8]
        asked = self.tokenizer.decode(prompt.token_ids)
        text = next((said for part, said in self.texts.items() if part in asked), text)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        was_cut = len(ids) > prompt.max_new_tokens
        ids = ids[: prompt.max_new_tokens]
        return TokenAnswer(ids, text if not was_cut else self.tokenizer.decode(ids), was_cut)


@pytest.fixture(scope="module")
def tokenizer():
    return sentence_pieces(legacy=False, chat_template=CHAT)


def make_player(tokenizer, function, *, temperature=0.0, workers=16, seconds=20.0, arguments=None):
    config = TaskConfig(
        data="range:0:9",
        harness=f"{FILE}:{function}",
        environment_arguments=arguments or {},
        reward_timeout_seconds=seconds,
        reward_workers=workers,
        reward_isolation="none",
    )
    return HarnessPlayer(
        config,
        sampling=SamplingSettings(temperature),
        encoder=PromptEncoder(tokenizer),
        chat=ChatTemplate(),
    )


def played(player, rows, model, *, limits=LIMITS, size=100):
    """Play rows in cohorts of some size; return the outcomes in order."""
    found = {}
    cohorts = {
        number: dict(list(enumerate(rows))[start : start + size])
        for number, start in enumerate(range(0, len(rows), size))
    }
    play(player, cohorts, model, model=MODEL, limits=limits, take=found.__setitem__)
    return [found[i] for i in range(len(rows))]


@pytest.fixture(scope="module")
def player(tokenizer):
    with make_player(tokenizer, "any_of", seconds=3.0, arguments={"factor": 2}) as player:
        yield player


def summary(outcomes):
    return [(each.rewards, each.messages, each.num_tokens, each.failure) for each in outcomes]


ROWS = [{"turns": turns, "text": f"row {i}"} for i, turns in enumerate([3, 1, 4, 2, 5, 2, 3, 1])]


def test_cohorts_are_played_in_lock_step(player, tokenizer):
    model = Model(tokenizer)
    outcomes = played(player, ROWS, model, size=4)
    assert [episodes for cohort, episodes in model.turns if cohort == 0] == [
        [0, 1, 2, 3],
        [0, 2, 3],
        [0, 2],
        [2],
    ]
    later = [episodes for cohort, episodes in model.turns if cohort == 1]
    assert later == [[4, 5, 6, 7], [4, 5, 6], [4, 6], [4], [4]]
    assert [cohort for cohort, _ in model.turns] == [0, 1, 0, 1, 0, 1, 0, 1, 1]  # in turn
    assert [len(each.num_tokens) for each in outcomes] == [row["turns"] for row in ROWS]
    for outcome in outcomes:
        assert outcome.rewards == [2.0 * sum(map(ord, outcome.answer))]
        assert outcome.messages[-1] == {"role": "assistant", "content": outcome.answer}
        assert outcome.failure is None
    assert outcomes[3].prompt == [{"role": "user", "content": "row 3"}]


def test_an_episode_whose_process_is_killed_has_the_same_outcome(player, tokenizer, tmp_path):
    expected = Model(tokenizer)
    outcomes = played(player, ROWS, expected)
    for at in (0, 2):
        killed, model = player.num_kills, Model(tokenizer)
        marks = [str(tmp_path / f"{at}.{i}") for i in range(len(ROWS))]
        rows = [row | {"at": at, "do": "once", "mark": mark} for row, mark in zip(ROWS, marks, strict=True)]
        assert summary(played(player, rows, model)) == summary(outcomes)
        assert model.turns == expected.turns
        assert player.num_kills - killed == sum(row["turns"] > at for row in ROWS)


def test_processes_killed_at_random_moments_change_nothing(player, tokenizer):
    rows = [row | {"pause": 0.02} for row in ROWS]
    expected = Model(tokenizer, wait=0.05)
    outcomes = played(player, rows, expected)
    server = player._pool._crew._fork_server._process.pid
    is_over, killed = threading.Event(), player.num_kills

    def kill():
        for at in range(6):
            if is_over.wait(0.11):
                return
            children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
            os.kill(int(children[at * 5 % len(children)]), signal.SIGKILL)

    model = Model(tokenizer, wait=0.05)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        again = played(player, rows, model)
    finally:
        is_over.set()
        killer.join()
    assert player.num_kills > killed
    assert summary(again) == summary(outcomes)
    assert model.turns == expected.turns


def test_harnesses_that_fail_fail_alone(player, tokenizer):
    kinds = ["raise", "kill", "exit", "hang", "wait", "thread"]
    rows = [{"turns": 3, "text": kind, "at": 1, "do": kind} for kind in kinds]
    outcomes = played(player, [*rows, {"turns": 3, "text": "fine"}], Model(tokenizer))
    failures = dict(zip([*kinds, "fine"], [each.failure for each in outcomes], strict=True))
    assert failures["fine"] is None
    assert failures["thread"] is None
    assert failures["raise"].startswith("ValueError: no luck (")
    assert failures["raise"].endswith(", harness)")
    assert failures["kill"] == "the harness ended its process (signal 9)"
    # With threads that have not ended yet, the process is killed before its exit status is known.
    assert failures["exit"].startswith("the harness ended its process (")
    assert failures["hang"] == failures["wait"]
    assert "neither asked nor ended for 3 s (task.reward_timeout_seconds)" in failures["hang"]
    assert all(len(each.num_tokens) == 1 for each in outcomes[:5])
    assert [each.rewards for each in outcomes[:5]] == [[]] * 5


def test_waiting_for_an_answer_does_not_count(player, tokenizer):
    (outcome,) = played(player, [{"turns": 1}], Model(tokenizer, wait=3.5))
    assert outcome.failure is None
    assert outcome.seconds < 3


def test_fewer_processes_than_episodes(player, tokenizer, monkeypatch):
    assert player.num_at_once == 8
    monkeypatch.setattr(player, "num_at_once", 2)
    model = Model(tokenizer)
    outcomes = played(player, ROWS[:5], model)
    turns = [[0, 1], [0, 2], [0, 2], [2, 3], [2, 3], [4], [4], [4], [4], [4]]
    assert [episodes for _, episodes in model.turns] == turns
    assert [each.failure for each in outcomes] == [None] * 5


def test_clients_of_the_environments_variables(player, tokenizer):
    rows = [{"play": "by_environment", "text": text} for text in "AB"]
    outcomes = played(player, rows, Model(tokenizer, {"A": "four"}))
    assert [each.rewards for each in outcomes] == [[4.0], [8.0]]
    assert "OPENAI_BASE_URL" not in os.environ


def test_limits_are_told_and_noted(player, tokenizer):
    limits = EpisodeLimits(max_new_tokens=5, max_context=200, max_turns=4)
    rows = [
        {"play": "to_the_limit", "text": "a", "code": "max_turns_exceeded"},
        {"play": "to_the_limit", "text": "a" * 50, "code": "context_length_exceeded"},
        {"play": "to_the_limit", "text": "a", "code": "another"},
    ]
    turns, context, failed = played(player, rows, Model(tokenizer), limits=limits)
    assert (turns.rewards, turns.truncation, turns.num_tokens) == ([4.0], "turns", [5, 5, 5, 5])
    assert turns.num_cut == 4
    assert (context.truncation, context.failure) == ("context", None)
    assert 0 < context.rewards[0] < 4
    assert "AssertionError: max_turns_exceeded" in failed.failure


def test_several_answers(tokenizer):
    how = [{}, {"temperature": 0}, {"seed": 3}, {"seed": 3}, {"seed": 4}]
    with make_player(tokenizer, "several", temperature=1.0) as player:
        model = Model(tokenizer)
        outcomes = played(player, [{"how": each} for each in how], model)
    assert [each.rewards for each in outcomes] == [[3.0], [1.0], [3.0], [3.0], [3.0]]
    draws = {}
    for prompt in model.asked:
        draws.setdefault(prompt.episode, []).append(prompt.draw)
    assert len(draws[1]) == 1  # the most likely answer is generated once
    assert draws[0] == [0, 1, 2]
    assert draws[2] == draws[3]
    assert not set(draws[3]) & set(draws[4])
    assert max(map(max, draws.values())) < 2**20


def test_an_answer_ends_before_a_stop(player, tokenizer):
    rows = [{"play": "stopped", "stop": ["b", "cd"]}]
    (outcome,) = played(player, rows, Model(tokenizer, {"x": "acdb"}))
    assert outcome.rewards == [1.0]
    assert outcome.answer == "acdb"


def test_tools(player, tokenizer):
    call = '<tool_call>{"name": "add", "arguments": {"x": 3}}</tool_call>'
    model = Model(tokenizer)
    model.answer = lambda prompt: TokenAnswer(
        [], "seven" if "tool\n" in tokenizer.decode(prompt.token_ids) else call, was_cut=False
    )
    (outcome,) = played(player, [{"play": "with_tool"}], model)
    assert (outcome.failure, outcome.rewards) == (None, [5.0])


def test_returns_that_are_no_numbers(player, tokenizer):
    rows = [{"play": "give", "give": give} for give in ("text", "none", "nan", "true")]
    outcomes = played(player, rows, Model(tokenizer))
    text, none, nan, true = [each.failure for each in outcomes]
    assert text.startswith("TypeError: the harness returned '1' (str); wanted a number")
    assert none.startswith("TypeError: the harness returned None")
    assert nan.startswith("ValueError: the harness returned nan")
    assert "reward" not in nan
    assert (true, outcomes[3].rewards) == (None, [1.0])


def test_a_cohort_that_is_given_up_leaves_nothing_behind(player, tokenizer):
    def fail(prompts, *, cohort):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        played(player, ROWS, fail, size=4)
    assert player.queue.living([f"e{i}" for i in range(1000)]) == []
    assert [each.failure for each in played(player, ROWS[:2], Model(tokenizer))] == [None, None]


@pytest.mark.parametrize(
    ("function", "others", "message"),
    [
        ("missing", {}, "task.harness: tests/helpers/harnesses.py has no function 'missing'"),
        ("takes_nothing", {}, "task.harness: TypeError: the harness cannot be called"),
        ("play", {"arguments": {"other": 1}}, "task.harness: TypeError: the harness cannot be called"),
        ("play", {"workers": 1}, "task.reward_workers: got 1"),
    ],
)
def test_harnesses_that_cannot_be_used(tokenizer, function, others, message):
    with pytest.raises(UserError) as refused:
        make_player(tokenizer, function, **others)
    assert str(refused.value).startswith(message)
