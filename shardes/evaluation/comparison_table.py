"""Write the comparison of models for people, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from shardes.utils.logs import printable


def comparison_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the lines of Markdown tables.

    Args:
        report: Statistics of the models, as ``compare_results`` returns them.
    """
    models, main, settings = report["models"], report["main_set"], report["settings"]
    num_problems = models[0]["sets"][main]["num_problems"]
    lines = [f"Problems: {num_problems} of `{main}`. Greedy answers; an answer passes with a reward of at "]
    lines[0] += f"least {settings['pass_reward']:g}. 95% intervals, of changes by problem."
    lines += ["", *_main_table(models, main)]
    drawn = [name for name in models[0]["sets"][main] if name.startswith("pass@") and "_" not in name]
    if drawn:
        lines += ["", f"{settings['num_samples']} answers to each problem, drawn at temperature "]
        lines[-1] += f"{settings['temperature']:g}:"
        lines += ["", *_coverage_table(models, main, drawn)]
    others = [name for name in models[0]["sets"] if name != main]
    if others:
        lines += ["", "Other held-out sets:", "", *_sets_table(models, others)]
    notes = list(_notes(models, main))
    return [*lines, "", *notes] if notes else lines


def _main_table(models: Sequence[Mapping[str, Any]], main: str) -> list[str]:
    titles = ["model", "reward", "change", "solved", "gained", "lost", "tokens", "change", "KL (nats/token)"]
    rows = []
    for model in models:
        found = model["sets"][main]
        rows.append(
            [
                _name(model),
                _interval(found["reward"]),
                _interval(found.get("reward_change"), signed=True),
                _interval(found["solved"]),
                _count(found.get("gained")),
                _count(found.get("lost")),
                _interval(found["tokens"], digits=1),
                _interval(found.get("tokens_change"), signed=True, digits=1),
                _interval(model["kl"], digits=4),
            ]
        )
    return _table(titles, rows)


def _coverage_table(models: Sequence[Mapping[str, Any]], main: str, drawn: Sequence[str]) -> list[str]:
    rows = []
    for model in models:
        found = model["sets"][main]
        rows.append([_name(model), *(_interval(found.get(name)) for name in drawn)])
        if "reward_change" in found:
            changes = (_interval(found.get(f"{name}_change"), signed=True) for name in drawn)
            rows.append(["change", *changes])
    return _table(["model", *drawn], rows)


def _sets_table(models: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    titles = ["model", "set", "problems", "reward", "change", "solved", "gained", "lost"]
    rows = []
    for name in names:
        for model in models:
            found = model["sets"][name]
            rows.append(
                [
                    _name(model),
                    _escaped(name),
                    str(found["num_problems"]),
                    _interval(found["reward"]),
                    _interval(found.get("reward_change"), signed=True),
                    _interval(found["solved"]),
                    _count(found.get("gained")),
                    _count(found.get("lost")),
                ]
            )
    return _table(titles, rows)


def _notes(models: Sequence[Mapping[str, Any]], main: str) -> list[str]:
    notes = [f"{_name(model)}: no KL: {model['no_kl']}." for model in models if model["no_kl"]]
    for model in models:
        failures = sum(found["num_failures"] for found in model["sets"].values())
        if failures:
            notes.append(f"{_name(model)}: {failures} rewards failed.")
        if not all(found["is_finite"] for found in model["sets"].values()):
            notes.append(f"{_name(model)}: its logits are not finite.")
    shares = [model["sets"][main]["solved"]["mean"] for model in models]
    if any(share is not None for share in shares) and not any(shares):
        notes.append("No model has solved a problem: is `eval.pass_reward` right for this reward?")
    return [f"- {note}" for note in notes]


def _name(model: Mapping[str, Any]) -> str:
    iteration = "" if model["iteration"] is None else f" (iteration {model['iteration']})"
    return _escaped(model["model"]) + iteration


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _interval(estimate: Mapping[str, Any] | None, *, signed: bool = False, digits: int = 3) -> str:
    if estimate is None or estimate["mean"] is None:
        return ""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{estimate['mean']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


def _count(kind: Mapping[str, Any] | None) -> str:
    return "" if kind is None or kind["share"]["mean"] is None else str(len(kind["rows"]))


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
