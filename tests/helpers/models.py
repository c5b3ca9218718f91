"""Tiny random models, and configurations that train them."""

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

from shardes.config.loading import parse_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"


# What each architecture is told besides the sizes that all have.
# Experts go through torch's grouped product, which wants rows of a multiple of 16 bytes on every rank.
_MOE = {"hidden_size": 48, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
ARCHITECTURES = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 10}),
    "gemma2": (Gemma2Config, {"head_dim": 10, "sliding_window": 8}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 10, "sliding_window": 8}),
    "mistral": (MistralConfig, {"head_dim": 10, "sliding_window": None}),
    "phi3": (Phi3Config, {}),
    "cohere": (CohereConfig, {"use_qk_norm": True, "logit_scale": 1.0}),
    "gpt_neox": (GPTNeoXConfig, {"rotary_pct": 1.0}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        _MOE | {"num_experts": 5, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 33},
    ),
    "mixtral": (
        MixtralConfig,
        _MOE | {"num_local_experts": 5, "intermediate_size": 48, "sliding_window": None},
    ),
}


def tiny_model(
    path,
    *,
    tied,
    architecture="qwen2",
    dtype=torch.float32,
    seed=0,
    num_heads=3,
    num_kv_heads=1,
    vocab_size=37,
    **save_arguments,
):
    """A random model with sizes that no number of ranks divides, and the quickstart's tokenizer."""
    config_class, more = ARCHITECTURES[architecture]
    common = {
        "hidden_size": 22 * num_heads,
        "intermediate_size": 101,
        "num_hidden_layers": 2,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    config = config_class(**(common | more))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith(
                "norm.weight"
            ):  # norms start as ones and biases as zeros, which would hide a mix-up
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path, **save_arguments)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(QUICKSTART / "model" / name, Path(path) / name)
    return Path(path)


def write_problems(path, *, num_problems):
    """JSONL with prompts of different lengths."""
    rows = [{"prompt": f"{i}" + "+7" * (i % 4) + "="} for i in range(num_problems)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tree(tmp_path, *, model, run_dir, **changes):
    """A configuration as a tree; ``changes`` are dotted keys with ``__`` for the dot."""
    data = tmp_path / "problems.jsonl"
    if not data.exists():
        write_problems(data, num_problems=11)
    values = {
        "model": {"path": str(model), "dtype": "float32"},
        "run": {"dir": str(run_dir)},
        "parallel": {"backend": "single", "threads_per_rank": 1, "timeout_seconds": 120},
        "rollout": {"max_new_tokens": 6, "micro_batch_size": 4},
        "es": {"iterations": 3, "population": 4, "sigma": 0.05, "alpha": 0.1},
        "eval": {"every": 2},
        "task": {
            "data": str(data),
            "heldout_data": str(data),
            "reward": "tests/helpers/rewards.py:spread",
            "batch_size": 9,
        },
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return json.loads(json.dumps(values, default=str))


def make_config(tmp_path, **arguments):
    return parse_config(tree(tmp_path, **arguments), source="test")
