"""The seam of engines: one that is not ours trains, and what it says of itself is recorded."""

import json
from typing import ClassVar

import pytest

from shardes.errors import UserError
from shardes.rollout.build import make_evaluator
from shardes.rollout.engines.base import Completions, Engine
from shardes.rollout.engines.registry import ENGINES
from shardes.runs.journal import engine_of
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from tests.helpers.models import make_config, tiny_model


class FixedEngine(Engine):
    """Completes every prompt with as many tokens as the member's direction says; the centre with one."""

    is_exact = False
    members_per_forward = 1
    gather = "none"

    def __init__(self, *, mesh, tokenizer, settings, **_):
        self.group = mesh.alone
        self.calls = []
        self._tokenizer, self._settings = tokenizer, settings

    group = None
    facts: ClassVar = {"words": 1}

    def begin(self, num_bytes):
        self.calls.append("begin")

    def load(self, members):
        (member,) = members
        self._num_tokens = 1 + member.direction

    def load_centre(self):
        self._num_tokens = 1

    def generate(self, batch, *, prompts):
        tokens = self._tokenizer("1" * self._num_tokens)["input_ids"]
        return Completions([tokens] * len(batch.rows), [True] * len(batch.rows))

    def log_likelihood(self, batch):
        raise NotImplementedError

    def bytes_for(self, batch):
        return 0

    def fits(self, batch, *, prompts):
        return True

    def with_settings(self, settings):
        return self


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "m", tied=True)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(ENGINES, "fixed", f"{__name__}:FixedEngine")


def test_another_engine_is_one_class_and_one_entry(tmp_path, model, registered):
    reward = tmp_path / "reward.py"
    reward.write_text("def length(completions):\n    return [float(len(c)) for c in completions]\n")
    config = make_config(
        tmp_path,
        model=model,
        run_dir=tmp_path / "run",
        rollout__engine="fixed",
        task__reward=f"{reward}:length",
        es__population=4,
        es__iterations=2,
    )
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
    journal = [json.loads(line) for line in (config.run.dir / "journal.jsonl").read_text().splitlines()]
    rewards = {(r["iteration"], r["member"]): r["reward"] for r in journal if r["type"] == "member"}
    assert rewards == {(i, member): 1.0 + member for i in range(2) for member in range(4)}
    assert {r["reward"] for r in journal if r["type"] == "evaluation"} <= {1.0}
    assert {r["version"] for r in journal if r["type"] == "member"} == {1}
    assert journal[0]["is_exact"] is False
    assert journal[0]["settings"]["rollout.engine"] == "fixed"
    assert journal[0]["engine"] == {"name": "fixed", "words": 1}


def resumed(tmp_path, model, **changes):
    config = make_config(tmp_path, model=model, run_dir=tmp_path / "run", task__reward_workers=0, **changes)
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
    return [json.loads(line) for line in (config.run.dir / "journal.jsonl").read_text().splitlines()]


def test_another_engine_goes_on_only_where_that_is_asked_for(tmp_path, model, registered, monkeypatch):
    assert resumed(tmp_path, model, es__iterations=1)[0]["engine"] == {"name": "transformers"}
    fixed = {"rollout__engine": "fixed", "es__iterations": 2}
    with pytest.raises(UserError, match=r'name: the run has "transformers", this job "fixed"') as caught:
        resumed(tmp_path, model, **fixed)
    assert "run.resume_engine=any" in str(caught.value)
    assert "words: the run has null, this job 1" in str(caught.value)
    journal = resumed(tmp_path, model, **fixed, run__resume_engine="any")
    (change,) = [line for line in journal if line["type"] == "engine"]
    assert (change["iteration"], change["engine"]) == (1, {"name": "fixed", "words": 1})
    # The run now has this engine; a fact that differs is another one.
    fixed["es__iterations"] = 3
    monkeypatch.setattr(FixedEngine, "facts", {"words": 2})
    with pytest.raises(UserError, match="words: the run has 1, this job 2"):
        resumed(tmp_path, model, **fixed)
    monkeypatch.setattr(FixedEngine, "facts", {"words": 1})
    journal = resumed(tmp_path, model, **fixed)
    assert [line["type"] for line in journal].count("engine") == 1
    assert max(line["iteration"] for line in journal if line["type"] == "update") == 2


def test_a_journal_that_does_not_name_its_engine_was_written_with_the_first(tmp_path):
    assert engine_of({"settings": {}}) == {"name": "transformers"}
    assert engine_of({"settings": {"rollout.engine": "fixed"}}) == {"name": "fixed"}


def test_an_engine_that_a_backend_brings_goes_with_it_alone(tmp_path, model):
    def config_of(**changes):
        return make_config(tmp_path, model=model, run_dir=tmp_path / "run", **changes)

    assert config_of().rollout.engine == "transformers"
    assert config_of(parallel__backend="vllm").rollout.engine == "vllm"
    assert config_of(parallel__backend="vllm", rollout__kv_cache_gib=2).rollout.kv_cache_gib == 2
    with pytest.raises(
        UserError, match=r"engine is vllm, which cannot answer with parallel.backend: single; set "
    ):
        config_of(rollout__engine="vllm")
    with pytest.raises(UserError, match=r"engine is transformers, .* set rollout.engine: vllm"):
        config_of(parallel__backend="vllm", rollout__engine="transformers")
    for key, value in (("kv_cache_gib", 1.0), ("batch_invariant", True), ("vllm", {"max_num_seqs": 8})):
        with pytest.raises(UserError, match=f"{key} is .*, which only rollout.engine: vllm has a use for"):
            config_of(**{f"rollout__{key}": value})


def test_an_unknown_engine_is_refused_with_the_nearest_name(tmp_path, model):
    with pytest.raises(UserError, match=r"rollout\.engine: got 'transformer'; did you mean 'transformers'\?"):
        make_config(tmp_path, model=model, run_dir=tmp_path / "run", rollout__engine="transformer")


def test_every_registered_engine_is_one(tmp_path, model):
    config = make_config(tmp_path, model=model, run_dir=tmp_path / "run")
    with open_session(config) as session:
        evaluator, *_ = make_evaluator(session, load_task(config.task))
        assert isinstance(evaluator.engine, Engine)
        assert evaluator.engine.is_exact is True
