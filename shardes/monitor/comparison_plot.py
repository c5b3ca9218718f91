"""Picture of a comparison of models: pass@k, problems gained and lost, and changes of all held-out sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardes.monitor.pictures import COLOURS, GREY, INK, MARKERS, save_picture, shown, style

_Models = Sequence[Mapping[str, Any]]


def plot_comparison(report: Mapping[str, Any], out: Path) -> None:
    """Draw a comparison of models.

    Args:
        report: Statistics of the models, as ``compare_results`` of ``shardes/evaluation`` returns them.
        out: A file that ends in .png or .svg; replaced if it exists.

    Raises:
        UserError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    models, main = report["models"], report["main_set"]
    drawn = [name for name in models[0]["sets"][main] if name.startswith("pass@") and "_" not in name]
    labels = _labels(models)
    num_others, num_sets = len(models) - 1, len(models[0]["sets"])
    heights = [*([3.2] if drawn else []), 0.8 + 0.35 * num_others, 0.8 + 0.25 * num_others * num_sets]
    figure = Figure(figsize=(8, sum(heights) + 0.3 * len(models) + 0.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if drawn:
        _draw_coverage(axes.pop(0), models, main, drawn)
    _draw_gained_and_lost(axes.pop(0), models, main, labels=labels)
    _draw_changes(axes.pop(0), models)
    handles = [
        Line2D([], [], **_look(index), linewidth=1.8, label=label) for index, label in enumerate(labels)
    ]
    figure.legend(handles=handles, loc="outside lower left", frameon=False, labelcolor=INK, fontsize=8)
    save_picture(figure, out)


def _labels(models: _Models) -> list[str]:
    """Return the last parts of the models' names; the names as given where two are the same."""
    names = [model["model"].rstrip("/").rpartition("/")[2] or model["model"] for model in models]
    whole = [model["model"] for model in models]
    first, *others = map(shown, names if len(set(names)) == len(names) else whole)
    return [f"{first} (base)", *others]


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _draw_coverage(axes: Any, models: _Models, main: str, drawn: Sequence[str]) -> None:
    """Draw pass@k of each model over k, with its interval."""
    for index, model in enumerate(models):
        found = model["sets"][main]
        known = [(int(name.partition("@")[2]), found[name]) for name in drawn if name in found]
        known = [(k, estimate) for k, estimate in known if estimate["mean"] is not None]
        ks = [k for k, _ in known]
        low, mean, high = ([estimate[key] for _, estimate in known] for key in ("low", "mean", "high"))
        look = _look(index)
        axes.fill_between(ks, low, high, color=look["color"], alpha=0.13, linewidth=0)
        axes.plot(ks, mean, **look, linewidth=1.8, markersize=5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("k: answers that are drawn", color=INK)
    _title(axes, f"pass@k: problems of {shown(main)} that one of k answers solves")
    style(axes)


def _draw_gained_and_lost(axes: Any, models: _Models, main: str, *, labels: Sequence[str]) -> None:
    """Draw, for each model but the base, how many problems it has gained and lost."""
    from matplotlib.ticker import MaxNLocator

    others = models[1:]
    for name, sign, colour in (("gained", 1, "#009E73"), ("lost", -1, "#D55E00")):
        counts = [sign * len(model["sets"][main][name]["rows"]) for model in others]
        bars = axes.barh(range(len(others)), counts, height=0.6, color=colour)
        axes.bar_label(bars, [f" {abs(count)} " for count in counts], fontsize=8, color=INK)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(others)), labels[1:])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda count, _: f"{abs(count):.0f}")
    axes.invert_yaxis()
    _title(axes, f"problems of {shown(main)} that the greedy answer loses (left) and gains (right)")
    style(axes)
    axes.margins(x=0.1)


def _draw_changes(axes: Any, models: _Models) -> None:
    """Draw how much the reward has changed on every set, with its interval."""
    names = list(models[0]["sets"])
    others = models[1:]
    for index, model in enumerate(others):
        for place, name in enumerate(names):
            change = model["sets"][name]["reward_change"]
            if change["mean"] is None:
                continue
            height = place + 0.6 * ((index + 0.5) / len(others) - 0.5)
            # Percentiles of few resamples may miss the mean.
            low, high = change["mean"] - change["low"], change["high"] - change["mean"]
            errors = [[max(low, 0.0)], [max(high, 0.0)]]
            axes.errorbar(change["mean"], height, xerr=errors, **_look(index + 1), linestyle="", capsize=2)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(names)), [shown(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    _title(axes, "change of the reward against the base, by held-out set")
    style(axes)
    axes.margins(x=0.1)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=9, color=INK, loc="left")
