"""What can be said of a tensor parallel plan before weights are loaded: whether the model fits it."""

import re
import traceback
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shardes.errors import UserError

# Attention modules compute whole heads, so a plan that splits their outputs deals heads to ranks.
_KEYS = "k_proj|v_proj|qkv_proj|query_key_value"
_DEALS_HEADS = re.compile(rf".*\b(self_attn\w*|attention|attn)(\.\d+)?\.(q_proj|q_b_proj|kv_b_proj|{_KEYS})")
_DEALS_KEYS = re.compile(rf".*\.({_KEYS})")

# Kinds of models whose plans gave the logits of the whole model on 2 ranks with transformers 5.23, with the
# options that add parameters: tools/check_parallel_plans.py compares them and prints this.
CHECKED: frozenset[str] = frozenset().union(
    ("afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "beam"),
    ("cohere", "cohere2", "cohere2_moe", "cwm", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
    ("diffllama", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint"),
    ("gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm"),
    ("glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_neox", "gpt_oss", "granite", "granite_swa"),
    ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text"),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "internlm3", "iquestcoder"),
    ("jais2", "jamba", "kimi_linear", "kolibri1", "laguna", "lfm2", "lfm2_moe", "llama", "llama4_text"),
    ("longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2"),
    ("minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron"),
    ("nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe", "phi", "phi3", "phimoe", "qwen2"),
    ("qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss"),
    ("smollm3", "solar_open", "starcoder2", "vaultgemma", "youtu"),
)


def check_architecture(model: PreTrainedModel) -> None:
    """Check that the model is of a kind whose plan has been compared with the whole model.

    Raises:
        UserError: It is not. Some plans give other logits, and nothing else would tell.
    """
    kind = model.config.get_text_config().model_type
    if kind not in CHECKED:
        raise UserError(
            f"parallel.backend: tensor_parallel: the plan that transformers has for {type(model).__name__} "
            f"({kind}) was not compared with the whole model, or computes something else; set "
            "parallel.backend: fsdp or zero3"
        )


def check_heads(model: PreTrainedModel, plan: Mapping[str, str], num_ranks: int) -> None:
    """Check that each rank can have a whole number of heads.

    Raises:
        UserError: The number of ranks does not divide the numbers of heads, which the message names.
    """
    dealt = [name for name, style in plan.items() if style == "colwise" and _DEALS_HEADS.fullmatch(name)]
    if not dealt:
        return
    config = model.config.get_text_config()
    heads = {"attention heads": config.num_attention_heads}
    if getattr(config, "num_key_value_heads", None) is not None and any(map(_DEALS_KEYS.fullmatch, dealt)):
        heads["key-value heads"] = config.num_key_value_heads
    if any(number % num_ranks for number in heads.values()):
        counts = " and ".join(f"{number} {name}" for name, number in heads.items())
        raise UserError(
            f"parallel.backend: tensor_parallel deals whole heads to ranks, but the model has {counts}, "
            f"which {num_ranks} ranks cannot share equally; let fewer ranks hold the model "
            "(parallel.shard_size), or set parallel.backend: fsdp"
        )


def check_experts(model: PreTrainedModel, num_ranks: int) -> None:
    """Check that torch's grouped product can take the parts of experts.

    Raises:
        UserError: Rows of a part, which the message names, are no multiple of 16 bytes.
    """
    if getattr(model.config.get_text_config(), "_experts_implementation", None) != "grouped_mm":
        return
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and parameter.ndim == 3:
            row = parameter.to_local().shape[-1]
            if row * parameter.element_size() % 16:
                raise UserError(
                    f"parallel.backend: tensor_parallel: {num_ranks} ranks split {name}, of shape "
                    f"{tuple(parameter.shape)}, into rows of {row} elements of {model.dtype}, but torch "
                    "multiplies experts only if rows are a multiple of 16 bytes; let fewer ranks hold the "
                    "model (parallel.shard_size), or set parallel.backend: fsdp"
                )


@torch.no_grad()
def check_forward(model: PreTrainedModel, *, num_ranks: int, device: torch.device) -> None:
    """Compute a forward of two tokens with the zeros that the parameters begin as; a collective of all ranks.

    Raises:
        UserError: Parts do not fit together. The message names the layer.
    """
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        message = str(error).split("\n")[0] or type(error).__name__
        # Memory and connections have errors of their own kinds, but for gloo's.
        if (isinstance(error, RuntimeError) and type(error) is not RuntimeError) or "gloo" in message:
            raise
        raise UserError(
            f"parallel.backend: tensor_parallel: {num_ranks} ranks cannot compute {_place_of(error, model)} "
            f"as the plan of transformers splits it ({message}); set parallel.backend: fsdp or zero3"
        ) from error


def _place_of(error: BaseException, model: nn.Module) -> str:
    """Return the name and the kind of the innermost module of a model that an error passed through."""
    names = {id(module): name for name, module in model.named_modules() if name}
    found = f"a forward of {type(model).__name__}"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            found = f"{names[id(module)]}, a {type(module).__name__},"
    return found
