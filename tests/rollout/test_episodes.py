"""Episodes on one rank: limits, returns, failures, and the order of what is done."""

import math
from types import SimpleNamespace

import pytest
import torch

from shardes.config.schema import RolloutConfig
from shardes.environments.base import EnvironmentSpec, EpisodeSettings, StepResult
from shardes.es.member import mean_reward
from shardes.rewards.pool import InProcessRewards
from shardes.rewards.scorer import Scorer
from shardes.rollout.aggregate import PartialResult
from shardes.rollout.batching import IDLE_COHORT
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.engines.base import Completions
from shardes.rollout.episode_results import EpisodeAccumulator
from shardes.rollout.episodes import EpisodePlayer, TooLittleMemoryError
from shardes.rollout.prompts import PromptBuilder
from shardes.rollout.share import WorkShare
from shardes.tasks.base import Component, Task
from shardes.utils.timers import PhaseTimer
from tests.helpers.tokenizers import CHAT, sentence_pieces

ALONE = WorkShare(0, 1, 0, is_counted=True)


class Script:
    """Plays episodes from a list of results, and writes down what is done with them."""

    tools = None
    num_kills = 0

    def __init__(self, results, log):
        self._results, self._log = results, log

    def begin(self, rows):
        self._log.append(("begin", [row["index"] for row in rows]))
        return [Handle(self._results[row["index"]], row["index"], self._log) for row in rows]


class Handle:
    def __init__(self, results, index, log):
        self._results, self._index, self._log = iter(results), index, log
        self.is_closed = False

    def step(self, completion, *, message=None):
        self._log.append(("step", self._index, completion))

    def finish(self):
        self._log.append(("finish", self._index))

    def wait(self):
        self._log.append(("wait", self._index))
        return next(self._results)

    def close(self):
        self._log.append(("close", self._index))


class Harness:
    """The player over scripted environments, and a model that answers with its episode's index."""

    def __init__(self, results, *, size=2, max_turns=4, max_context=40, rule="sum", system=None, **keys):
        self.log, self.batches = [], []
        self.tokenizer = sentence_pieces(chat_template=CHAT)
        settings = RolloutConfig(max_new_tokens=6, max_context=max_context, **keys.pop("rollout", {}))
        episodes = EpisodeSettings(EnvironmentSpec("m:C"), max_turns, rule, system=system)
        task = Task("t", [], [], lambda row: "", keys.pop("rewards", ()), episodes=episodes)
        self.scorer = Scorer(
            task,
            rewards=InProcessRewards(list(task.rewards)),
            on_error=keys.pop("on_error", "exclude"),
            environments=Script(results, self.log),
        )
        encoder = PromptEncoder(self.tokenizer)
        common = {"pad_id": 0, "settings": settings}
        self.rows = [{"index": index} for index in range(len(results))]
        self.prompts = PromptBuilder(
            encoder,
            scorer=self.scorer,
            seed=0,
            device=torch.device("cpu"),
            max_positions=None,
            text=self.text,
            **common,
        ).build(self.rows, iteration=0, micro_batch_size=size)
        world = SimpleNamespace(device=torch.device("cpu"))
        self.player = EpisodePlayer(
            SimpleNamespace(ranks_per_forward=1, forward_is_collective=False),
            encoder=encoder,
            mesh=SimpleNamespace(world=world, shard=None),
            sampler=None,
            text=self.text,
            end_ids=frozenset({2}),
            timer=PhaseTimer(),
            **common,
        )
        assert not keys

    def text(self, tokens):
        return self.tokenizer.decode([token for token in tokens if token != 2])

    def generate(self, batch, prompts):
        self.log.append(("generate", batch.cohort, sorted(batch.rows)))
        self.batches.append(batch)
        ids = [self.tokenizer(str(row), add_special_tokens=False)["input_ids"] for row in batch.rows]
        return Completions([[*each, 2] for each in ids], [True] * len(ids))

    def play(self, *, share=ALONE, generate=None):
        accumulator = EpisodeAccumulator(self.prompts, keeps_samples=True)
        is_finite = self.player.play(
            self.prompts,
            share=share,
            model="m",
            take=accumulator.take,
            generate=generate or self.generate,
        )
        accumulator.send(is_last=True)
        part = PartialResult.from_json(accumulator.part().to_json())
        return accumulator.merge([part]), is_finite


def go(observation="abc", reward=0.0, **keys):
    return StepResult(observation, reward, **keys)


def done(reward=0.0, **keys):
    return StepResult("", reward, True, **keys)


@pytest.mark.parametrize(("rule", "wanted"), [("sum", [3.5, 1.0]), ("last", [2.0, 1.0])])
def test_an_episode_earns_the_sum_or_the_last_of_its_rewards(rule, wanted):
    found, is_finite = Harness([[go(), go(reward=1.5), done(2.0)], [go(), done(1.0)]], rule=rule).play()
    assert is_finite
    assert found.rewards == wanted
    assert found.components["turns"] == [2, 1]
    assert found.num_tokens == sum(found.turn_tokens)
    assert len(found.turn_tokens) == 2
    assert found.samples[0].messages == [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "0"},
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "0"},
    ]


def test_a_limit_of_turns_truncates_and_is_no_failure():
    game = Harness([[go(), go(reward=1.0), go(reward=1.0), StepResult(reward=0.25)]], max_turns=2)
    found, _ = game.play()
    assert found.rewards == [2.25]
    assert found.has_failed == [False]
    assert (found.components["truncated"], found.components["context_full"]) == ([1.0], [0.0])
    assert game.log[-3:] == [("finish", 0), ("wait", 0), ("close", 0)]


def test_a_full_context_truncates_and_every_turn_keeps_to_it():
    turns = [go("a" * 11, 1.0)] * 20
    game = Harness([[*turns]], max_turns=20, max_context=40)
    found, _ = game.play()
    assert (found.components["truncated"], found.components["context_full"]) == ([1.0], [1.0])
    widths = [batch.input_ids.shape[1] for batch in game.batches]
    assert max(widths) < 40
    for batch in game.batches:
        most = 6 if batch.budgets is None else int(batch.budgets[0])
        assert batch.lengths[0] + most <= 40
    assert widths[-1] + 11 >= 40 - 1


@pytest.mark.parametrize("system", [None, ""])
@pytest.mark.parametrize("form", ["text", "message", "parts"])
def test_what_cannot_fit_the_context_is_not_made_tokens(system, form, monkeypatch):
    """The training process would be busy, or out of memory, with what a shell has printed."""
    lengths, many = [], 10**6
    whole = PromptEncoder._tokens
    monkeypatch.setattr(
        PromptEncoder, "_tokens", lambda self, text, **k: lengths.append(len(text)) or whole(self, text, **k)
    )
    huge = "a" * many
    if form != "text" and system == "":
        content = huge if form == "message" else [{"type": "image"}, {"type": "text", "text": huge}]
        huge = [{"role": "user", "content": content}]
    game = Harness([[go(), go(huge, 1.0), go(reward=0.5)], [go(huge), go(reward=0.25)]], system=system)
    found, _ = game.play()
    assert found.rewards == [1.5, 0.25]
    assert found.components["context_full"] == [1.0, 1.0]
    assert found.components["turns"] == [1.0, 0.0]
    assert max(lengths) < many
    for sample in found.samples.values():
        assert 40 <= len(sample.messages[-1]["content"]) < many


def test_what_an_environment_counts_by_a_name_of_ours_does_not_hide_ours():
    found, _ = Harness([[go(numbers={"turns": 7.0}), done(numbers={"truncated": 1.0, "own": 3.0})]]).play()
    assert [found.components[name] for name in ("turns", "truncated", "own")] == [[1.0], [0.0], [3.0]]


def test_an_answer_that_had_no_more_room_is_counted():
    game = Harness([[go(), go(), done()]])
    found, _ = game.play(generate=lambda batch, prompts: Completions([[20] * 6], [True]))
    assert found.components["answers_cut"] == [2.0]
    found, _ = Harness([[go(), done()]]).play()
    assert found.components["answers_cut"] == [0.0]


@pytest.mark.parametrize(("on_error", "value"), [("exclude", None), (-1.0, -1.0), ("worst", None)])
def test_a_failed_episode_follows_the_rule_for_failed_rewards(on_error, value):
    results = [[go(), StepResult(failure="ValueError: no")], [go(), done(1.0)], [StepResult(failure="never")]]
    game = Harness(results, on_error=on_error)
    found, _ = game.play()
    assert found.rewards == [value, 1.0, value]
    assert found.has_failed == [True, False, True]
    assert found.num_failures == 2
    assert game.scorer.first_failure == "never"
    assert mean_reward(found.rewards) == (1.0 if value is None else pytest.approx(-1 / 3))


def test_a_conversation_that_its_template_refuses_fails_alone():
    bad = [{"role": "nobody", "content": None}]
    game = Harness([[go(bad), done(1.0)], [go(), done(1.0)]])
    game.tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    found, _ = game.play()
    assert found.has_failed == [True, False]
    assert "no such role" in game.scorer.first_failure


def test_rewards_judge_the_last_answer_and_are_added():
    def judge(completions, prompts, **columns):
        return [
            float(len(text)) + (prompt == "abc") for text, prompt in zip(completions, prompts, strict=True)
        ]

    component = Component("judge", judge, weight=2.0)
    found, _ = Harness([[go(), go("xy", 0.5), done(0.25)]], rewards=(component,)).play()
    assert found.rewards == [0.75 + 2.0 * 2.0]
    assert found.components["judge"] == [2.0]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_reward_is_called_with_the_last_answers_of_a_cohort_on_any_ranks(num_ranks):
    calls = []

    def judge(completions, index, **columns):
        calls.append((list(index), list(completions)))
        return [float(len(completions))] * len(completions)

    # Within a cohort, later episodes end first.
    results = [[go(), *[go()] * (1 - index % 2), done()] for index in range(5)]
    results[3] = [StepResult(failure="never")]
    earned = {}
    for place in range(num_ranks):
        game = Harness(results, size=2, rewards=(Component("judge", judge),))
        found, _ = game.play(share=WorkShare(place, num_ranks, place, is_counted=True))
        earned |= {index: value for index, value in enumerate(found.rewards) if value is not None}
    assert sorted(calls) == [([0, 1], ["0", "1"]), ([2], ["2"]), ([4], ["4"])]
    assert earned == {0: 2.0, 1: 2.0, 2: 1.0, 4: 1.0}


def test_two_cohorts_take_turns_and_the_next_begins_where_one_ends():
    results = [[go(), go(), done(index)] for index in range(5)]
    game = Harness(results, size=1)
    found, _ = game.play()
    assert found.rewards == [0.0, 1.0, 2.0, 3.0, 4.0]
    order = [entry[1] for entry in game.log if entry[0] == "generate"]
    assert order == [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]
    # While cohort 0 steps, cohort 1 generates: its environment is waited for only afterwards.
    first_step = game.log.index(("step", 0, "0"))
    after = [entry[0] for entry in game.log[first_step:]]
    assert after.index("generate") < after.index("wait", after.index("generate"))
    assert game.log[first_step + 1 : first_step + 2] == [("wait", 1)]


def test_ranks_play_whole_cohorts_and_together_all_of_them():
    results = [[go(), done(index)] for index in range(7)]
    earned = {}
    for place in range(3):
        game = Harness(results, size=2)
        found, _ = game.play(share=WorkShare(place, 3, place, is_counted=True))
        begun = [entry[1] for entry in game.log if entry[0] == "begin"]
        assert begun == [list(game.prompts.episodes.cohorts[c]) for c in range(place, 4, 3)]
        earned |= {i: value for i, value in enumerate(found.rewards) if value is not None}
    assert earned == {index: float(index) for index in range(7)}


def test_a_rank_without_episodes_takes_part_in_the_forwards_of_others():
    game = Harness([[go(), done()]])
    votes = iter([True, False, True, False, False, False])
    game.player._engine.forward_is_collective = True
    game.player._mesh.shard = SimpleNamespace(any=lambda mine: mine or next(votes))
    game.player.play(
        game.prompts,
        share=WorkShare(1, 2, 1, is_counted=True),
        model="m",
        take=lambda *_: pytest.fail("it has no episode"),
        generate=game.generate,
    )
    assert [(batch.cohort, batch.input_ids.shape) for batch in game.batches] == [(IDLE_COHORT, (1, 1))] * 2


def test_too_little_memory_gives_the_episodes_up():
    game = Harness([[go()], [go()]], size=1)
    with pytest.raises(TooLittleMemoryError):
        game.play(generate=lambda batch, prompts: None)
    assert {entry[1] for entry in game.log if entry[0] == "close"} == {0, 1}


def test_a_system_message_makes_chats_of_texts():
    game = Harness([[go("abc"), go("de"), done()]], system="be", max_context=200)
    found, _ = game.play()
    first, second = (game.tokenizer.decode(batch.input_ids[0]) for batch in game.batches)
    assert "system" in first
    assert second.startswith(first)
    assert [message["role"] for message in found.samples[0].messages] == [
        *("system", "user", "assistant", "user", "assistant")
    ]


def test_what_a_template_opens_is_a_part_of_each_answer():
    def judge(completions, **columns):
        return [float(text == "<think>\n0") for text in completions]

    template = CHAT.replace("assistant\n", "assistant\n<think>\n")
    results = [[go("abc"), go("de"), StepResult()]]
    game = Harness(results, system="", max_turns=1, max_context=200, rewards=(Component("own", judge),))
    game.tokenizer.chat_template = template
    found, _ = game.play()
    assert ("step", 0, "<think>\n0") in game.log
    assert found.rewards == [1.0]
    assert found.samples[0].completion == "<think>\n0"
    assert found.samples[0].messages[1] == {"role": "assistant", "content": "<think>\n0"}


def test_there_must_be_room_for_a_prompt():
    with pytest.raises(Exception, match=r"rollout\.max_new_tokens: got 6, which leaves no room for a prompt"):
        Harness([[go()]], max_context=6)


def test_no_reward_is_lost_in_sums():
    found, _ = Harness([[go(), *[go("", 0.1)] * 9, done(0.1)]], max_turns=20, max_context=400).play()
    assert found.rewards == [pytest.approx(math.fsum([0.1] * 10))]
