"""Other noise and narrow masters: trained, replayed and sharded, they give the bytes of the definition."""

import json

import numpy as np
import pytest
import torch

from shardes.models.checkpoint import Checkpoint
from shardes.noise import Region
from shardes.noise.kinds.registry import make_kind
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from shardes.weights.export_view import gather_centre
from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import make_config, tiny_model, tree
from tests.helpers.noise_oracle import accumulated, same_bits
from tests.helpers.runs import run_cases

KINDS = {
    "signs": {"es__noise": "rademacher"},
    "narrow": {"weights__master": "model", "model__dtype": "bfloat16"},
    "narrow half": {"weights__master": "model", "model__dtype": "float16"},
    "low rank": {"es__noise": "low_rank", "es__rank": 2},
    "low rank, narrow": {"es__noise": "low_rank", "weights__master": "model", "model__dtype": "bfloat16"},
    "both": {"es__noise": "rademacher", "weights__master": "model", "model__dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), tied=True)


def train(tmp_path, model, **changes):
    """Trains in this process; returns the centre's values by name and the journal's updates."""
    config = make_config(tmp_path, model=model, run_dir=tmp_path / "run", **changes)
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
        shards = session.backend.shards
        values = {shard.name: gather_centre(session.weights, shard).view(-1).clone() for shard in shards}
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").read_text().splitlines()]
    return values, [line for line in lines if line["type"] == "update"]


def noise_of(changes):
    """What the oracle calls a run's noise."""
    noise = changes.get("es__noise", "gaussian")
    return make_kind(noise, rank=changes.get("es__rank", 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_definition_applied_to_its_journal(tmp_path, model, kind):
    changes = KINDS[kind]
    values, updates = train(tmp_path, model, **changes)
    dtype = getattr(torch, changes.get("model__dtype", "float32"))
    checkpoint = Checkpoint(model)
    shapes = {name: tuple(found.shape) for name, found in checkpoint.tensors.items()}
    assert all(np.any(update["coefficients"]) for update in updates)
    for param_id, name in enumerate(sorted(values)):
        size = values[name].numel()
        region = Region(param_id, size, 0, size, shape=shapes[name])
        master = torch.empty(size)
        checkpoint.read(name, region=region, out=master)
        if "weights__master" in changes:
            master = master.to(dtype)
        for update in updates:
            master = accumulated(
                master,
                region=region,
                coefficients=update["coefficients"],
                directions=range(len(update["coefficients"])),
                kind=noise_of(changes),
                seed=0,
                iteration=update["iteration"],
            )
        assert same_bits(values[name], master.to(dtype)), name


def test_a_resumed_run_and_an_export_replay_every_kind(tmp_path, model):
    for kind, changes in KINDS.items():
        root = tmp_path / kind
        root.mkdir()
        whole, _ = train(root, model, **changes)
        (root / "again").mkdir()
        half = train(root / "again", model, **changes, es__iterations=1)
        finished, _ = train(root / "again", model, **changes)
        assert whole.keys() == finished.keys()
        assert all(same_bits(whole[name], finished[name]) for name in whole)
        for directory in (root, root / "again"):
            result = call("shardes", "export", directory / "run", directory / "export")
            assert result.returncode == 0, result.stderr
        assert fingerprint(root / "export") == fingerprint(root / "again" / "export")
        assert any(not same_bits(half[0][name], whole[name]) for name in whole)


@pytest.mark.slow
def test_sharding_changes_no_byte_of_any_kind(tmp_path, model):
    kinds = {kind: KINDS[kind] for kind in ("signs", "narrow", "low rank", "low rank, narrow")}

    def trees(name, **parallel):
        return [
            tree(tmp_path, model=model, run_dir=tmp_path / f"run-{name}-{kind}", **changes, **parallel)
            for kind, changes in kinds.items()
        ]

    wanted = run_cases(tmp_path, "oracle", trees("oracle"), 1)
    assert len({json.dumps(prints) for prints in wanted}) == len(kinds)
    assert run_cases(tmp_path, "zero3", trees("zero3", parallel__backend="zero3"), 3) == wanted
