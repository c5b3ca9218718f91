"""Pictures of runs: the reward over iterations, read from metrics.jsonl.

matplotlib is imported only when something is drawn, through its object-oriented interface: no backend is
chosen for the process and no figure stays open.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardes.errors import UserError

METRICS = "metrics.jsonl"
_FORMATS = (".png", ".svg")
# Okabe and Ito's palette: told apart with any colour vision. Markers repeat the distinction without colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _GREY = "#333333", "#777777"

Point = dict[str, float]


def read_metrics(run_dir: Path) -> dict[int, Point]:
    """The rewards of a run by iteration, in order of iterations.

    Lines of the same iteration are merged, the later one winning: a run that was stopped and resumed may
    report an iteration again. A torn last line belongs to a run that is being written and is ignored.

    Args:
        run_dir: A run directory.

    Returns:
        For each iteration the ``reward_*`` and ``heldout_reward`` values that were recorded.

    Raises:
        UserError: There is no metrics file, it holds nothing yet, or a line cannot be used.
    """
    path = run_dir / METRICS
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; wanted a run directory, in which training writes "
            f"{METRICS} (run.dir of the run's configuration)"
        ) from None
    if _is_json(last):
        lines.append(last)
    points: dict[int, Point] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            iteration, point = _parse(line, where=f"{path}, line {number}")
            points.setdefault(iteration, {}).update(point)
    if not points:
        raise UserError(f"{path} holds no complete line yet: plot the run after its first iteration")
    return dict(sorted(points.items()))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse(line: bytes, *, where: str) -> tuple[int, Point]:
    """One line as its iteration and its rewards."""
    wanted = (
        "wanted a JSON object with an integer 'iteration' and numbers as rewards; remove or repair the line"
    )
    record: Any = json.loads(line) if _is_json(line) else None
    iteration = record.get("iteration") if isinstance(record, dict) else None
    if not isinstance(iteration, int):
        raise UserError(f"{where}: got {_shortened(line)}; {wanted}")
    rewards = {
        key: value
        for key, value in record.items()
        if value is not None and (key.startswith("reward_") or key == "heldout_reward")
    }
    for key, value in rewards.items():
        if not isinstance(value, int | float):
            raise UserError(f"{where}: {key} is {value!r}; {wanted}")
    return iteration, rewards


def _shortened(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _labels(run_dirs: Sequence[Path]) -> list[str]:
    """The directories' names; the paths as given where two names are the same."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    return names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]


def plot_runs(run_dirs: list[Path], out: Path) -> None:
    """Draws the held-out reward and the members' rewards of one or several runs over iterations.

    Both are placed at the number of updates that the weights had seen: the members of iteration k are
    scattered around the weights that the held-out reward of line k was measured with.

    Args:
        run_dirs: Run directories; each is named in the legend.
        out: A file that ends in .png or .svg; replaced if it exists.

    Raises:
        UserError: matplotlib is missing, a run cannot be read, or ``out`` cannot be written.
    """
    if out.suffix.lower() not in _FORMATS:
        raise UserError(
            f"{out}: got the suffix {out.suffix!r}; name a file that ends in {' or '.join(_FORMATS)}"
        )
    if not run_dirs:
        raise UserError("no run to plot; give at least one run directory")
    runs = [read_metrics(run_dir) for run_dir in run_dirs]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UserError(f"plots need matplotlib ({error}); pip install 'shardes[plot]'") from None

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = _labels(run_dirs)
    run_handles = []
    for index, (label, points) in enumerate(zip(labels, runs, strict=True)):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        _draw(axes, points, colour=colour, marker=marker, band_alpha=0.13 if len(runs) == 1 else 0.07)
        run_handles.append(Line2D([], [], color=colour, marker=marker, linewidth=2.2, label=label))
    style_handles = [
        Line2D([], [], color=_GREY, marker="o", linewidth=2.2, label="held-out reward"),
        Line2D([], [], color=_GREY, linewidth=1.2, alpha=0.8, label="members' mean reward"),
        Patch(facecolor=_GREY, alpha=0.25, linewidth=0, label="members, lowest to highest"),
    ]

    axes.set_xlabel("iteration (updates applied)", color=_INK)
    axes.set_ylabel("reward", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.015)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    # Outside of the axes, where no curve is covered: above, what the strokes mean; below, which run is which.
    figure.legend(handles=style_handles, loc="outside upper left", ncols=3, frameon=False, labelcolor=_INK)
    columns = max(1, min(len(runs), 90 // (8 + max(map(len, labels)))))
    figure.legend(
        handles=run_handles, loc="outside lower center", ncols=columns, frameon=False, labelcolor=_INK
    )

    # Written beside the picture and renamed, so that a reader never sees half of it.
    partial = out.with_name(f".{out.name}.partial")
    metadata = {"Date": None} if out.suffix.lower() == ".svg" else {}
    try:
        figure.savefig(partial, format=out.suffix.lower()[1:], metadata=metadata, facecolor="white")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{out} cannot be written: {error.strerror}; give a file in a directory that exists"
        ) from None


def _draw(axes: Any, points: dict[int, Point], *, colour: str, marker: str, band_alpha: float) -> None:
    """One run's curves."""
    nan = float("nan")
    # An iteration without rewards leaves a gap; the line after the last one has none and needs no gap.
    with_members = [iteration for iteration, point in points.items() if "reward_mean" in point]
    if with_members:
        iterations = range(with_members[0], with_members[-1] + 1)
        members = [points.get(iteration, {}) for iteration in iterations]
        low, high, mean = (
            [point.get(key, nan) for point in members] for key in ("reward_min", "reward_max", "reward_mean")
        )
        axes.fill_between(iterations, low, high, color=colour, alpha=band_alpha, linewidth=0)
        axes.plot(iterations, mean, color=colour, linewidth=1.2, alpha=0.75)
    heldout = [
        (iteration, point["heldout_reward"])
        for iteration, point in points.items()
        if "heldout_reward" in point
    ]
    if heldout:
        axes.plot(
            *zip(*heldout, strict=True),
            color=colour,
            marker=marker,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.8,
            linewidth=2.2,
            zorder=3,
        )
