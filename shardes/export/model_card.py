"""The README.md of an exported model: what it is, how it was made, and what it earned."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardes import __version__
from shardes.runs.journal import History

# More evaluations than this are thinned out; the first, the last and the best stay.
_MOST_ROWS = 12


def model_card(
    *,
    base: Path,
    base_digest: str,
    task: str,
    iteration: int,
    dtype: str,
    digest: str,
    settings: Mapping[str, Any],
    history: History | None,
) -> str:
    """The card as Markdown with the hub's metadata.

    Args:
        base: The base model's directory.
        base_digest: Of its weights.
        task: What was trained on.
        iteration: How many updates the weights have had.
        dtype: Of the exported weights.
        digest: Of the master weights.
        settings: What the run was told.
        history: What its journal says; None if there is no run to tell of.
    """
    method = (
        "Evolution strategies perturb all weights with noise, let each perturbed model answer, and move the "
        "weights along the noise that earned more (Qiu et al. 2025, [arXiv "
        "2509.24372](https://arxiv.org/abs/2509.24372)). No gradient was computed."
    )
    hub_name = _hub_name(base)
    name = hub_name or base.resolve().name
    known = f"base_model: {hub_name}\nbase_model_relation: finetune\n" if hub_name else ""
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{known}"
        "tags:\n- evolution-strategies\n- shardes\n---",
        f"# {name}, fine-tuned with evolution strategies",
        f"The weights after {iteration} iterations on the task `{task}`, made with shardes {__version__}. "
        f"{method}",
        f"- base model: `{name}`, weights digest `{base_digest}`\n"
        f"- these weights: dtype {dtype}, digest of the master `{digest}`",
        *_evaluation(history, iteration),
        "## Settings",
        f"```json\n{json.dumps(settings, indent=2, sort_keys=True)}\n```",
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```',
    ]
    return "\n\n".join(parts) + "\n"


def _hub_name(base: Path) -> str | None:
    """The model's name on the hub, as the hub's cache remembers it; None for a directory of another name.

    A wrong one would have the hub call the model a child of somebody else's.
    """
    for part in base.resolve().parts:
        if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{match[1]}/{match[2]}"
    return None


def _evaluation(history: History | None, iteration: int) -> Iterator[str]:
    """What these weights earned on held-out problems, and how that came about."""
    found = {} if history is None else history.evaluations
    known = {at: record for at, record in sorted(found.items()) if at <= iteration and "reward" in record}
    if known:
        yield "## Held-out reward"
        yield "\n".join(
            [
                "| iteration | reward | of it |",
                "|---:|---:|---|",
                *(_row(at, known[at]) for at in _thinned(known)),
            ]
        )
    sets = found.get(iteration, {}).get("sets", {})
    if sets:
        yield "Further held-out sets, with these weights:"
        yield "\n".join(
            ["| set | reward |", "|---|---:|"]
            + [f"| {name} | {_number(part['reward'])} |" for name, part in sets.items()]
        )


def _row(at: int, record: Mapping[str, Any]) -> str:
    parts = record.get("components") or {}
    told = ", ".join(f"{name} {_number(value)}" for name, value in parts.items())
    return f"| {at} | {_number(record['reward'])} | {told if len(parts) > 1 else ''} |"


def _thinned(known: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Some of the evaluations, evenly."""
    every = list(known)
    if len(every) <= _MOST_ROWS:
        return every
    last = len(every) - 1
    kept = {every[round(i * last / (_MOST_ROWS - 2))] for i in range(_MOST_ROWS - 1)}
    rewards = {at: record["reward"] for at, record in known.items() if record["reward"] is not None}
    if rewards:
        kept.add(max(rewards, key=lambda at: (rewards[at], -at)))
    return sorted(kept)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
