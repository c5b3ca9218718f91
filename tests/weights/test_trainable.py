"""Chosen parameters, and masters that pass through the device in chunks."""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.backends.build import make_backend
from shardes.backends.shard import ShardSpan
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.es.optimizers import Adam, Decay
from shardes.es.update import Perturbation, Update
from shardes.models.checkpoint import Checkpoint
from shardes.session import open_session
from shardes.weights.export_view import gather_centre
from shardes.weights.master import Weights
from shardes.weights.master_digest import master_digest
from shardes.weights.trainable import select_trainable
from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import make_config, tiny_model, tree

NAMES = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.10.mlp.up_proj.weight",
    "model.norm.weight",
]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        ([".*"], NAMES),
        ([r".*\.mlp\..*"], NAMES[2:4]),
        ([".*", "!.*embed.*", "!lm_head.*"], NAMES[2:]),
        (["!.*", ".*norm.*"], NAMES[4:]),
        ([".*", r"!model\.layers\..*", r"model\.layers\.10\..*"], [*NAMES[:2], *NAMES[3:]]),
        ([r"model\.layers\.\d\..*", "lm_head.weight"], [NAMES[0], NAMES[2]]),
    ],
)
def test_the_last_pattern_that_matches_a_whole_name_decides(patterns, wanted):
    assert select_trainable(NAMES, patterns) == set(wanted)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (
            [".*", "!.*embedding.*"],
            "'!.*embedding.*' matches no parameter; names near it: model.embed_tokens",
        ),
        (["model.layer.0.mlp.up_proj.weight"], "names near it: model.layers.0.mlp.up_proj.weight"),
        (["mlp"], "a pattern must match the whole name, for example model.layers.0.mlp.up_proj.weight: try"),
        (["tied.weight"], "tied.weight is tied to another parameter"),
        (["!.*"], "leaves nothing to train"),
        ([".*norm.*", "!.*"], "leaves nothing to train"),
        ([], "leaves nothing to train"),
    ],
)
def test_what_selects_nothing_is_refused(patterns, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        select_trainable(NAMES, patterns, aliases={"tied.weight"})
    assert str(caught.value).startswith("es.trainable: ")


@settings(deadline=None)
@given(length=st.integers(1, 9), rows=st.integers(1, 6), gap=st.integers(0, 4), most=st.integers(1, 60))
def test_the_parts_of_a_span_are_its_elements_in_order(length, rows, gap, most):
    span = ShardSpan(5, 11, length, rows=rows, stride=length + gap)

    def elements(span):
        offsets = [(row, i) for row in range(span.rows) for i in range(span.length)]
        return [
            (span.local_start + row * span.length + i, span.global_start + row * span.stride + i)
            for row, i in offsets
        ]

    parts = list(span.parts(most))
    assert [e for part in parts for e in elements(part)] == elements(span)
    assert max(part.num_elements for part in parts) <= most
    assert list(span.parts(None)) == [span]


ANCHORED = {"optimizer": Adam((0.9, 0.99), 1e-8), "decay": Decay(0.5, is_anchored=True)}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model", tied=True)


def weights_of(config, **arguments):
    backend = make_backend(config, group=Group(0, 1, torch.device("cpu")))
    weights = Weights(backend, seed=4, **arguments)
    weights.load(Checkpoint(config.model.path))
    return backend, weights


def values(backend):
    return {shard.name: shard.local.clone() for shard in backend.shards}


def masters(weights):
    return {name: master.clone() for name, master in weights.masters.tensors.items()}


def equal(one, other):
    assert one.keys() == other.keys()
    return {name: torch.equal(one[name], other[name]) for name in one}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_parameters_stay_as_in_the_file_and_the_others_move_as_ever(tmp_path, model_dir, dtype):
    config = make_config(tmp_path, model=model_dir, run_dir=tmp_path / "run", model__dtype=dtype)
    (all_backend, everything), (backend, some) = (
        weights_of(config),
        weights_of(config, trainable=[".*mlp.*", "!.*layers.1.*"]),
    )
    trained = {shard.name for shard in some.trained}
    assert trained == {f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "gate", "up")}
    assert masters(some).keys() == trained
    before = values(backend)
    assert all(equal(before, values(all_backend)).values())
    for weights in (everything, some):
        weights.perturb(Perturbation(0, 1, 0.1))
    same = equal(values(backend), values(all_backend))
    assert {name for name, is_same in same.items() if is_same} == trained
    same = equal(values(backend), before)
    assert {name for name, is_same in same.items() if not is_same} == trained
    for weights in (everything, some):
        weights.update(Update(0, [0.1, -0.2]))
        weights.centre()
    assert {name for name, is_same in equal(values(backend), before).items() if not is_same} == trained
    for name in trained:
        assert torch.equal(masters(some)[name], masters(everything)[name])


def test_the_digest_covers_frozen_parameters_too(tmp_path, model_dir):
    config = make_config(tmp_path, model=model_dir, run_dir=tmp_path / "run")
    backend, some = weights_of(config, trainable=[".*mlp.*"])
    _, everything = weights_of(config)
    # In float32 a frozen weight and a master have the same bits.
    assert master_digest(some) == master_digest(everything)
    other = tiny_model(tmp_path / "other", tied=True)
    frozen = next(s for s in backend.shards if "mlp" not in s.name)
    path = other / "model.safetensors"
    stored = Checkpoint(other).tensors[frozen.name]
    data = bytearray(path.read_bytes())
    data[stored.offset] ^= 1
    path.write_bytes(data)
    _, changed = weights_of(make_config(tmp_path, model=other, run_dir=tmp_path / "r"), trainable=[".*mlp.*"])
    assert master_digest(changed) != master_digest(some)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [5, 64, 67, 4096, 10**6])
@pytest.mark.parametrize("steps", [{}, ANCHORED], ids=["plain", "anchored adam"])
def test_chunks_of_any_size_give_the_same_bits(tmp_path, model_dir, dtype, chunk, steps):
    if steps and chunk < 64:
        pytest.skip("a file is read for each chunk")
    config = make_config(tmp_path, model=model_dir, run_dir=tmp_path / "run", model__dtype=dtype)
    keys = steps | {"trainable": [".*", "!.*embed.*"]}
    (backend, plain), (other, chunked) = (
        weights_of(config, **keys),
        weights_of(config, **keys, on_host=True, chunk_elements=chunk),
    )
    assert chunked.masters._passing.numel() == chunk
    start = masters(chunked)
    for iteration in range(2):
        for weights in (plain, chunked):
            weights.perturb(Perturbation(iteration, 1, 0.1))
        assert all(equal(values(backend), values(other)).values())
        for weights in (plain, chunked):
            weights.update(Update(iteration, [0.1, -0.2, 0.05], alpha=0.1))
            weights.centre()
        assert all(equal(values(backend), values(other)).values())
        assert all(equal(masters(plain), masters(chunked)).values())
        assert master_digest(plain) == master_digest(chunked)
    assert not any(equal(start, masters(chunked)).values())
    for mine, its in zip(backend.shards, other.shards, strict=True):
        assert torch.equal(gather_centre(plain, mine), gather_centre(chunked, its))


def test_masters_of_a_cpu_model_are_in_host_memory_anyway(tmp_path, model_dir):
    config = make_config(tmp_path, model=model_dir, run_dir=tmp_path / "run", weights__master_device="cpu")
    with open_session(config) as session:
        assert session.weights.masters._passing is None
        assert {master.device.type for master in session.weights.masters.tensors.values()} == {"cpu"}


def test_the_choice_is_part_of_what_a_run_is_and_of_its_export(tmp_path, model_dir):
    path = tmp_path / "config.yaml"
    config = tree(tmp_path, model=model_dir, run_dir=tmp_path / "run", es__trainable=[".*", "!.*mlp.*"])
    path.write_text(json.dumps(config))
    assert call("train", "--config", path).returncode == 0
    refused = call("train", "--config", path, 'es.trainable=[".*"]')
    assert refused.returncode == 2
    assert 'es.trainable: the run has [".*", "!.*mlp.*"], this configuration [".*"]' in refused.stderr
    wrong = call("train", "--config", path, 'es.trainable=[".*", "!.*mlq.*"]', f"run.dir={tmp_path / 'x'}")
    assert wrong.returncode == 2
    assert "es.trainable: '!.*mlq.*' matches no parameter" in wrong.stderr

    assert call("shardes", "export", tmp_path / "run", tmp_path / "out").returncode == 0
    base, out = (Checkpoint(directory) for directory in (model_dir, tmp_path / "out"))
    assert out.tensors.keys() == base.tensors.keys()

    def data(checkpoint, name):
        stored = checkpoint.tensors[name]
        size = stored.num_elements * stored.dtype.itemsize
        return stored.path.read_bytes()[stored.offset : stored.offset + size]

    same = {name for name in base.tensors if data(base, name) == data(out, name)}
    assert same == {name for name in base.tensors if "mlp" in name}
    assert call("shardes", "export", tmp_path / "run", tmp_path / "again").returncode == 0
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "out")
