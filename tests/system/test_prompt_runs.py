"""Runs on models with templates as people have them: prompts stay as they are, bad ones are named."""

import datetime
import json
import os
from unittest import mock

import pytest
import yaml
from transformers.utils import chat_template_utils

from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree
from tests.helpers.runs import steady_metrics
from tests.helpers.tokenizers import CHAT, VOCABULARY, sentence_pieces

ROWS = [{"prompt": [{"role": "user", "content": "the film " * (1 + i % 3)}], "n": i} for i in range(7)]
SETTINGS = {
    "task__heldout_data": None,
    "task__batch_size": 3,
    "task__sampling": "epochs",
    "task__reward_workers": 0,
    "task__reward": "tests/helpers/rewards.py:spread_of_chats",
    "es__iterations": 4,
    "eval__every": 0,
}
DATED = CHAT.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %b %Y') }}\n")
STRICT = CHAT.replace(
    "{{ m.content", "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ m.content"
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def model_of(path, *, chat_template=CHAT, vocab_size=None, **tokenizer):
    tiny_model(path, tied=True, architecture="llama", vocab_size=vocab_size or len(VOCABULARY))
    sentence_pieces(chat_template=chat_template, **tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("model") / "strict", chat_template=STRICT)


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("model") / "dated", chat_template=DATED)


def train(tmp_path, model, run="run", *, rows=ROWS, day=None, **changes):
    """Trains, on some day of January 2026 if one is given."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / f"{run}.yaml"
    changes = {"task__data": data, **SETTINGS, **changes}
    config.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / run, **changes)))
    if day is None:
        return call("train", "--config", config)

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 1, day, 23, 59)

    # Python's own, and the name under which templates know it.
    places = [(datetime, "datetime"), (chat_template_utils, "datetime")]
    with mock.patch.object(*places[0], Then), mock.patch.object(*places[1], Then):
        return call("train", "--config", config)


def digests(run_dir):
    return [line["weights_digest"] for line in steady_metrics(run_dir)]


def settings(run_dir):
    return json.loads((run_dir / "journal.jsonl").read_text().splitlines()[0])["settings"]


def refusal(tmp_path, model, **arguments):
    """What a run is refused with, before a model is built."""
    with mock.patch("shardes.session.open_session", side_effect=AssertionError("the model was loaded")):
        result = train(tmp_path, model, **arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("Error: ")
    assert not (tmp_path / "run").exists()
    return result.stderr


def test_a_run_keeps_the_date_of_its_prompts(tmp_path, dated):
    result = train(tmp_path, dated, "whole", day=3)
    assert result.returncode == 0, result.stderr
    assert settings(tmp_path / "whole")["task.date"] == "2026-01-03"
    assert train(tmp_path, dated, "parts", day=3, es__iterations=2).returncode == 0
    assert train(tmp_path, dated, "parts", day=4).returncode == 0
    whole = digests(tmp_path / "whole")
    assert digests(tmp_path / "parts") == whole
    assert len(set(whole)) == 4
    # On another day, another run; and no other date for this one.
    assert train(tmp_path, dated, "other", day=4).returncode == 0
    assert (
        settings(tmp_path / "other")["task.prompts sha256"]
        != settings(tmp_path / "whole")["task.prompts sha256"]
    )
    assert train(tmp_path, dated, "given", day=4, task__date="2026-01-03").returncode == 0
    assert digests(tmp_path / "given") == whole
    result = train(tmp_path, dated, "whole", day=3, task__date="2026-01-04", es__iterations=5)
    assert result.returncode == 2
    assert 'task.date: the run has "2026-01-03", this configuration "2026-01-04"' in result.stderr
    # An evaluation asks what the run asked.
    with mock.patch("shardes.evaluation.summary.evaluate_model", return_value=({}, [])) as evaluate:
        result = call("shardes", "evaluate", "--trust-remote-code", "--model", tmp_path / "whole")
        assert result.returncode == 0, result.stderr
    assert evaluate.call_args.kwargs["encoder"].told_date == "2026-01-03"


def test_a_run_goes_on_with_the_same_prompts_only(tmp_path, model):
    assert train(tmp_path, model, es__iterations=2).returncode == 0
    assert "task.date" not in settings(tmp_path / "run")
    same = model_of(tmp_path / "same", chat_template=STRICT.replace("no tools", "none"))
    assert train(tmp_path, same, es__iterations=3).returncode == 0, "a template that makes the same prompts"
    other = model_of(tmp_path / "other", chat_template=STRICT.replace("assistant", "model"))
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    result = train(tmp_path, other)
    assert result.returncode == 2
    assert "  task.prompts sha256: the run has " in result.stderr
    assert "its chat template" in result.stderr
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before


BAD = {
    "surrogate": {"prompt": "a\ud800", "n": 9},
    "64 positions": {"prompt": "a b " * 40, "n": 9},
    "no tools": {"prompt": [{"role": "tool", "content": "a"}], "n": 9},
}


def train_as_before(*arguments, **changes):
    """Trains as a version did that tried rows only when it came to them, and recorded no prompts."""
    patches = [
        mock.patch("shardes.rollout.preparing._askable", lambda task, rows, *_, **__: list(rows)),
        mock.patch("shardes.rollout.encoding.PromptEncoder.sha256_of", lambda *_: None),
        mock.patch("shardes.rollout.encoding.PromptEncoder.told_date", None),
    ]
    with patches[0], patches[1], patches[2]:
        return train(*arguments, **changes)


def test_a_run_that_a_row_would_have_ended_goes_on_without_it(tmp_path, model):
    rows, run = [*ROWS, *BAD.values()], tmp_path / "run"
    # Three of ten rows are asked in an iteration, so it comes to all of them.
    result = train_as_before(tmp_path, model, rows=rows, es__seed=2)
    assert result.returncode == 2
    begun = (run / "journal.jsonl").read_bytes()
    assert b'"type":"update"' in begun
    assert "task.prompts sha256" not in settings(run)
    result = train(tmp_path, model, rows=rows, es__seed=2)
    assert result.returncode == 2
    assert "rows.jsonl line 8: " in result.stderr
    assert "task.on_prompt_error=exclude" in result.stderr
    assert (run / "journal.jsonl").read_bytes() == begun
    result = train(tmp_path, model, rows=rows, es__seed=2, task__on_prompt_error="exclude")
    assert result.returncode == 0, result.stderr
    assert "task.data: 3 of 10 rows are left out" in result.stderr
    for line, words in zip((8, 9, 10), BAD, strict=True):
        assert f"rows.jsonl line {line}: " in result.stderr
        assert words in result.stderr
    assert (run / "journal.jsonl").read_bytes().startswith(begun)
    assert len(steady_metrics(run)) == 5
    # From its beginning, such a run is one on the other rows.
    assert train(tmp_path, model, "left_out", rows=rows, task__on_prompt_error="exclude").returncode == 0
    assert train(tmp_path, model, "never_there").returncode == 0
    assert digests(tmp_path / "left_out") == digests(tmp_path / "never_there")
    result = train(tmp_path, model, "none", rows=list(BAD.values()), task__on_prompt_error="exclude")
    assert result.returncode == 2
    assert "no row can be asked; the first one: task.data: " in result.stderr


def test_a_journal_that_names_no_date_takes_todays_and_says_so(tmp_path, dated):
    assert train_as_before(tmp_path, dated, es__iterations=1).returncode == 0
    result = train(tmp_path, dated, es__iterations=2, day=5)
    assert result.returncode == 0
    assert "does not say which: it is now 2026-01-05; for another: task.date" in result.stderr


@pytest.mark.parametrize("words", BAD)
@pytest.mark.parametrize("key", ["data", "heldout_data"])
def test_a_row_that_cannot_be_asked_is_named_before_the_model_is_loaded(tmp_path, model, words, key):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n\n" + json.dumps(BAD[words]) + "\n")
    message = refusal(tmp_path, model, **{f"task__{key}": str(file)})
    assert f"task.{key}: {file} line 3: " in message
    assert words in message


HOSTILE = {
    "loop": ({"chat_template": LOOP}, {}, "takes more than 0.5 s of processor time"),
    "memory": ({"chat_template": "{{ 'x' * 10 ** 11 }}"}, {}, "needs more than 1.00 GiB of memory"),
    "none": ({"chat_template": None}, {}, "no chat template"),
    "named": ({"chat_template": {"a": CHAT, "b": CHAT}}, {}, "several chat templates, a, b, and none"),
    "added": ({"vocab_size": 20}, {}, "but the model has embeddings for 20 tokens only"),
    "typo": ({}, {"task__template_arguments": {"thinking": True}}, "the chat template has no 'thinking'"),
    "ours": ({}, {"task__template_arguments": {"tokenize": True}}, "tokenize cannot be given"),
    "no date": (
        {},
        {"task__date": "2026-01-03"},
        "task.date: got 2026-01-03, but no prompt has a date in it",
    ),
    "own loop": ({}, {"task__template": LOOP}, "task.template takes more than 0.5 s of processor time"),
    "own power": ({}, {"task__template": "{{ 9 ** (9 ** 9) }}"}, "task.template: reading it takes more"),
    "own random": ({}, {"task__template": "{{ [n, 2] | random }}"}, "No filter named 'random'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_templates_and_vocabularies_that_cannot_be_used_end_with_one_message(tmp_path, case, monkeypatch):
    monkeypatch.setattr("shardes.rollout.encoding.SECONDS", 0.5)
    monkeypatch.setattr("shardes.tasks.templates.SECONDS", 0.5)
    tokenizer, changes, words = HOSTILE[case]
    assert words in refusal(tmp_path, model_of(tmp_path / "model", **tokenizer), **changes)


def test_broken_tokenizers_end_with_one_message(tmp_path):
    broken = model_of(tmp_path / "broken")
    (broken / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "its tokenizer cannot be loaded" in refusal(tmp_path, broken)
    os.mkfifo(broken / "tokenizer.json")
    assert "is a pipe, and not a file" in refusal(tmp_path, broken)
    (broken / "tokenizer.json").unlink()
    with (broken / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    assert "has 1099511627776 bytes" in refusal(tmp_path, broken)
    for content in ("{", "[]", '{"version": 3}', '{"model": {"type": "BPE", "vocab": 1}}', "[" * 100_000):
        (broken / "tokenizer.json").write_text(content)
        assert "its tokenizer cannot be loaded" in refusal(tmp_path, broken)


def test_tokens_that_fill_rows_change_nothing(tmp_path):
    """A pad token beyond the embedding, or neither a pad nor an end token, against one that the model has."""
    rows = [{"prompt": "the film" + " is good" * (i % 3), "n": i} for i in range(7)]
    found = {}
    tokenizers = {
        "usual": {"pad_token": "<|im_end|>"},
        "beyond": {"pad_token": "<fill>"},
        "none": {"eos_token": None},
    }
    for name, tokens in tokenizers.items():
        model = model_of(tmp_path / name, **tokens)
        result = train(tmp_path, model, f"{name}_run", rows=rows)
        assert result.returncode == 0, result.stderr
        found[name] = digests(tmp_path / f"{name}_run")
    assert found["usual"] == found["beyond"] == found["none"]


def test_the_step_rule_wants_several_problems_that_can_be_asked(tmp_path, model):
    rows = [ROWS[0], {"prompt": [{"role": "tool", "content": "film"}], "n": 1}]
    changes = {"task__on_prompt_error": "exclude", "es__step_rule": "reliability"}
    result = train(tmp_path, model, rows=rows, **changes)
    assert result.returncode == 2
    assert "es.step_rule: reliability measures how members' rewards differ" in result.stderr
    assert "only one that can be asked; give more, or set es.step_rule: none" in result.stderr
    assert not (tmp_path / "run").exists()
