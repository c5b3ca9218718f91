"""Pictures of runs: rewards, instruments and time by phase, read from metrics.jsonl.

matplotlib is imported only when something is drawn, through its object-oriented interface: no backend is
chosen for the process and no figure stays open.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardes.errors import UserError
from shardes.monitor.pictures import COLOURS, GREY, INK, MARKERS, check_picture, save_picture, shown, style
from shardes.utils.reading import parse_json, read_regular

METRICS = "metrics.jsonl"
_NUM_COLUMNS = 2
_MOST_BYTES = 1 << 30
# Beyond these, a file is none that training wrote, and matplotlib would compute marks for ever.
_MOST_ITERATIONS, _MOST_PHASES, _LONGEST_NAME, _LARGEST = 1 << 40, 100, 100, 1e100

Point = dict[str, float]

# What is drawn below the rewards, for runs that have it: what stands above the panel, and the metrics in it.
_INSTRUMENTS = {
    "reward_snr: signal to noise of the members' rewards": ("reward_snr",),
    "tied_members, agreed_prompts (dashed)": ("tied_members", "agreed_prompts"),
    "effective_population": ("effective_population",),
    "update_norm: length of the update": ("update_norm",),
    "update_cosine, update_norm_ratio (dashed)": ("update_cosine", "update_norm_ratio"),
    "update_cosine_to_last": ("update_cosine_to_last",),
    "kl_to_base: nats per token": ("kl_to_base",),
    "base_distance": ("base_distance",),
    "num_tokens: of all members": ("num_tokens",),
    "seconds per iteration": ("seconds",),
}
_METRICS = {name for names in _INSTRUMENTS.values() for name in names}
_PHASES = "seconds/"
# Phases of the time, in the order in which they follow each other, and after them any other.
_PHASE_COLOURS = {
    "perturb": "#E69F00",
    "gather": "#CC79A7",
    "rollout": "#0072B2",
    "reward": "#009E73",
    "wait": "#bbbbbb",
    "update": "#D55E00",
    "digest": "#8c6d46",
    "snapshot": "#666666",
    "io": "#56B4E9",
}


def read_metrics(run_dir: Path) -> dict[int, Point]:
    """Return the metrics of a run by iteration, in order of iterations.

    Lines of the same iteration are merged, the later one winning: a run that was stopped and resumed may
    report an iteration again. A torn last line belongs to a run that is being written and is ignored.

    Args:
        run_dir: A run directory.

    Returns:
        For each iteration the numbers that were recorded of those that are drawn; ``seconds`` is the time of
        all phases, ``seconds/NAME`` that of one.

    Raises:
        UserError: There is no metrics file, it holds nothing yet, or a line cannot be used.
    """
    path = run_dir / METRICS
    try:
        *lines, last = read_regular(path, max_bytes=_MOST_BYTES).split(b"\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; wanted a run directory, in which training writes "
            f"{METRICS} (run.dir of the run's configuration)"
        ) from None
    with contextlib.suppress(ValueError):
        parse_json(last)
        lines.append(last)
    points: dict[int, Point] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            iteration, point = _parse(line, where=f"{path}, line {number}")
            points.setdefault(iteration, {}).update(point)
    if not points:
        raise UserError(f"{path} holds no complete line yet: plot the run after its first iteration")
    return dict(sorted(points.items()))


def _parse(line: bytes, *, where: str) -> tuple[int, Point]:
    """Return a line's iteration and its numbers that are drawn."""
    wanted = (
        "wanted a JSON object with an integer 'iteration' and numbers as rewards; remove or repair the line"
    )
    record: Any = None
    with contextlib.suppress(ValueError):
        record = parse_json(line)
    iteration = record.get("iteration") if isinstance(record, dict) else None
    if not isinstance(iteration, int) or not 0 <= iteration < _MOST_ITERATIONS:
        raise UserError(f"{where}: got {_shortened(line)}; {wanted}")
    numbers = {
        key: value
        for key, value in record.items()
        if value is not None
        and (key.startswith("reward_") or key == "heldout_reward" or key in _METRICS - {"seconds"})
    }
    phases = record.get("seconds") or {}
    if not isinstance(phases, dict):
        raise UserError(f"{where}: seconds is {phases!r}; {wanted}")
    if len(phases) > _MOST_PHASES:
        raise UserError(f"{where}: seconds has {len(phases)} phases; wanted at most {_MOST_PHASES}")
    numbers |= {
        f"{_PHASES}{shown(name, max_characters=_LONGEST_NAME)}": value for name, value in phases.items()
    }
    for key, value in numbers.items():
        if not isinstance(value, int | float) or abs(value) > _LARGEST:
            raise UserError(f"{where}: {shown(key, max_characters=_LONGEST_NAME)} is {value!r:.80}; {wanted}")
    # The line at the end is no iteration.
    if phases and "reward_mean" in record:
        numbers["seconds"] = sum(phases.values())
    return iteration, numbers


def _shortened(line: bytes) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _labels(run_dirs: Sequence[Path]) -> list[str]:
    """Return the directories' names; the paths as given where two names are the same."""
    names = [run_dir.resolve().name for run_dir in run_dirs]
    labels = names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]
    return [shown(label) for label in labels]


def plot_runs(run_dirs: list[Path], out: Path, *, reward_only: bool = False) -> None:
    """Draw the rewards of one or several runs over iterations, and below them time and instruments.

    Both are placed at the number of updates that the weights had seen: the members of iteration k are
    scattered around the weights that the held-out reward of line k was measured with.

    Args:
        run_dirs: Run directories; each is named in the legend.
        out: A file that ends in .png or .svg; replaced if it exists.
        reward_only: Whether nothing but the rewards is drawn.

    Raises:
        UserError: matplotlib is missing, a run cannot be read, or ``out`` cannot be written.
    """
    check_picture(out)
    if not run_dirs:
        raise UserError("no run to plot; give at least one run directory")
    runs = [read_metrics(run_dir) for run_dir in run_dirs]
    save_picture(draw_runs(runs, labels=_labels(run_dirs), reward_only=reward_only), out)


def draw_runs(
    runs: Sequence[dict[int, Point]], *, labels: Sequence[str], reward_only: bool = False, step: int = 1
) -> Any:
    """Return a matplotlib figure of runs.

    Args:
        runs: The metrics of each by iteration; at least one run.
        labels: The name of each, as ``shown`` returns it.
        reward_only: Whether nothing but the rewards is drawn.
        step: Iterations from one point to the next, where one stands for several.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    panels = {} if reward_only else _panels(runs)
    has_time = not reward_only and any(_mean_seconds(points) for points in runs)
    num_rows = -(-len(panels) // _NUM_COLUMNS)
    time_height = (0.45 + 0.3 * len(runs)) if has_time else 0.0
    figure = Figure(figsize=(8, 4.5 + time_height + 1.6 * num_rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [3.6, *([time_height] if has_time else []), *[1.6] * num_rows]
    grid = figure.add_gridspec(len(heights), _NUM_COLUMNS, height_ratios=heights)
    axes = figure.add_subplot(grid[0, :])
    run_handles = []
    for index, (label, points) in enumerate(zip(labels, runs, strict=True)):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        band_alpha = 0.13 if len(runs) == 1 else 0.07
        _draw(axes, points, colour=colour, marker=marker, band_alpha=band_alpha, step=step)
        run_handles.append(Line2D([], [], color=colour, marker=marker, linewidth=2.2, label=label))
    style_handles = [
        Line2D([], [], color=GREY, marker="o", linewidth=2.2, label="held-out reward"),
        Line2D([], [], color=GREY, linewidth=1.2, alpha=0.8, label="members' mean reward"),
        Patch(facecolor=GREY, alpha=0.25, linewidth=0, label="members, lowest to highest"),
    ]

    axes.set_xlabel("iteration (updates applied)", color=INK)
    axes.set_ylabel("reward", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    style(axes)
    if has_time:
        _draw_time(figure.add_subplot(grid[1, :]), runs, labels=labels)
    for place, (title, names) in enumerate(panels.items()):
        row, column = divmod(place, _NUM_COLUMNS)
        panel = figure.add_subplot(grid[len(heights) - num_rows + row, column])
        _draw_instruments(panel, runs, names)
        panel.set_title(title, fontsize=8, color=INK, loc="left")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], nbins=5))
        panel.yaxis.set_major_locator(MaxNLocator(nbins=4))
        style(panel, labelsize=7)
        panel.set_xlim(axes.get_xlim())
    # Outside of the axes, where no curve is covered: above, what the strokes mean; below, which run is which.
    figure.legend(handles=style_handles, loc="outside upper left", ncols=3, frameon=False, labelcolor=INK)
    columns = max(1, min(len(runs), 90 // (8 + max(map(len, labels)))))
    figure.legend(
        handles=run_handles, loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK
    )
    return figure


def _panels(runs: Sequence[dict[int, Point]]) -> dict[str, tuple[str, ...]]:
    """Return the panels of instruments for which one of the runs has something to draw."""
    known = {name for points in runs for point in points.values() for name in point}
    return {title: names for title, names in _INSTRUMENTS.items() if known.intersection(names)}


def _mean_seconds(points: dict[int, Point]) -> dict[str, float]:
    """Return the mean seconds of an iteration by phase; the time after the last one does not count."""
    timed = [point for point in points.values() if "seconds" in point]
    names = sorted({key for point in timed for key in point if key.startswith(_PHASES)})
    return {
        name.removeprefix(_PHASES): sum(point.get(name, 0.0) for point in timed) / len(timed)
        for name in names
    }


def _draw_time(axes: Any, runs: Sequence[dict[int, Point]], *, labels: Sequence[str]) -> None:
    """Draw a bar for each run: the mean time of an iteration, by phase."""
    seconds = [_mean_seconds(points) for points in runs]
    # What nobody could see is not in the legend either.
    least = 0.005 * max(sum(each.values()) for each in seconds)
    seen = {name for each in seconds for name, value in each.items() if value > least}
    names = [name for name in _PHASE_COLOURS if name in seen] + sorted(seen - _PHASE_COLOURS.keys())
    starts = [0.0] * len(runs)
    for name in names:
        widths = [each.get(name, 0.0) for each in seconds]
        colour = _PHASE_COLOURS.get(name, "#999999")
        axes.barh(range(len(runs)), widths, left=starts, height=0.7, color=colour, label=name)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(range(len(runs)), labels if len(runs) > 1 else [""])
    axes.invert_yaxis()
    axes.set_title("seconds of an iteration, by phase (mean)", fontsize=8, color=INK, loc="left")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 0.98),
        fontsize=7,
        frameon=False,
        labelcolor=INK,
        ncols=max(len(names), 1),
        handlelength=1,
        columnspacing=1,
        borderpad=0,
    )
    style(axes, labelsize=7)
    axes.grid(visible=False, axis="y")


def _series(points: dict[int, Point], name: str) -> list[tuple[int, float]]:
    """Return the iterations in which a metric was measured, each with its value."""
    return [(iteration, point[name]) for iteration, point in points.items() if name in point]


def _draw_instruments(axes: Any, runs: Sequence[dict[int, Point]], names: Sequence[str]) -> None:
    """Draw metrics of each run over the iterations in which they were measured."""
    for index, points in enumerate(runs):
        for name, stroke in zip(names, ("-", "--"), strict=False):
            known = _series(points, name)
            if known:
                axes.plot(
                    *zip(*known, strict=True),
                    color=COLOURS[index % len(COLOURS)],
                    linestyle=stroke,
                    linewidth=1.1,
                    marker="." if len(known) < 12 else "",
                )


def _draw(
    axes: Any, points: dict[int, Point], *, colour: str, marker: str, band_alpha: float, step: int
) -> None:
    """Draw one run's rewards."""
    nan = float("nan")
    # An iteration without rewards leaves a gap; the line after the last one has none and needs no gap.
    with_members = [iteration for iteration, point in points.items() if "reward_mean" in point]
    if with_members:
        # One that is not known is enough for a gap, however wide.
        iterations = sorted({*with_members, *(iteration + step for iteration in with_members[:-1])})
        members = [points.get(iteration, {}) for iteration in iterations]
        low, high, mean = (
            [point.get(key, nan) for point in members] for key in ("reward_min", "reward_max", "reward_mean")
        )
        axes.fill_between(iterations, low, high, color=colour, alpha=band_alpha, linewidth=0)
        axes.plot(iterations, mean, color=colour, linewidth=1.2, alpha=0.75)
    heldout = _series(points, "heldout_reward")
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
