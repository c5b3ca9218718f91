"""Pictures of runs: what is read, what is drawn, and what a user is told."""

import json
import sys

import numpy as np
import pytest

from shardes.errors import UserError
from shardes.monitor.plot import plot_runs, read_metrics

pytest.importorskip("matplotlib", reason="pip install 'shardes[plot]'")

LINES = [
    {"iteration": 0, "reward_mean": 0.1, "reward_std": 0.1, "reward_min": 0.0, "reward_max": 0.3}
    | {"heldout_reward": 0.05},
    {"iteration": 1, "reward_mean": 0.2, "reward_std": 0.1, "reward_min": 0.1, "reward_max": 0.4},
    {"iteration": 2, "reward_mean": None, "reward_std": None, "reward_min": None, "reward_max": None},
    {"iteration": 3, "reward_mean": 0.4, "reward_std": 0.1, "reward_min": 0.2, "reward_max": 0.5},
    {"iteration": 4, "heldout_reward": 0.45, "weights_digest": "00ff"},
]


def make_run(path, lines=LINES, tail=""):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return path


def drawn(monkeypatch, run_dirs, out):
    """Plots and returns the figure."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    plot_runs(run_dirs, out)
    return figures[0]


def curves(figure):
    return [np.array(line.get_xydata()) for line in figure.axes[0].get_lines()]


def legend_texts(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_the_heldout_reward_stands_where_its_weights_are_and_missing_rewards_leave_a_gap(
    tmp_path, monkeypatch
):
    figure = drawn(monkeypatch, [make_run(tmp_path / "a")], tmp_path / "a.png")
    members, heldout = curves(figure)
    assert heldout.tolist() == [[0, 0.05], [4, 0.45]]
    np.testing.assert_array_equal(members, [[0, 0.1], [1, 0.2], [2, np.nan], [3, 0.4]])
    (band,) = figure.axes[0].collections
    heights = np.concatenate([path.vertices[:, 1] for path in band.get_paths()])
    assert heights.min() == 0.0
    assert heights.max() == 0.5
    assert figure.axes[0].get_xlabel()
    assert figure.axes[0].get_ylabel()


def test_several_runs_are_named_and_differ_in_colour_and_marker(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / name) for name in ("one", "two", "three")]
    figure = drawn(monkeypatch, runs, tmp_path / "all.png")
    assert {"one", "two", "three"} <= set(legend_texts(figure))
    heldout = figure.axes[0].get_lines()[1::2]
    assert len({(line.get_color(), line.get_marker()) for line in heldout}) == 3


def test_runs_whose_directories_have_the_same_name_are_told_apart(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / parent / "run") for parent in ("x", "y")]
    texts = legend_texts(drawn(monkeypatch, runs, tmp_path / "all.png"))
    assert {str(run) for run in runs} <= set(texts)


@pytest.mark.parametrize(("name", "magic"), [("r.png", b"\x89PNG"), ("r.SVG", b"<?xml")])
def test_the_suffix_picks_the_format_and_nothing_else_is_left(tmp_path, name, magic):
    out = tmp_path / "pictures" / name
    out.parent.mkdir()
    plot_runs([make_run(tmp_path / "run")], out)
    assert out.read_bytes().startswith(magic)
    assert list(out.parent.iterdir()) == [out]


def test_pyplot_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    plot_runs([make_run(tmp_path / "run")], tmp_path / "r.png")


@pytest.mark.parametrize("tail", ['{"iteration": 5, "heldout_rew', '{"iteration": 5, "seconds": {"io": 1}'])
def test_a_torn_last_line_is_ignored_and_a_whole_one_without_its_end_of_line_is_not(tmp_path, tail):
    torn = make_run(tmp_path / "torn", tail=tail)
    whole = make_run(tmp_path / "whole", tail='{"iteration": 5, "heldout_reward": 1}')
    assert read_metrics(torn) == read_metrics(make_run(tmp_path / "plain"))
    assert read_metrics(whole)[5] == {"heldout_reward": 1}


def test_lines_of_the_same_iteration_are_merged_and_the_later_one_wins(tmp_path):
    again = {"iteration": 4, "reward_mean": 0.5, "heldout_reward": 0.46}
    points = read_metrics(make_run(tmp_path / "run", [*LINES, again]))
    assert points[4] == {"reward_mean": 0.5, "heldout_reward": 0.46}
    assert list(points) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "lines",
    [LINES[:1], [{"iteration": 0, "reward_mean": 0.5}], [{"iteration": 3, "heldout_reward": 0.5}]],
    ids=["one line", "no band", "held-out only"],
)
def test_a_run_that_has_just_begun_can_be_drawn(tmp_path, lines):
    plot_runs([make_run(tmp_path / "run", lines)], tmp_path / "r.png")
    assert (tmp_path / "r.png").is_file()


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        ('{"iteration": 1, "rew', "rew"),
        ("[1, 2]", "[1, 2]"),
        ('{"reward_mean": 0.5}', "reward_mean"),
        ('{"iteration": "1"}', "iteration"),
        ('{"iteration": 1, "reward_mean": "high"}', "'high'"),
        ('{"iteration": 4611686018427387904, "reward_mean": 1}', "4611686018427387904"),
        ('{"iteration": -1, "reward_mean": 1}', "-1"),
        ('{"iteration": 1, "reward_mean": 1e308}', "1e+308"),
        (f'{{"iteration": 1, "reward_mean": 1{"0" * 400}}}', "reward_mean is 1000"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, bad, got):
    run = make_run(tmp_path / "run", LINES[:1], tail=bad + "\n" + json.dumps(LINES[1]) + "\n")
    with pytest.raises(UserError) as error:
        plot_runs([run], tmp_path / "r.png")
    message = str(error.value)
    assert "metrics.jsonl, line 2" in message
    assert got in message
    assert "wanted a JSON object" in message


def test_what_cannot_be_read_or_written_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"nowhere.*metrics\.jsonl cannot be read.*wanted a run directory"):
        plot_runs([tmp_path / "nowhere"], tmp_path / "r.png")
    with pytest.raises(UserError, match="no complete line yet"):
        plot_runs([make_run(tmp_path / "empty", [])], tmp_path / "r.png")
    with pytest.raises(UserError, match=r"r\.jpeg.*'\.jpeg'.*\.png or \.svg"):
        plot_runs([run], tmp_path / "r.jpeg")
    with pytest.raises(UserError, match="at least one run directory"):
        plot_runs([], tmp_path / "r.png")
    with pytest.raises(UserError, match=r"cannot be written.*directory that exists"):
        plot_runs([run], tmp_path / "missing" / "r.png")


def test_a_missing_matplotlib_is_said_with_the_remedy(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'shardes\[plot\]'"):
        plot_runs([make_run(tmp_path / "run")], tmp_path / "r.png")


def measured(factor):
    """Lines of a run that has instruments and times."""
    lines = [
        line
        | {"update_norm": factor * i, "tied_members": 0.5, "kl_to_base": None if i else 0.25}
        | {"seconds": {"rollout": 3.0 * factor, "update": 1.0 * factor, "io": 1e-6}}
        for i, line in enumerate(LINES[:4])
    ]
    return [*lines, LINES[4] | {"seconds": {"rollout": 1000.0}}]


def panel(figure, start):
    (found,) = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(start)]
    return found


def test_instruments_have_panels_of_their_own_and_only_those_that_there_are(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / name, measured(factor)) for name, factor in (("one", 1), ("two", 2))]
    runs.append(make_run(tmp_path / "old"))
    figure = drawn(monkeypatch, runs, tmp_path / "all.png")
    titles = {axes.get_title(loc="left").partition(":")[0].partition(",")[0] for axes in figure.axes}
    wanted = {"", "seconds of an iteration", "tied_members", "update_norm", "kl_to_base"}
    assert titles == wanted | {"seconds per iteration"}
    norms = panel(figure, "update_norm").get_lines()
    assert [line.get_xydata().tolist() for line in norms] == [
        [[i, factor * i] for i in range(4)] for factor in (1, 2)
    ]
    assert [line.get_color() for line in norms] == [
        line.get_color() for line in figure.axes[0].get_lines()[1:4:2]
    ]
    assert panel(figure, "kl_to_base").get_lines()[0].get_xydata().tolist() == [[0, 0.25]]


def test_the_time_of_an_iteration_is_a_bar_of_its_phases(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / name, measured(factor)) for name, factor in (("one", 1), ("two", 2))]
    axes = panel(drawn(monkeypatch, runs, tmp_path / "all.png"), "seconds of an iteration")
    bars = {c.get_label(): [(b.get_x(), b.get_width()) for b in c] for c in axes.containers}
    # The time after the last iteration is no iteration's, and what cannot be seen is left out.
    assert bars == {"rollout": [(0, 3), (0, 6)], "update": [(3, 1), (6, 2)]}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]


def test_the_rewards_alone_can_be_drawn(tmp_path):
    from matplotlib.image import imread

    run = make_run(tmp_path / "run", measured(1))
    plot_runs([run], tmp_path / "r.png", reward_only=True)
    assert imread(tmp_path / "r.png").shape[:2] == (675, 1200)


@pytest.mark.parametrize("seconds", [3, {"io": "x"}])
def test_times_that_are_no_times_are_named(tmp_path, seconds):
    run = make_run(tmp_path / "run", [LINES[0] | {"seconds": seconds}])
    with pytest.raises(UserError, match=r"line 1: seconds(/io)? is .*wanted a JSON object"):
        plot_runs([run], tmp_path / "r.png")


def test_names_are_no_formulas_and_none_is_left_out(tmp_path):
    seconds = {"$\\bad{$": 1.0, "_io\x00\ud800": 2.0}
    first = make_run(tmp_path / "$\\x{$", [LINES[0] | {"seconds": seconds}])
    plot_runs([first, make_run(tmp_path / "_run", LINES)], tmp_path / "r.svg")
    assert (tmp_path / "r.svg").is_file()


def test_extreme_numbers_take_no_more_time(tmp_path):
    ends = [{"iteration": 0, "reward_mean": -1e100}, {"iteration": (1 << 40) - 1, "reward_mean": 1e100}]
    plot_runs([make_run(tmp_path / "run", ends)], tmp_path / "r.png")
    assert (tmp_path / "r.png").is_file()


def test_too_many_phases_are_refused(tmp_path):
    run = make_run(tmp_path / "run", [LINES[0] | {"seconds": {str(i): 1.0 for i in range(101)}}])
    with pytest.raises(UserError, match="line 1: seconds has 101 phases"):
        plot_runs([run], tmp_path / "r.png")
