"""Every architecture's checkpoint becomes the model that transformers loads from it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Transpose

from shardes.backends.build import make_backend
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.es.update import Update
from shardes.export.writer import export_model
from shardes.models.build import build_skeleton, load_model_config
from shardes.models.checkpoint import Checkpoint
from shardes.models.conversion import Conversion
from shardes.session import open_session
from shardes.weights.master import Weights
from shardes.weights.master_digest import checkpoint_digest
from tests.helpers.models import ARCHITECTURES, make_config, tiny_model

ALONE = Group(0, 1, torch.device("cpu"))
IDS = torch.arange(24).view(4, 6)


def load(tmp_path, model):
    backend = make_backend(make_config(tmp_path, model=model, run_dir=tmp_path / "run"), group=ALONE)
    weights = Weights(backend, seed=1)
    weights.load(Checkpoint(model))
    return backend.sharded_model


@torch.no_grad()
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loaded_model_is_the_one_that_transformers_loads(architecture, original, tmp_path):
    path = tiny_model(
        tmp_path / "model", tied=False, architecture=architecture, save_original_format=original
    )
    wanted = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = load(tmp_path, path)
    for (name, parameter), (its_name, its) in zip(
        found.named_parameters(), wanted.named_parameters(), strict=True
    ):
        assert name == its_name
        assert torch.equal(parameter, its), name
    assert torch.equal(found(IDS).logits, wanted(IDS).logits)


def rewrite(path, change):
    """Replaces a model's tensors by what ``change`` makes of them."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_missing_expert_is_named(tmp_path):
    path = tiny_model(tmp_path / "model", tied=False, architecture="mixtral")
    rewrite(path, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.down_proj .* hold 4 tensors for it"):
        load(tmp_path, path)


def test_a_missing_half_of_an_expert_is_named(tmp_path):
    path = tiny_model(tmp_path / "model", tied=False, architecture="mixtral")
    rewrite(path, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.1.w3.weight"))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.gate_up_proj .* hold 5 and 4 of its"):
        load(tmp_path, path)


def test_a_conversion_that_ranges_cannot_express_is_refused_by_name(tmp_path):
    path = tiny_model(tmp_path / "model", tied=False, architecture="mixtral")
    model_config = load_model_config(path, trust_remote_code=False)
    conversion = Conversion(build_skeleton(model_config, dtype=torch.float32, trust_remote_code=False))
    for converter in conversion._converters:
        converter.operations = [Transpose(), *converter.operations]
    with pytest.raises(UserError, match=r"w1\.weight .* would have to become .*save_original_format=False"):
        conversion.join(Checkpoint(path).tensors)


def test_two_tensors_for_one_parameter_are_refused(tmp_path):
    path = tiny_model(tmp_path / "model", tied=False, architecture="gpt_neox")
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["embed_out.weight"].clone()}))
    with pytest.raises(UserError, match=r"embed_out\.weight and lm_head\.weight are both"):
        load(tmp_path, path)


def test_what_transformers_ignores_in_files_is_ignored(tmp_path, monkeypatch):
    path = tiny_model(tmp_path / "model", tied=False, architecture="gpt_neox")
    rewrite(path, lambda tensors: tensors.update({"gpt_neox.layers.0.attention.bias": torch.ones(1, 1)}))
    load(tmp_path, path)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "gpt_neox"])
def test_an_export_of_a_converted_model_has_the_tensors_of_the_base_and_loads(architecture, tmp_path):
    model = tiny_model(tmp_path / "model", tied=False, architecture=architecture)
    with open_session(make_config(tmp_path, model=model, run_dir=tmp_path / "run")) as session:
        session.weights.update(Update(0, [0.1]))
        session.weights.centre()
        export_model(session, tmp_path / "export", iteration=1, settings={})
        wanted = session.backend.sharded_model(IDS).logits
        # What reads published checkpoints expects the names and shapes that these have.
        base, made = Checkpoint(model), Checkpoint(tmp_path / "export")
        assert {k: t.shape for k, t in made.tensors.items()} == {k: t.shape for k, t in base.tensors.items()}
        assert session.combined(checkpoint_digest(session.weights, made)) == session.digest(is_rounded=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    assert torch.equal(found(IDS).logits, wanted)
