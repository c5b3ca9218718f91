"""Share code among the benchmarks: a random model, facts about the machine, and reports."""

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from shardes import __version__

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "configs" / "quickstart" / "model"
# Functions below, as task.reward names them.
CONSTANT = f"{__file__}:constant"
BY_LETTERS = f"{__file__}:by_letters"

Row = dict[str, Any]


# Of a Llama: 7 million parameters a layer, and 13 more.
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
}


def random_model(
    *,
    layers: int,
    dtype: torch.dtype = torch.float32,
    num_positions: int = 4096,
    eos_id: int | None = None,
    **sizes: int,
) -> Any:
    """Make a Llama of random parameters, of ``SIZES`` and others; without ``eos_id`` no answer ends."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        **(SIZES | sizes),
        num_hidden_layers=layers,
        max_position_embeddings=num_positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def write_model(path: Path, *, layers: int, eos_id: int | None = 1, **sizes: int) -> int:
    """Write a random model and a tokenizer for it; return the number of parameters."""
    from transformers import AutoTokenizer

    model = random_model(layers=layers, dtype=torch.float32, num_positions=512, eos_id=eos_id, **sizes)
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if eos_id is None:
        tokenizer.eos_token = None
    tokenizer.save_pretrained(path)
    return num_parameters(model)


def run_job(script: str, spec: Any, *, world_size: int, folder: Path) -> Any:
    """Run a script as a job, ``SCRIPT --job SPEC OUT``, to its end.

    Args:
        script: Path of the script, which writes its results to OUT as JSON.
        spec: Content of SPEC, JSON-able.
        world_size: Number of ranks; 0: one process without a launcher.
        folder: Directory of both files.

    Returns:
        Content of OUT, or as text the reason why the job failed.
    """
    told, out = folder / "job.json", folder / "found.json"
    out.unlink(missing_ok=True)
    told.write_text(json.dumps(spec))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    command = [sys.executable, *(launcher if world_size else []), script, "--job", str(told), str(out)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if not torch.cuda.is_available():
        env |= {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not out.exists():
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        return lines[0].strip() if lines else f"exit status {done.returncode}"
    return json.loads(out.read_text())


def constant(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    """Return the same reward for all completions, at no cost."""
    return [0.0] * len(completions)


def by_letters(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """Return rewards that differ between most answers, at no cost."""
    texts = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return [sum((i + 1) * ord(letter) for i, letter in enumerate(text)) % 97 / 97 for text in texts]


def num_parameters(model: Any) -> int:
    """Count the elements of a model's parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_facts(device: str) -> dict[str, Any]:
    """Return the facts about the machine that all figures on ``cpu`` or ``cuda`` depend on."""
    return {
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shardes": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(facts: dict[str, Any]) -> None:
    """Print facts, one a line."""
    for key, value in facts.items():
        click.echo(f"{key}: {value}")


def write_report(path: Path | None, *, facts: dict[str, Any], rows: list[Row]) -> None:
    """Write all figures as JSON, with the command that made them; do nothing without a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["python", *sys.argv]
    path.write_text(json.dumps({"facts": facts, "command": command, "rows": rows}, indent=1) + "\n")
