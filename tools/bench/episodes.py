"""Measure episodes of many turns: how much of the environments' time is hidden, and what contexts cost.

An iteration of a small random Llama plays episodes whose environment takes a given time for each step, with
answers that all have the same length, so that generation takes the same time in every row. Each row is a run
of its own in one process, whose first iteration is left out. ``hidden`` is the share of an iteration in which
nobody waits for an environment.

    python tools/bench/episodes.py --json benchmarks/episodes-cpu.json
"""

import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from common import Row, machine_facts, show, write_model, write_report

from shardes import TrainConfig, Trainer

HERE = Path(__file__).parent
# Generation takes about as long as on a GPU, where a turn of many rows is tens of tokens at some ms each.
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}


def measure(
    model: Path,
    *,
    seconds: float,
    kind: str,
    num_episodes: int,
    size: int,
    num_turns: int,
    new_tokens: int,
    workers: int,
) -> Row:
    """Return what one iteration takes, by phase, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model={"path": str(model), "dtype": "float32"},
            run={"dir": f"{folder}/run"},
            rollout={"max_new_tokens": new_tokens, "micro_batch_size": size, "max_context": 500},
            es={"iterations": 3, "population": 2, "sigma": 0.001},
            eval={"every": 0},
            log={"samples_every": 0},
            task={
                "environment": f"{HERE / 'sleeping.py'}:{kind}",
                "environment_arguments": {"seconds": seconds, "num_turns": num_turns},
                "data": f"range:0:{num_episodes}",
                "max_turns": num_turns,
                "reward_workers": workers,
            },
        )
        lines = [line for line in Trainer(config).train().metrics if "num_prefilled_tokens" in line][1:]
    total = fmean(sum(line["seconds"].values()) for line in lines)
    waited = fmean(line["seconds"].get("environment", 0.0) for line in lines)
    return {
        "environment": kind,
        "step ms": round(seconds * 1000),
        "episodes": num_episodes,
        "cohort": size,
        "turns": num_turns,
        "workers": workers,
        "iteration s": round(total, 2),
        "environments s": round(fmean(line["environment_seconds"] for line in lines), 2),
        "waited s": round(waited, 2),
        "hidden": round(1 - waited / total, 3),
        "prefilled": round(fmean(line["num_prefilled_tokens"] for line in lines)),
        "generated": round(fmean(line["num_tokens"] for line in lines)),
    }


@click.command()
@click.option("--layers", default=6, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where the results go.")
def main(layers: int, json_path: Path | None) -> None:
    """Measure a few environments."""
    rows: list[Row] = []
    usual: dict[str, Any] = {"num_episodes": 32, "size": 8, "num_turns": 6, "new_tokens": 16, "workers": 8}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        num_parameters = write_model(model, layers=layers, eos_id=None, **SIZES)
        for kind, seconds in (("Sleep", 0.0), ("Sleep", 0.05), ("AsyncSleep", 0.05)):
            rows.append(measure(model, kind=kind, seconds=seconds, **usual))
            show(rows[-1])
        rows.append(measure(model, kind="AsyncSleep", seconds=0.05, **{**usual, "size": 32}))
        show(rows[-1])
    write_report(json_path, rows=rows, facts=machine_facts("cpu") | {"parameters": num_parameters})


if __name__ == "__main__":
    main()
