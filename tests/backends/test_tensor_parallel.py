"""What tensor parallelism refuses, and why."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, GPT2Config

from shardes.backends.split_checks import check_architecture, check_experts, check_forward, check_heads
from shardes.backends.split_heads import norms_of_heads
from shardes.backends.tensor_parallel import _untie
from shardes.config.loading import parse_config
from shardes.errors import UserError
from shardes.models.build import build_skeleton, load_model_config
from tests.helpers.backend_cases import backend_case
from tests.helpers.models import ARCHITECTURES, tiny_model, tree
from tests.helpers.ranks import Ranks


def skeleton(path):
    config = load_model_config(path, trust_remote_code=False)
    return build_skeleton(config, dtype=torch.float32, trust_remote_code=False)


@pytest.mark.parametrize("mode", ["member", "iteration"])
def test_modes_that_gather_the_model_are_refused(mode, tmp_path):
    config = tree(tmp_path, model="m", run_dir="r", parallel__backend="tensor_parallel", rollout__gather=mode)
    with pytest.raises(UserError, match=f"rollout: gather is {mode}, .* set rollout.gather: layer"):
        parse_config(config, source="test")


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "self_attn.q_proj"), ("gpt_neox", "attention.query_key_value")],
)
def test_ranks_that_heads_cannot_be_dealt_to_are_refused(architecture, name, tmp_path):
    path = tiny_model(tmp_path / "m", tied=False, architecture=architecture, num_heads=4, num_kv_heads=2)
    model = skeleton(path)
    prefix = "model" if architecture == "llama" else "gpt_neox"
    plan = {f"{prefix}.layers.0.{name}": "colwise"}
    check_heads(model, plan, 2)
    with pytest.raises(UserError, match=r"4 attention heads.*3 ranks cannot share.*parallel\.shard_size"):
        check_heads(model, plan, 3)
    # A plan that gathers what it split leaves every rank all heads.
    check_heads(model, dict.fromkeys(plan, "colwise_gather_output"), 3)


def test_untying_gives_every_name_a_parameter_of_its_own(tmp_path):
    model = skeleton(tiny_model(tmp_path / "m", tied=True))
    assert _untie(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert _untie(model) == {}


def test_experts_are_checked_only_where_torch_groups_them(tmp_path):
    model = skeleton(tiny_model(tmp_path / "m", tied=True, architecture="mixtral"))
    check_experts(model, 2)  # nothing is split yet, so nothing is refused


@pytest.mark.slow
def test_what_a_plan_cannot_split_is_refused_on_every_rank(tmp_path):
    """Through the command line, with a status of 2 and one message."""
    uneven = tiny_model(tmp_path / "uneven", tied=True)
    planless = tmp_path / "planless"
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=37, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(planless)
    for file in uneven.glob("tokenizer*"):
        shutil.copy(file, planless)
    for path, wanted in (
        (uneven, "3 attention heads and 1 key-value heads"),
        (planless, "no tensor parallel plan for GPT2LMHeadModel"),
    ):
        case = backend_case(tmp_path, model=path, parallel__backend="tensor_parallel")["config"]
        file = tmp_path / f"{path.name}.yaml"
        file.write_text(json.dumps(case))
        arguments = ["launch/train.py", "--config", file]
        with Ranks(arguments, world_size=2, log_dir=tmp_path / f"{path.name}-logs") as ranks:
            assert ranks.wait(120) == [2, 2], ranks.output()
            assert wanted in ranks.output()
            assert "Traceback" not in ranks.output()


def config_of(kind):
    """Return a configuration of a kind of model; only its name is looked at."""
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type=kind)))


def test_plans_that_were_not_compared_with_the_whole_model_are_refused():
    for architecture in ARCHITECTURES:
        check_architecture(config_of(ARCHITECTURES[architecture][0].model_type))
    # A plan that gives other logits and no error, one that cannot be computed, one that nobody has looked at.
    for kind in ("inkling2_text", "doge", "another"):
        with pytest.raises(UserError, match=rf"SimpleNamespace \({kind}\) was not compared.*fsdp"):
            check_architecture(config_of(kind))


def test_heads_of_latent_attention_are_checked(tmp_path):
    config = DeepseekV3Config(num_attention_heads=4, num_key_value_heads=3)
    model = SimpleNamespace(config=config)
    plan = dict.fromkeys(
        ("model.layers.0.self_attn.q_b_proj", "model.layers.0.self_attn.kv_b_proj"), "colwise"
    )
    check_heads(model, plan, 2)
    with pytest.raises(UserError, match=r"4 attention heads, which 3 ranks cannot share"):
        check_heads(model, plan, 3)


class Layer(torch.nn.Module):
    def forward(self, ids):
        raise self.error


class Model(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer()])
        self.layers[0].error = error

    def forward(self, input_ids, use_cache):
        return self.layers[0](input_ids)


def test_a_forward_that_does_not_fit_names_its_layer():
    def check(error):
        check_forward(Model(error), num_ranks=2, device=torch.device("cpu"))

    with pytest.raises(UserError, match=r"2 ranks cannot compute layers\.0, a Layer, as .*\(sizes 2 and 4\)"):
        check(RuntimeError("sizes 2 and 4\nand more"))
    with pytest.raises(torch.OutOfMemoryError):
        check(torch.OutOfMemoryError("of the device"))


def test_norms_of_heads_are_found_before_a_model_is_split(tmp_path):
    model = skeleton(
        tiny_model(tmp_path / "m", tied=False, architecture="cohere", num_heads=4, num_kv_heads=2)
    )
    attention = "model.layers.1.self_attn"
    plan = {f"{attention}.{kind}_proj": "colwise" for kind in "qkv"}
    assert norms_of_heads(model, plan) == [f"{attention}.q_norm", f"{attention}.k_norm"]
    assert norms_of_heads(model, dict.fromkeys(plan, "colwise_gather_output")) == []
    # Norms of another architecture have the same weights for every head.
    other = skeleton(
        tiny_model(tmp_path / "q", tied=False, architecture="qwen3", num_heads=4, num_kv_heads=2)
    )
    assert norms_of_heads(other, plan) == []
