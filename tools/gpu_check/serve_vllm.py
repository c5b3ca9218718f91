"""The decode part's prompts through vLLM, with a model of the same sizes and random weights."""

import os
from typing import Any

from gpu_check import random_model
from gpu_check.decode import choose_model
from gpu_check.devices import device_of_check, seconds_of
from gpu_check.part import Context, is_installed


def run(context: Context) -> None:
    """Measure vLLM's tokens a second on 200 prompts of 150 tokens and 256 new ones."""
    if not is_installed("vllm"):
        context.skip("vllm", "not installed: vllm")
        return
    # In this process, so that it ends with it; without a network.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    from vllm import LLM, SamplingParams

    is_tiny = context.is_rehearsal
    rows, prompt_tokens, new_tokens = (6, 20, 8) if is_tiny else (200, 150, 256)
    name = choose_model(device_of_check())
    path = random_model.write_config(context.folder, name)
    told: dict[str, Any] = {"enforce_eager": True, "gpu_memory_utilization": 0.1} if is_tiny else {}
    engine = LLM(
        model=str(path),
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=2048 if not is_tiny else 64,
        max_num_seqs=rows,
        **told,
    )
    generator = torch.Generator().manual_seed(1)
    size = (rows, prompt_tokens)
    ids = torch.randint(2, random_model.SIZES[name]["vocab_size"], size, generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": row} for row in ids]
    counted: list[int] = []

    def generate() -> None:
        answers = engine.generate(prompts, params, use_tqdm=False)
        counted.append(sum(len(answer.outputs[0].token_ids) for answer in answers))

    seconds = seconds_of(generate, num_turns=2)
    context.record(
        model=name,
        rows=rows,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        vllm_seconds=seconds,
        vllm_tokens_per_second=counted[-1] / seconds,
    )
    context.check("every answer has all its tokens", counted[-1] == rows * new_tokens, detail=str(counted))
