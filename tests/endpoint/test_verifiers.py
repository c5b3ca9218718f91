"""Environments of verifiers, unchanged, through the endpoint."""

from pathlib import Path

import pytest

pytest.importorskip("verifiers.v1")
pytest.importorskip("uvicorn")

from shardes import TrainConfig, Trainer
from shardes.config.task import TaskConfig
from shardes.endpoint.requests import SamplingSettings
from shardes.environments.adapters import verifiers
from shardes.rollout.encoding import PromptEncoder
from shardes.rollout.turns import EpisodeLimits, TokenAnswer
from shardes.tasks.base import ChatTemplate
from tests.helpers.harness_player import HarnessPlayer, play
from tests.helpers.tokenizers import CHAT, sentence_pieces

LIMITS = EpisodeLimits(max_new_tokens=20, max_context=1000, max_turns=2)


@pytest.fixture
def tokenizer(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parent / "tasksets")
    monkeypatch.setenv("HOME", str(tmp_path))  # verifiers writes there
    return sentence_pieces(legacy=False, chat_template=CHAT)


def make_player(tokenizer, name, **arguments):
    config = TaskConfig(
        data="range:0:9", environment=f"verifiers:{name}", environment_arguments=arguments, reward_workers=8
    )
    return HarnessPlayer(
        config, sampling=SamplingSettings(0.0), encoder=PromptEncoder(tokenizer), chat=ChatTemplate()
    )


def test_a_taskset_and_its_harness_are_played_unchanged(tokenizer):
    turns, found = [], {}

    def answer(prompts, *, cohort):
        turns.append([prompt.episode for prompt in prompts])
        texts = {1: "2", 2: "4" if len(turns) > 1 else "5"}
        return [TokenAnswer([7], texts.get(prompt.episode, "9"), was_cut=False) for prompt in prompts]

    with make_player(tokenizer, "tiny-sums", taskset={"num_tasks": 3}) as player:
        rows = {i: {"index": i} for i in range(4)}
        play(player, {0: rows}, answer, model="shardes-centre", limits=LIMITS, take=found.__setitem__)
    assert turns == [[0, 1, 2], [0, 2]]
    assert [found[i].failure for i in (1, 2)] == [None, None]
    assert [found[i].rewards[0] for i in (1, 2)] == pytest.approx([2.1, 2.2])
    assert found[0].truncation == "turns"
    assert found[0].failure.startswith("RuntimeError: verifiers: ")
    assert "task.max_turns" in found[0].failure
    assert [message["role"] for message in found[2].messages] == ["user", "assistant", "user", "assistant"]
    assert "has 3 tasks, but none with the index 3" in found[3].failure


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("missing-tasks", {}, "verifiers:missing-tasks: taskset 'missing-tasks' not found"),
        ("tiny-sums", {"taskset": {"size": 3}}, r"verifiers:tiny-sums: taskset\.size: Extra inputs"),
        ("tiny-sums", {"agent": {"harness": {"id": "none"}}}, "harness 'none' not found"),
    ],
)
def test_what_cannot_be_played_is_refused(tokenizer, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        verifiers.check(name=name, **arguments)


@pytest.mark.slow
def test_an_environment_of_verifiers_trains_in_ten_lines(tokenizer, model_dirs, tmp_path):
    config = TrainConfig(
        model={"path": str(model_dirs["tied"]), "dtype": "float32"},
        run={"dir": str(tmp_path / "run")},
        rollout={"max_new_tokens": 4, "max_context": 64, "micro_batch_size": 3},
        es={"iterations": 2, "population": 4, "sigma": 0.05},
        task={
            "environment": "verifiers:tiny-sums",
            "environment_arguments": {"taskset": {"num_tasks": 6}},
            "data": "range:0:6",
            "chat_template": "{% for m in messages %}({{ m.content }}){% endfor %}",
        },
    )
    result = Trainer(config).train()
    assert result.is_finished
    for line in result.metrics[:2]:
        assert line["num_reward_failures"] == 0
        assert line["components"]["turns"] >= 1
        assert line["num_tokens"] > 0
