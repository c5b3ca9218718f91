"""Check a finished quickstart run and its export: that it learned, and that the export answers as it did.

python tools/check_quickstart.py RUN_DIR EXPORT_DIR --min-reward 0.5
"""

import json
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True))
@click.argument("export_dir", type=click.Path(path_type=Path, exists=True))
@click.option("--min-reward", type=float, required=True, help="The last held-out reward must be above this.")
def main(run_dir: Path, export_dir: Path, min_reward: float) -> None:
    """Compare the curve with a bound, and the export's answers with samples.jsonl, token by token."""
    metrics = read_lines(run_dir / "metrics.jsonl")
    first, last = metrics[0]["heldout_reward"], metrics[-1]["heldout_reward"]
    click.echo(f"held-out reward {first:.3f} -> {last:.3f} after {metrics[-1]['iteration']} iterations")
    if not first < 0.02 < min_reward < last:
        raise click.ClickException(f"wanted it to rise from below 0.02 to above {min_reward}")

    tokenizer = AutoTokenizer.from_pretrained(export_dir)
    model = AutoModelForCausalLM.from_pretrained(export_dir)
    # As many rows as a micro-batch of the run, because the last bits may depend on it.
    torch.set_num_threads(1)
    samples = [
        line
        for line in read_lines(run_dir / "samples.jsonl")
        if line["iteration"] == metrics[-1]["iteration"]
    ]
    inputs = tokenizer([sample["prompt"] for sample in samples], return_tensors="pt", padding=True)
    longest = max(len(sample["token_ids"]) for sample in samples)
    answers = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    for sample, answer in zip(samples, answers.tolist(), strict=True):
        if answer[: len(sample["token_ids"])] != sample["token_ids"]:
            raise click.ClickException(f"the export answers {sample['prompt']!r} differently: {answer}")
    click.echo(f"the export gives the run's tokens for {len(samples)} held-out prompts")


if __name__ == "__main__":
    main()
