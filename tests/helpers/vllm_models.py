"""Tiny random models that vLLM's CPU build runs: its attention wants heads of 32 elements or more."""

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.helpers.models import QUICKSTART

# No multiple of 64, so that vLLM pads it.
_SIZES = {
    "vocab_size": 1003,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": (LlamaConfig, {}),
    "llama_one_kv_head": (LlamaConfig, {"num_key_value_heads": 1, "attention_bias": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "phi3": (Phi3Config, {"original_max_position_embeddings": 512}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 32, "tie_word_embeddings": True}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 128,
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}
# Those whose experts vLLM repacks on CPUs.
REPACKED = ("mixtral", "qwen2_moe", "qwen3_moe")


def vllm_model(path, *, architecture, dtype=torch.float32, seed=0, **changes):
    """A random model, and the quickstart's tokenizer."""
    config_class, more = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**(_SIZES | more | changes)), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start as ones and biases as zeros, which would hide a mix-up
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(QUICKSTART / "model" / name, Path(path) / name)
    return Path(path)
