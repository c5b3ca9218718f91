"""The README.md of an exported model: its origin, settings and held-out rewards."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardes.runs.journal import History
from shardes.utils.hub_cache import hub_place
from shardes.utils.units import shown_number
from shardes.utils.version import VERSION

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
    """Write the card as Markdown with the hub's metadata.

    Args:
        base: Directory of the base model.
        base_digest: Digest of the base model's weights.
        task: Name of the task that was trained on.
        iteration: Number of updates that the weights have had.
        dtype: Dtype of the exported weights.
        digest: Digest of the master weights.
        settings: Configuration of the run.
        history: Contents of the run's journal; None if there is no run.
    """
    method = (
        "Evolution strategies perturb all weights with noise, let each perturbed model answer, and move the "
        "weights along the noise that earned more (Qiu et al. 2025, [arXiv "
        "2509.24372](https://arxiv.org/abs/2509.24372)). No gradient was computed."
    )
    # A wrong name would have the hub call the model a child of somebody else's.
    hub_name, commit = hub_place(base) or (None, None)
    name = hub_name or base.resolve().name
    known = f"base_model: {hub_name}\nbase_model_relation: finetune\n" if hub_name else ""
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{known}"
        "tags:\n- evolution-strategies\n- shardes\n---",
        f"# {name}, fine-tuned with evolution strategies",
        f"The weights after {iteration} iterations on the task `{task}`, made with shardes {VERSION}. "
        f"{method}",
        f"- base model: `{name}`{f', commit `{commit}`' if commit else ''}, weights digest `{base_digest}`\n"
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


def _evaluation(history: History | None, iteration: int) -> Iterator[str]:
    """Yield the card's sections on held-out rewards: over the run, and of further held-out sets."""
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
            + [f"| {name} | {shown_number(part['reward'])} |" for name, part in sets.items()]
        )


def _row(at: int, record: Mapping[str, Any]) -> str:
    parts = record.get("components") or {}
    told = ", ".join(f"{name} {shown_number(value)}" for name, value in parts.items())
    return f"| {at} | {shown_number(record['reward'])} | {told if len(parts) > 1 else ''} |"


def _thinned(known: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Return some of the evaluations' iterations, evenly spaced, with the best."""
    every = list(known)
    if len(every) <= _MOST_ROWS:
        return every
    last = len(every) - 1
    kept = {every[round(i * last / (_MOST_ROWS - 2))] for i in range(_MOST_ROWS - 1)}
    rewards = {at: record["reward"] for at, record in known.items() if record["reward"] is not None}
    if rewards:
        kept.add(max(rewards, key=lambda at: (rewards[at], -at)))
    return sorted(kept)
