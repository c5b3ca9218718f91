"""`rollout.micro_batch_size: auto`: what is tried, what all ranks agree on, and that a run keeps it."""

import logging
import shutil

import pytest
import torch
import yaml

from shardes.rollout.engines.transformers import engine as engine_module
from shardes.rollout.engines.transformers.decoder import Decoder
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from tests.helpers.exports import fingerprint
from tests.helpers.models import make_config, tiny_model, tree
from tests.helpers.runs import run_cases

NUM_PROBLEMS = 9  # of an iteration, in tests.helpers.models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True)


@pytest.fixture
def memory(monkeypatch):
    """Lets forwards of more rows than given run out of memory; notes the numbers of rows."""
    decode, seen = Decoder.decode, []

    def limit(most):
        def limited(self, model, batch, **keywords):
            seen.append(len(batch.rows))
            if len(batch.rows) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return decode(self, model, batch, **keywords)

        monkeypatch.setattr(Decoder, "decode", limited)
        seen.clear()
        return seen

    return limit


def train(config):
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
    return yaml.safe_load((config.run.dir / "config.yaml").read_text())["rollout"]["micro_batch_size"]


@pytest.mark.parametrize(
    ("most", "wanted", "tries"), [(100, 9, [9]), (9, 9, [9]), (8, 5, [9, 5]), (2, 2, [9, 5, 3, 2])]
)
def test_the_size_is_halved_until_it_fits(tmp_path, model, memory, caplog, most, wanted, tries):
    caplog.set_level(logging.INFO)
    config = make_config(
        tmp_path, model=model, run_dir=tmp_path / "run", rollout__micro_batch_size="auto", eval__every=0
    )
    seen = memory(most)
    assert train(config) == wanted
    assert seen[: len(tries)] == tries
    assert max(seen[len(tries) :]) <= wanted
    assert f"rollout.micro_batch_size: auto is {wanted}" in caplog.text


def test_without_a_size_a_cpu_has_its_own(tmp_path, model):
    changes = {"rollout__micro_batch_size": None, "eval__every": 0, "es__iterations": 1}
    assert train(make_config(tmp_path, model=model, run_dir=tmp_path / "run", **changes)) == 32


def test_where_too_much_memory_ends_the_process_a_formula_is_asked(tmp_path, model, monkeypatch):
    of_four = []

    def free(device):
        return of_four[0]

    config = make_config(
        tmp_path, model=model, run_dir=tmp_path / "run", rollout__micro_batch_size="auto", eval__every=0
    )
    monkeypatch.setattr(engine_module, "free_bytes", free)
    bytes_for = engine_module.TransformersEngine.bytes_for

    def noting(self, batch):
        need = bytes_for(self, batch)
        if not of_four:
            of_four.append(need * 4 // len(batch.rows))
        return need

    monkeypatch.setattr(engine_module.TransformersEngine, "bytes_for", noting)
    assert train(config) == 3


def test_a_run_goes_on_with_the_size_that_it_began_with(tmp_path, model, memory):
    def config(name, iterations, size):
        return make_config(
            tmp_path,
            model=model,
            run_dir=tmp_path / name,
            rollout__micro_batch_size=size,
            es__iterations=iterations,
        )

    whole = config("whole", 4, 5)
    memory(8)
    assert train(config("run", 2, "auto")) == 5
    memory(100)
    assert train(config("run", 4, "auto")) == 5
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    # As a number it is a setting like any other, and the same result.
    assert train(config("copy", 4, 5)) == 5
    train(whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "whole")]
    digests = [[yaml.safe_load(line)["weights_digest"] for line in of] for of in lines]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_ranks_agree_on_what_the_poorest_has_memory_for(tmp_path, model):
    def case(name, mode, size):
        return tree(
            tmp_path,
            model=model,
            run_dir=tmp_path / name,
            parallel__backend="fsdp",
            rollout__gather=mode,
            rollout__micro_batch_size=size,
            es__iterations=2,
        )

    # Where ranks share an iteration's problems, each gets some; rank 1 cannot take its first share.
    # In step nothing is tried, since the others would wait.
    sizes = {"member": 3, "iteration": 5, "layer": 5}
    autos = [case(f"auto-{mode}", mode, "auto") for mode in sizes]
    shortages = {i: [["decode", 1, 0]] for i in (0, 1)}
    found = run_cases(tmp_path, "auto", autos, 2, shortages=shortages)
    for mode, size in sizes.items():
        config = yaml.safe_load((tmp_path / f"auto-{mode}" / "config.yaml").read_text())
        assert config["rollout"]["micro_batch_size"] == size
        given = make_config(
            tmp_path,
            model=model,
            run_dir=tmp_path / f"given-{mode}",
            rollout__micro_batch_size=size,
            es__iterations=2,
        )
        train(given)
    digests = {
        mode: [
            yaml.safe_load((tmp_path / f"{kind}-{mode}" / "metrics.jsonl").read_text().splitlines()[-1])[
                "weights_digest"
            ]
            for kind in ("auto", "given")
        ]
        for mode in sizes
    }
    assert all(one == other for one, other in digests.values())
    assert len(found) == len(sizes)
    assert fingerprint(tmp_path / "auto-export0") == found[0]
