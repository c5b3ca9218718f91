"""What tensor parallelism refuses, and why."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from shardes.backends.tensor_parallel import _check_experts, _check_heads, _untie
from shardes.config.loading import parse_config
from shardes.errors import UserError
from shardes.models.build import build_skeleton, load_model_config
from tests.helpers.backend_cases import backend_case
from tests.helpers.models import tiny_model, tree
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
    _check_heads(model, plan, 2)
    with pytest.raises(UserError, match=r"4 attention heads.*3 ranks cannot share.*parallel\.shard_size"):
        _check_heads(model, plan, 3)
    # A plan that gathers what it split leaves every rank all heads.
    _check_heads(model, dict.fromkeys(plan, "colwise_gather_output"), 3)


def test_untying_gives_every_name_a_parameter_of_its_own(tmp_path):
    model = skeleton(tiny_model(tmp_path / "m", tied=True))
    assert _untie(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert _untie(model) == {}


def test_experts_are_checked_only_where_torch_groups_them(tmp_path):
    model = skeleton(tiny_model(tmp_path / "m", tied=True, architecture="mixtral"))
    _check_experts(model, 2)  # nothing is split yet, so nothing is refused


@pytest.mark.slow
def test_what_a_plan_cannot_split_is_refused_on_every_rank(tmp_path):
    """Through the command line, with a status of 2 and one message."""
    uneven = tiny_model(tmp_path / "uneven", tied=True)
    planless = tmp_path / "planless"
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=37, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(planless)
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
