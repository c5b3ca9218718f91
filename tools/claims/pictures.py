"""Pictures of the study."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from claims.arms import ARMS
from claims.figures import Results, interpolated
from claims.lines import Line
from claims.tables import SPENT

NUM_PLACES = 200
# Of ten arms each; there are as many colours.
LINES = ("-", "--", ":", "-.")


def draw(results: Results, out: Path) -> list[str]:
    """Draw what there are lines for.

    Args:
        results: Lines of the study.
        out: Path whose name is continued: ``claims`` gives ``claims-curves.png`` and so on.

    Returns:
        Names of the files that were written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    written = []
    for name, drawing in {"curves": _curves, "steps": _steps, "kl": _divergences}.items():
        file = out.with_name(f"{out.name}-{name}.png")
        if _grid(results, drawing, columns=3 if drawing is _curves else 1, path=file):
            written.append(file.name)
    return written


def _grid(
    results: Results,
    drawing: Callable[[Results, str, Sequence[Any]], None],
    *,
    columns: int,
    path: Path,
) -> bool:
    """Draw a row of panels for each task, or one panel after another; return whether there were any."""
    from matplotlib import pyplot

    tasks = [task for task in results.tasks() if results.arms(task)]
    if not tasks:
        return False
    rows, wide = (len(tasks), columns) if columns > 1 else (1, len(tasks))
    figure, axes = pyplot.subplots(
        rows, wide, figsize=(4.2 * wide, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for i, task in enumerate(tasks):
        panels = axes[i] if columns > 1 else axes[:, i]
        drawing(results, task, panels)
        panels[0].set_title(task)
    handles, labels = axes[0][0].get_legend_handles_labels()
    for row in axes:
        for handle, label in zip(*row[0].get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


def _style(arm: str) -> dict[str, str]:
    """Return the colour and the line of an arm, which are the same in all pictures and nobody else's."""
    line, colour = divmod(list(ARMS).index(arm), 10)
    return {"color": f"C{colour}", "linestyle": LINES[line]}


def _curves(results: Results, task: str, panels: Sequence[Any]) -> None:
    """Draw held-out reward against what was spent: means over seeds, and all runs between the lines."""
    for arm in results.arms(task):
        lines = list(results.runs(task, arm).values())
        for panel, (key, label) in zip(panels, SPENT.items(), strict=True):
            places, rewards = _band(lines, key)
            means = [statistics.fmean(values) for values in rewards]
            style = _style(arm)
            panel.plot(places, means, label=arm, **style)
            low, high = list(map(min, rewards)), list(map(max, rewards))
            panel.fill_between(places, low, high, alpha=0.1, color=style["color"])
            panel.locator_params(axis="x", nbins=5)
            panel.set_xlabel(label)
    panels[0].set_ylabel("held-out reward")


def _band(lines: Sequence[Line], key: str) -> tuple[list[float], list[list[float]]]:
    """Return amounts spent, and the rewards of all runs at each of them."""
    most = min(line["curve"][-1][key] for line in lines)
    places = [most * i / NUM_PLACES for i in range(NUM_PLACES + 1)]
    return places, [[interpolated(line["curve"], key=key, value=place) for line in lines] for place in places]


def _steps(results: Results, task: str, panels: Sequence[Any]) -> None:
    """Draw the reward of the tuning seed against the step size, as a multiple of the best one."""
    for arm in results.arms(task):
        best, found = results.best(task, arm), results.sweep(task, arm)
        if best is None or not found:
            continue
        sizes = [size / best for size in found]
        panels[0].plot(sizes, list(found.values()), marker="o", label=arm, **_style(arm))
    panels[0].axhline(results.base_reward(task), color="grey", linewidth=0.8, linestyle=":")
    panels[0].set_xscale("log")
    panels[0].set_xlabel("step size / best")
    panels[0].set_ylabel("held-out reward")


def _divergences(results: Results, task: str, panels: Sequence[Any]) -> None:
    """Draw held-out reward against the divergence from the base model, each run a line."""
    for arm in results.arms(task):
        for number, line in enumerate(results.runs(task, arm).values()):
            points = [p for p in line["curve"] if p["reward"] is not None and p.get("kl") is not None]
            panels[0].plot(
                [point["kl"] for point in points],
                [point["reward"] for point in points],
                marker=".",
                linewidth=0.8,
                label=None if number else arm,
                **_style(arm),
            )
    panels[0].set_xlabel("KL(model || base), nats per token")
    panels[0].set_ylabel("held-out reward")
