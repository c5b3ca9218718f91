"""Weights and digest, each against a plain calculation."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.es.update import Perturbation, Update
from shardes.models.checkpoint import Checkpoint
from shardes.noise import Region
from shardes.noise.kinds.gaussian import normals
from shardes.session import open_session
from shardes.weights import digest_cpu
from shardes.weights.digest import add_digest
from shardes.weights.master_digest import master_digest
from tests.helpers.models import make_config, tiny_model

SEED = 2**40 + 5

# A model's weights against NumPy.


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model", tied=True)


@pytest.fixture(params=["float32", "bfloat16"])
def session(request, model_dir, tmp_path):
    config = make_config(
        tmp_path, model=model_dir, run_dir=tmp_path / "run", model__dtype=request.param, es__seed=SEED
    )
    with open_session(config) as session:
        yield session


def file_values(model_dir):
    """The file's tensors, flat, in float32, by name."""
    checkpoint = Checkpoint(model_dir)
    found = {}
    for name, stored in sorted(checkpoint.tensors.items()):
        found[name] = torch.empty(stored.num_elements)
        size = found[name].numel()
        checkpoint.read(name, region=Region(0, size, 0, size), out=found[name])
    return found


def model_values(session):
    """What the model computes with, by name: read from its parameters, not from the shards."""
    return {
        name: p.detach().reshape(-1).clone()
        for name, p in sorted(session.backend.gathered().named_parameters())
    }


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name in found:
        assert found[name].dtype == wanted[name].dtype
        assert torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)), name


def eps(param_id, length, *, iteration, direction):
    return normals(
        seed=SEED, iteration=iteration, direction=direction, param_id=param_id, start=0, length=length
    )


def perturbed(centre, *, iteration, direction, sigma):
    found = {}
    for param_id, (name, values) in enumerate(centre.items()):
        noise = eps(param_id, values.numel(), iteration=iteration, direction=direction)
        step = torch.from_numpy(np.float32(sigma) * noise)
        found[name] = (values.float() + step).to(values.dtype)
    return found


def updated(master, *, iteration, coefficients):
    found = {}
    for param_id, (name, values) in enumerate(master.items()):
        total = np.zeros(values.numel(), np.float32)
        for direction, coefficient in enumerate(coefficients):
            noise = eps(param_id, values.numel(), iteration=iteration, direction=direction)
            total = total + np.float32(coefficient) * noise
        found[name] = values + torch.from_numpy(total)
    return found


def rounded(tensors, dtype):
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def test_perturbing_gives_the_oracles_bits_and_centre_restores_exactly(session, model_dir):
    centre = rounded(file_values(model_dir), session.backend.dtype)
    assert_same_bits(model_values(session), centre)
    for iteration, direction in itertools.product((0, 3), (0, 1, 7)):
        session.weights.perturb(Perturbation(iteration, direction, 0.01))
        wanted = perturbed(centre, iteration=iteration, direction=direction, sigma=0.01)
        assert_same_bits(model_values(session), wanted)
        changed = [(wanted[name] != centre[name]).float().mean() for name in centre]
        assert min(changed) > 0.5
    session.weights.centre()
    assert_same_bits(model_values(session), centre)


def test_updates_give_the_oracles_bits_at_the_masters_precision(session, model_dir):
    master = file_values(model_dir)
    dtype = session.backend.dtype
    for iteration, coefficients in enumerate([[1e-4, -2e-4, 0.0], [3e-5, 0.0, 1e-5]]):
        session.weights.perturb(Perturbation(iteration, 0, 0.01))
        session.weights.update(Update(iteration, coefficients))
        master = updated(master, iteration=iteration, coefficients=coefficients)
        session.weights.perturb(Perturbation(iteration + 1, 5, 0.02))
        around = perturbed(rounded(master, dtype), iteration=iteration + 1, direction=5, sigma=0.02)
        assert_same_bits(model_values(session), around)
    session.weights.centre()
    assert_same_bits(model_values(session), rounded(master, dtype))
    assert (
        master_digest(session.weights)
        == sum(digest(values, param_id=i, start=0) for i, values in enumerate(master.values())) % 2**64
    )


def test_the_master_of_a_bfloat16_model_has_the_precision_of_the_file(model_dir, tmp_path):
    config = make_config(tmp_path, model=model_dir, run_dir=tmp_path / "run", model__dtype="bfloat16")
    with open_session(config) as session:
        stored = file_values(model_dir)
        whole = sum(digest(values, param_id=i, start=0) for i, values in enumerate(stored.values()))
        narrow = sum(digest(v.bfloat16().float(), param_id=i, start=0) for i, v in enumerate(stored.values()))
        assert master_digest(session.weights) == whole % 2**64 != narrow % 2**64
        assert session.identity["base_weights_digest"] == session.digest() == f"{whole % 2**64:016x}"


def test_tied_weights_are_one_parameter(session):
    names = [shard.name for shard in session.backend.shards]
    assert names == sorted(names)
    assert [shard.param_id for shard in session.backend.shards] == list(range(len(names)))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    session.weights.perturb(Perturbation(0, 0, 1.0))
    model = session.backend.gathered()
    assert model.lm_head.weight is model.model.embed_tokens.weight


# The digest against big integers.

MASK = 2**64 - 1


def mix(value):
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def plain_digest(bits, *, param_id, start):
    total = 0
    for index, word in enumerate(bits, start=start):
        address = mix((index * 0x9E3779B97F4A7C15 + param_id * 0x5E2D58D8B3BCDF1B) & MASK)
        total += mix(address ^ word)
    return total & MASK


def digest(values, *, param_id, start):
    total = torch.zeros(1, dtype=torch.int64)
    add_digest(total, values, region=Region(param_id, 2**34, start, values.numel()))
    return int(total) & MASK


def as_floats(bits):
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32))


words = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@settings(deadline=None)
@given(bits=words, param_id=st.integers(0, 2**24 - 1), start=st.integers(0, 2**34 - 60), data=st.data())
def test_the_digest_agrees_with_big_integers_and_with_the_sum_over_any_cuts(bits, param_id, start, data):
    whole = digest(as_floats(bits), param_id=param_id, start=start)
    assert whole == plain_digest(bits, param_id=param_id, start=start)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(bits)), max_size=5)))
    parts = [
        digest(as_floats(bits[low:high]), param_id=param_id, start=start + low)
        for low, high in itertools.pairwise([0, *cuts, len(bits)])
    ]
    assert sum(parts) % 2**64 == whole


def test_the_digest_does_not_depend_on_its_chunks(monkeypatch):
    bits = list(range(2**31 - 30, 2**31 + 30))
    whole = digest(as_floats(bits), param_id=3, start=7)
    for chunk in (1, 7, 59, 60, 61):
        monkeypatch.setattr(digest_cpu, "_PART", chunk)
        assert digest(as_floats(bits), param_id=3, start=7) == whole


def test_the_digest_sees_every_bit_every_place_and_the_parameter():
    bits = [0x3F800000, 0x00000000, 0xBF99999A, 0x7FC00001, 0x00000001]
    address = {"param_id": 2, "start": 100}
    seen = {digest(as_floats(bits), **address)}
    for position, bit in itertools.product(range(len(bits)), range(32)):
        changed = list(bits)
        changed[position] ^= 1 << bit
        seen.add(digest(as_floats(changed), **address))
    assert len(seen) == 1 + len(bits) * 32
    for i, j in itertools.combinations(range(len(bits)), 2):
        swapped = list(bits)
        swapped[i], swapped[j] = bits[j], bits[i]
        seen.add(digest(as_floats(swapped), **address))
    assert len(seen) == 1 + len(bits) * 32 + 10
    seen |= {digest(as_floats(bits), param_id=param_id, start=100) for param_id in (0, 1, 3, 2**24 - 1)}
    seen |= {digest(as_floats(bits), param_id=2, start=start) for start in (0, 99, 101, 100 + 2**32)}
    assert len(seen) == 1 + len(bits) * 32 + 10 + 8
