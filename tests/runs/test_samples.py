"""What a run shows of its answers, and how it says that it is getting on."""

import json

import pytest

from shardes.rollout.aggregate import NUM_SAMPLES
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from tests.helpers.models import make_config, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


def train(tmp_path, model, **changes):
    config = make_config(tmp_path, model=model, run_dir=tmp_path / "run", **({"es__iterations": 5} | changes))
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
    return [json.loads(line) for line in (config.run.dir / "samples.jsonl").read_text().splitlines()]


def test_answers_of_the_first_member_are_shown_every_few_iterations(tmp_path, model):
    lines = train(tmp_path, model, log__samples_every=2, eval__every=0)
    assert [line["iteration"] for line in lines] == [i for i in (0, 2, 4) for _ in range(NUM_SAMPLES)]
    assert {line["member"] for line in lines} == {0}
    problems = [json.loads(line)["prompt"] for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert all(line["prompt"] in problems and line["token_ids"] for line in lines)
    assert len({line["completion"] for line in lines}) > 2


def test_none_are_if_none_are_wanted(tmp_path, model):
    lines = train(tmp_path, model, log__samples_every=0, eval__every=5)
    assert {line["iteration"] for line in lines} == {0, 5}
    assert all("member" not in line for line in lines)


def test_shown_answers_stay_as_they_were_when_a_run_goes_on(tmp_path, model):
    lines = train(tmp_path, model, log__samples_every=2)
    samples = tmp_path / "run" / "samples.jsonl"
    journal = tmp_path / "run" / "journal.jsonl"
    records = [json.loads(line) for line in journal.read_bytes().splitlines()]
    # The job died in iteration 4, after the samples of its first member but before that was recorded.
    keep = next(i for i, r in enumerate(records) if (r.get("iteration"), r.get("member")) == (4, 0))
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:keep]))
    assert train(tmp_path, model, log__samples_every=2) == lines
    assert len(samples.read_text().splitlines()) == len(lines)


def test_the_bar_tells_members_and_tokens(tmp_path, model, monkeypatch):
    told = []

    class Bar:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            told.append("iteration")

        def set_postfix_str(self, text):
            told.append(text)

    monkeypatch.setattr("shardes.runs.reporting.tqdm", Bar)
    train(tmp_path, model, es__iterations=1, es__population=3)
    assert [text.split(",")[0] for text in told] == ["1/3 members", "2/3 members", "3/3 members", "iteration"]
    assert all(int(text.split()[2]) > 0 and text.endswith("tokens/s") for text in told[:3])
