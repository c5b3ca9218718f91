"""Compare every tensor parallel plan of transformers with the whole model, on tiny random models.

    torchrun --nproc-per-node 2 tools/check_parallel_plans.py [KIND ...]

A line says what became of each kind of model, and the last ones are the kinds whose logits were right, for
``CHECKED`` of shardes/backends/split_checks.py. Kinds of which no tiny model could be made are not
among them.
"""

import datetime
import os
import sys
import textwrap
from typing import Any

import torch
import torch.distributed
from transformers import AutoModelForCausalLM, PreTrainedConfig, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from shardes.backends import tensor_parallel
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.models.build import build_skeleton

LARGEST_MODEL = 3_000_000
# Sums in another order differ in the last places of float32 numbers.
LARGEST_ERROR = 1e-4

# Sizes by the names that configurations have for them. Options that add parameters are on.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32
    ),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 40),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "decoder_sparse_step"), 1),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "index_topk"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_d_state"), 16),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "mlp_bias", "attention_bias", "use_bias"), True),
    "topk_method": "greedy",
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "num_nextn_predict_layers": 0,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "router_aux_loss_coef": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Keys that may be None, which means that there is no such thing, and are set all the same.
SET_ALWAYS = {
    *("pad_token_id", "num_key_value_heads", "head_dim", "q_lora_rank", "num_experts_per_tok"),
    *("n_routed_experts", "n_shared_experts", "n_group", "topk_group"),
}


def tiny_config(kind: str, *, is_tied: bool) -> PreTrainedConfig:
    """Return a configuration of a kind of model, with all sizes small."""
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    if default.get_text_config() is not default:
        raise ValueError("it has more than text")
    known = default.to_dict()
    known |= {alias: known.get(name) for alias, name in default.attribute_map.items()}
    keys = {
        key: size
        for key, size in SIZES.items()
        if key in known and (known[key] is not None or key in SET_ALWAYS)
    }
    if "qk_rope_head_dim" in keys:  # multi-head latent attention has its own
        keys["head_dim"] = keys["qk_rope_head_dim"]
        if "num_key_value_heads" in keys:
            keys["num_key_value_heads"] = keys["num_attention_heads"]
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if kind == "lfm2_moe":
        kinds = ["conv", "full_attention"]
    if kinds and "layer_types" in config_class.__dataclass_fields__:
        keys["layer_types"] = (kinds * 2)[: max(2, len(kinds))]
        keys["num_hidden_layers"] = len(keys["layer_types"])
    if getattr(default, "mlp_layer_types", None):
        keys["mlp_layer_types"] = ["dense", *["sparse"] * (keys["num_hidden_layers"] - 1)]
    return config_class(**keys, tie_word_embeddings=is_tied)


@torch.no_grad()
def compare(config: PreTrainedConfig, group: Group) -> float:
    """Return how much the logits of a split model differ from the whole model's, relative to the largest."""
    skeleton = build_skeleton(config, dtype=torch.float32, trust_remote_code=False)
    if sum(parameter.numel() for parameter in skeleton.parameters()) > LARGEST_MODEL:
        raise ValueError("the smallest model that this program can make of it is too large")
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in whole.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.5))
    ids = torch.arange(3, 15)[None]
    wanted = whole(input_ids=ids, use_cache=False).logits
    backend = tensor_parallel.TensorParallelBackend(skeleton, group=group)
    for shard in backend.shards:
        values = whole.get_parameter(shard.name).flatten()
        for span in shard.spans:
            span.of(shard.local).view(span.rows, span.length).copy_(span.inside(values))
    found = backend.sharded_model(input_ids=ids, use_cache=False).logits
    return float((found - wanted).abs().max() / wanted.abs().max())


def judge(kind: str, group: Group) -> str:
    """Return what became of a kind of model: "right", or what is wrong."""
    for is_tied in (False, True):
        try:
            error = compare(tiny_config(kind, is_tied=is_tied), group)
        except UserError as refusal:
            return f"refused: {refusal}"
        except Exception as problem:  # whatever a configuration or a model does
            return f"no model: {type(problem).__name__}: {problem}"
        if not error < LARGEST_ERROR:
            return f"WRONG by {error:.1e}"
    return "right"


def main() -> None:
    """Compare the kinds that were asked for, or all that have a plan."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    tensor_parallel.check_architecture = lambda model: None
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = Group(rank, size, torch.device("cpu"))
    right = []
    known = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING]
    for kind in sys.argv[1:] or known:
        found: list[str] = [""] * size
        torch.distributed.all_gather_object(found, judge(kind, group))
        if set(found) == {"right"}:
            right.append(kind)
        if rank == 0:
            shown = " | ".join(dict.fromkeys(text.split("\n")[0][:160] for text in found))
            print(f"{kind:28} {shown}", flush=True)
    if rank == 0:
        print(textwrap.fill(" ".join(sorted(right)), width=100))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads are not worth waiting for


if __name__ == "__main__":
    main()
