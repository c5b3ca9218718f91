"""Members as terms of layers' outputs: against the same members as weights, for every architecture."""

import json
import re

import pytest
from transformers import FalconConfig, GPT2Config, NemotronConfig, OPTConfig

from shardes.session import open_session
from tests.helpers import terms_checks
from tests.helpers.models import ARCHITECTURES, make_config, tiny_model, tree
from tests.helpers.ranks import ROOT, run_ranks


def compare(tmp_path, model, *, rank, dtype="float32", **changes):
    """The largest difference of logits, and the size of what the perturbations do to them."""
    config = make_config(
        tmp_path,
        model=model,
        run_dir=tmp_path / "run",
        es__noise="low_rank",
        es__rank=rank,
        model__dtype=dtype,
        **changes,
    )
    with open_session(config) as session:
        return terms_checks.compare(session)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_terms_give_the_logits_of_perturbed_weights(architecture, tied, tmp_path):
    model = tiny_model(tmp_path / "model", tied=tied, architecture=architecture)
    error, effect = compare(tmp_path, model, rank=1 + tied)
    assert effect > 0.05
    assert error < 2e-4 * effect


# Modules of their own: a convolution of width one, which is a matrix the other way round; positions that an
# embedding finds by itself; a product with a transposed weight; a norm that adds 1 to its weight.
OTHERS = {
    "gpt2": (GPT2Config, {"n_embd": 66, "n_layer": 2, "n_head": 3}),
    "opt": (OPTConfig, {"ffn_dim": 101, "word_embed_proj_dim": 66}),
    "falcon": (FalconConfig, {"bias": True, "alibi": False}),
    "falcon, new": (FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 1}),
    "nemotron": (NemotronConfig, {"head_dim": 20}),
}


@pytest.mark.parametrize("architecture", OTHERS)
def test_terms_of_other_modules(tmp_path, monkeypatch, architecture):
    monkeypatch.setitem(ARCHITECTURES, architecture, OTHERS[architecture])
    model = tiny_model(tmp_path / "model", tied=True, architecture=architecture)
    error, effect = compare(tmp_path, model, rank=2)
    assert effect > 0.05
    assert error < 2e-4 * effect


@pytest.mark.parametrize("trainable", [".*proj.*", ".*bias", ".*norm.*", ".*embed.*"])
def test_frozen_parameters_have_no_terms(tmp_path, trainable):
    model = tiny_model(tmp_path / "model", tied=False, architecture="llama")
    error, effect = compare(tmp_path, model, rank=1, es__trainable=[trainable])
    assert effect > 0
    assert error < 1e-3 * effect


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_terms_of_split_layers_give_the_logits_of_perturbed_weights(tmp_path, world_size):
    """Three ranks divide no size of these models but the number of heads."""
    heads = {"num_heads": world_size, "num_kv_heads": world_size}
    cases = []
    for number, architecture in enumerate(ARCHITECTURES):
        path = tiny_model(tmp_path / architecture, tied=bool(number % 2), architecture=architecture, **heads)
        settings = {"parallel__backend": "tensor_parallel", "es__noise": "low_rank", "es__rank": 2}
        config = tree(tmp_path, model=path, run_dir=tmp_path / "run", **settings)
        cases.append({"config": config, "is_refused": architecture in ("mixtral", "qwen2_moe")})
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    script = ROOT / "tests" / "helpers" / "terms_checks.py"
    output = run_ranks([script, path], world_size=world_size, log_dir=tmp_path / "logs")
    named = (
        r"mlp\.experts\.\w+ is a parameter of model\.layers\.0\.mlp\.experts, a \w+, for which there is no"
    )
    assert len(re.findall(named, output)) == 2 * world_size, output
