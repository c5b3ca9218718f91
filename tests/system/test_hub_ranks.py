"""A model of the hub on several ranks: fetched once on each machine, and one message where that fails."""

import json

import pytest
import yaml

from tests.helpers.hub_server import hub_server
from tests.helpers.models import tiny_model, tree
from tests.helpers.ranks import Ranks, run_ranks

NAME = "some-lab/tiny"


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes the arguments of two ranks, with variables for them."""
    with hub_server() as hub:
        hub.add(NAME, tiny_model(tmp_path / "repository", tied=True))

        def make(name, **variables):
            found = {"HUB": hub.url, "CACHES": str(tmp_path / f"{name}-caches"), **variables}
            for key, value in found.items():
                monkeypatch.setenv(key, value)
            changes = {"parallel__backend": "single", "es__iterations": 1, "eval__every": 0}
            config = tmp_path / f"{name}.yaml"
            config.write_text(yaml.safe_dump(tree(tmp_path, model=NAME, run_dir=tmp_path / name, **changes)))
            return ["-m", "tests.helpers.hub_rank", "--config", str(config)]

        yield hub, make


@pytest.mark.slow
def test_each_machine_fetches_once(job, tmp_path):
    hub, make = job
    digests, num_listings = [], []
    for name, variables, num_machines in (("one", {}, 1), ("two", {"NODES": "yes"}, 2)):
        arguments = make(name, **variables)
        hub.fetched.clear()
        hub.num_listings = 0
        run_ranks(arguments, world_size=2, log_dir=tmp_path / f"{name}-logs")
        assert {file: hub.fetched.count(file) for file in ("model.safetensors", "tokenizer.json")} == {
            "model.safetensors": num_machines,
            "tokenizer.json": num_machines,
        }
        assert hub.fetched.count("config.json") == num_machines
        assert len(list((tmp_path / f"{name}-caches").iterdir())) == num_machines
        num_listings.append(hub.num_listings)
        line = (tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]
        digests.append(json.loads(line)["weights_digest"])
    assert digests[0] == digests[1]
    # The client locks the files that it fetches, so those alone would be one of each in any case.
    assert num_listings[0] > 0
    assert num_listings[1] == 2 * num_listings[0]


@pytest.mark.slow
@pytest.mark.parametrize("unreachable", [1, pytest.param(0, marks=pytest.mark.exhaustive)])
def test_a_machine_without_the_hub_ends_all_with_one_message(job, tmp_path, unreachable):
    arguments = job[1]("run", NODES="yes", UNREACHABLE=str(unreachable))
    with Ranks(arguments, world_size=2, log_dir=tmp_path / "logs") as ranks:
        assert ranks.wait(120) == [2, 2], ranks.output()
        output = ranks.output()
    assert output.count("cannot be reached") == 1, output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "journal.jsonl").exists()
