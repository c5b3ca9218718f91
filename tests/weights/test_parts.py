"""Members that perturb a part of the weights are written as far as they differ from the one before."""

import contextlib

import pytest
import torch

from shardes import noise
from shardes.errors import UserError
from shardes.es.update import Perturbation, Update
from shardes.noise import Region
from shardes.session import open_session
from shardes.weights.gathered import GatheredWeights
from tests.helpers.models import make_config, tiny_model
from tests.helpers.noise_oracle import perturbed, same_bits

MEMBERS = [(0, 0), (0, 1), (0, 4), (0, 4), (2, 4), (2, 2)]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    model = tiny_model(root / "model", tied=True)
    config = make_config(root, model=model, run_dir=root / "run", model__dtype="bfloat16", es__subspaces=3)
    with open_session(config) as session:
        yield session


def assert_members(weights, member):
    iteration, direction = member
    for shard in weights.trained:
        region = Region(shard.param_id, shard.num_elements, 0, shard.num_elements)
        where = {"region": region, "seed": weights.seed, "iteration": iteration, "direction": direction}
        master = weights.masters.tensors[shard.name]
        wanted = perturbed(master, torch.bfloat16, sigma=0.1, kind=weights.kind, **where)
        assert same_bits(shard.local, wanted), (shard.name, member)


@pytest.mark.parametrize("make", [lambda weights: weights, lambda w: GatheredWeights(w.backend, w)])
def test_every_member_is_the_centre_and_its_own_part(session, make):
    """In the copy of a gathered model, which are the shards themselves in one process, as in shards."""
    weights = session.weights
    written = make(weights)
    for number in range(2):
        if isinstance(written, GatheredWeights):
            written.refresh()
        for member in MEMBERS:
            written.perturb(Perturbation(*member, 0.1))
            assert_members(weights, member)
        written.centre()
        written.perturb(Perturbation(0, 2, 0.1))
        assert_members(weights, (0, 2))
        weights.update(Update(number, [0.1, -0.2, 0.3, 0.05]))


def test_a_member_touches_its_part_and_the_last_one_s_alone(session):
    weights = session.weights
    weights.centre()
    weights.perturb(Perturbation(0, 0, 0.1))
    for shard in weights.trained:
        shard.local.fill_(9.0)
    weights.perturb(Perturbation(0, 1, 0.1))
    touched = torch.cat([shard.local != 9 for shard in weights.trained]).float().mean()
    assert 0.5 < touched < 0.8
    weights.perturb(Perturbation(0, 4, 0.1))  # the same part: nothing is restored
    weights.centre()


def test_after_a_write_that_failed_everything_is_written(session, monkeypatch):
    weights = session.weights
    weights.perturb(Perturbation(0, 0, 0.1))
    with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
        done = []

        def fails(*arguments, perturb=noise.perturb, **named):
            done.append(arguments)
            if len(done) == 3:
                raise RuntimeError
            perturb(*arguments, **named)

        patch.setattr(noise, "perturb", fails)
        weights.perturb(Perturbation(0, 1, 0.1))
    assert len(done) == 3
    weights.perturb(Perturbation(0, 2, 0.1))
    assert_members(weights, (0, 2))


def test_too_many_parts_for_the_model_are_refused(session, tmp_path):
    config = session.config.model_copy(
        update={"es": session.config.es.model_copy(update={"subspaces": 5000})}
    )
    with (
        pytest.raises(UserError, match=r"es.subspaces: got 5000, but .* have only \d+ blocks .* at most \d+"),
        open_session(config),
    ):
        pass
