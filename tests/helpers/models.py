"""Tiny random models, and configurations that train them."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from shardes.config import parse_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"


def tiny_model(path, *, tied, architecture="qwen2", dtype=torch.float32, seed=0):
    """A random model with sizes that no number of ranks divides, and the quickstart's tokenizer."""
    config_class = {"qwen2": Qwen2Config, "llama": LlamaConfig}[architecture]
    config = config_class(
        hidden_size=66,
        intermediate_size=101,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        vocab_size=37,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
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
