"""Report of a run as one HTML file: curves, samples, instruments and settings.

It is made from the files of the run alone, of which those that are still being written may end anywhere.
"""

import io
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from shardes.config.loading import dump_config, load_run_config
from shardes.config.schema import Config
from shardes.config.yaml_text import dump_yaml
from shardes.errors import UserError
from shardes.monitor.pictures import check_matplotlib, shown
from shardes.monitor.plot import METRICS, draw_runs, read_metrics
from shardes.monitor.report_html import folded, number_of, page, table, text_of
from shardes.monitor.run_files import refusing_damage, task_name_of
from shardes.monitor.samples import spoken
from shardes.monitor.thinning import thinned
from shardes.runs.directory import read_lines
from shardes.runs.journal import recorded_header
from shardes.runs.metrics import num_trained
from shardes.utils.files import write_atomically
from shardes.utils.paths import path_problem
from shardes.utils.progress import duration
from shardes.utils.version import VERSION

_MOST_POINTS = 600
_LONGEST_CONFIGURATION = 1 << 20
_MOST_PROBLEMS, _MOST_EVALUATIONS, _MOST_METRICS = 8, 6, 300

_Line = Mapping[str, Any]


def write_report(run_dir: Path, out: Path) -> None:
    """Write the report of a run.

    Args:
        run_dir: A run directory, also of a run that goes on.
        out: The file; replaced if it exists.

    Raises:
        UserError: matplotlib is missing, there is no run, its files are damaged, or ``out`` cannot be
            written.
    """
    check_matplotlib("a report's curves need")
    if not run_dir.is_dir():
        raise UserError(f"RUN_DIR {run_dir}: it {path_problem(run_dir)}; give the directory of a run")
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"{out} cannot be written; give a file in a directory that exists: --out FILE")
    with refusing_damage(run_dir):
        text = report_page(run_dir)
    try:
        write_atomically(out, text)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another: --out FILE") from None


def report_page(run_dir: Path) -> str:
    """Return the report of a run as HTML.

    Raises:
        UserError: There is no run, or a file of it cannot be read.
    """
    header = recorded_header(run_dir)
    path = run_dir / METRICS
    if header is None and not path.is_file():
        raise UserError(
            f"RUN_DIR {run_dir}: {path} cannot be read (it {path_problem(path)}), and there is no journal; "
            "give the directory of a run"
        )
    lines = read_lines(path)
    try:
        config = load_run_config(run_dir, {})
    except UserError:  # of another version, or not there yet
        config = None
    sections = [
        ("Summary", "\n".join(_summary(lines, config))),
        ("Curves", _curves(run_dir) if lines else "<p>No iteration has ended yet.</p>"),
        ("Samples", "\n".join(_samples(read_lines(run_dir / "samples.jsonl")))),
        ("Instruments", _instruments(lines)),
        ("Settings", "\n".join(_settings(config, header))),
    ]
    written = ""
    if path.is_file():
        moment = time.strftime("%Y-%m-%d %H:%M", time.gmtime(path.stat().st_mtime))
        written = f" The run's metrics were last written at {moment} UTC."
    return page(
        run_dir.resolve().name or str(run_dir),
        subtitle=_what(config, header),
        sections=sections,
        footer=f"Made by shardes {VERSION} with: shardes report.{written}",
    )


def _what(config: Config | None, header: dict[str, Any] | None) -> str:
    """Return what is trained, on which task."""
    tree = {} if header is None else header["config"]
    if config is not None:
        tree = config.model_dump()
    # A name on the hub, or the end of a path.
    model = "/".join(str(tree.get("model", {}).get("path", "a model")).split("/")[-2:])
    return f"{model}, trained on {task_name_of(tree)}"


def _summary(lines: Sequence[_Line], config: Config | None) -> Iterator[str]:
    """Yield the figures that are asked for first."""
    done = [line for line in lines if "reward_mean" in line]
    is_finished = bool(lines) and "reward_mean" not in lines[-1]
    planned = "" if config is None else f" of {config.es.iterations}"
    facts = [(f"{len(done)}{planned}", "iterations, finished" if is_finished else "iterations, not finished")]
    heldout = {line["iteration"]: line["heldout_reward"] for line in lines if "heldout_reward" in line}
    known = {iteration: reward for iteration, reward in heldout.items() if reward is not None}
    if known:
        first, last = min(known), max(known)
        best = max(known, key=lambda iteration: (known[iteration], -iteration))
        facts.append((number_of(known[first]), f"held-out reward after {first} iterations"))
        facts.append((number_of(known[last]), f"held-out reward after {last}"))
        facts.append((number_of(known[best]), f"the best, after {best}"))
    if done:
        facts.append((number_of(done[-1]["reward_mean"]), "members' mean reward, last iteration"))
    seconds = sum(sum(line.get("seconds", {}).values()) for line in lines)
    tokens = sum(line.get("num_tokens") or 0 for line in lines)
    if seconds:
        facts.append((duration(seconds), "of training"))
    if tokens:
        facts.append((number_of(tokens), "tokens of members"))
    digests = [line["weights_digest"] for line in lines if "weights_digest" in line]
    if digests:
        facts.append((str(digests[-1]), "digest of the weights"))
    items = "".join(f"<li><b>{text_of(value)}</b><span>{text_of(name)}</span></li>" for value, name in facts)
    yield f'<ul class="facts">{items}</ul>'


def _curves(run_dir: Path) -> str:
    """Return the picture that ``shardes plot`` draws, as SVG within the page."""
    import matplotlib as mpl

    points, step = thinned(read_metrics(run_dir), most=_MOST_POINTS)
    # Names of parts that depend on nothing else, and letters that remain letters.
    with mpl.rc_context({"svg.hashsalt": "shardes", "svg.fonttype": "none"}):
        figure = draw_runs([points], labels=[shown(run_dir.resolve().name)], step=step)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing, facecolor="white")
    text = buffer.getvalue()
    svg = text[text.index("<svg") :].replace("<svg", '<svg role="img" aria-label="Curves of the run"', 1)
    note = f'<p class="note">Each point stands for {step} iterations.</p>' if step > 1 else ""
    return f"<figure>{svg}</figure>{note}"


def _samples(lines: Sequence[_Line]) -> Iterator[str]:
    """Yield the centre's answers to held-out problems over the run, and the first member's last ones."""
    centre = [line for line in lines if "member" not in line]
    members = [line for line in lines if "member" in line]
    if not lines:
        yield "<p>There are no samples yet.</p>"
        return
    iterations = _spread(sorted({line["iteration"] for line in centre}), most=_MOST_EVALUATIONS)
    by_problem: dict[tuple[str, str], list[_Line]] = defaultdict(list)
    for line in centre:
        if line["iteration"] in iterations:
            by_problem[str(line.get("set", "")), _asked(line)].append(line)
    chosen = list(by_problem.items())[:_MOST_PROBLEMS]
    if centre:
        known = f"{len(chosen)} of {len(by_problem)} held-out problems that were recorded"
        moments = ", ".join(map(number_of, iterations))
        yield f'<p class="note">{known}, as the centre answers them after so many iterations: {moments}.</p>'
    for (name, _), answers in chosen:
        yield "<article>"
        if name:
            yield f'<p class="note">{text_of(name)}</p>'
        yield _said(_messages(answers[0])[:1])
        yield "<table><tbody>"
        yield from (_row(f"after {number_of(line['iteration'])}", line) for line in answers)
        yield "</tbody></table></article>"
    if members:
        last = members[-1]["iteration"]
        rows = [
            f"<article>{_said(_messages(line)[:1])}<table><tbody>{_row('', line)}</tbody></table></article>"
            for line in members
            if line["iteration"] == last
        ]
        title = f"Answers of the first member in iteration {number_of(last)}"
        yield folded(title, "\n".join(rows[:_MOST_PROBLEMS]))


def _row(moment: str, line: _Line) -> str:
    """Return one answer and what it earned as a row; a conversation is folded."""
    reward = "no reward" if line.get("reward") is None else f"reward {number_of(line['reward'])}"
    rest = _messages(line)[1:]
    is_answer = len(rest) == 1
    said = f"<pre>{text_of(rest[0][1])}</pre>" if is_answer else folded(f"{len(rest)} messages", _said(rest))
    cells = "".join(f"<td>{text_of(cell)}</td>" for cell in (moment, reward))
    return f"<tr>{cells}<td>{said}</td></tr>"


def _said(messages: Sequence[tuple[str, str]]) -> str:
    """Return messages, each below who says it."""
    return "".join(
        f'<div class="said"><span class="note">{text_of(role)}</span><pre>{text_of(text)}</pre></div>'
        for role, text in messages
    )


def _messages(line: _Line) -> list[tuple[str, str]]:
    return list(spoken(dict(line))) or [("prompt", "")]


def _asked(line: _Line) -> str:
    """Return what makes a problem another one: what was said before the first answer."""
    before = []
    for role, text in _messages(line):
        if role in ("assistant", "answer"):
            break
        before.append(text)
    return "\n".join(before)


def _spread(numbers: Sequence[int], *, most: int) -> list[int]:
    """Return at most so many of the numbers, evenly spaced, with the first and the last."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[round(place * (len(numbers) - 1) / (most - 1))] for place in range(most)]


def _instruments(lines: Sequence[_Line]) -> str:
    """Return a table of every number of the metrics."""
    series: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for name, value in _numbers(line):
            if name != "iteration" and (name in series or len(series) < _MOST_METRICS):
                series[name].append(value)
    rows = [
        [name, values[0], values[-1], min(values), max(values), len(values)]
        for name, values in series.items()
    ]
    if not rows:
        return "<p>Nothing has been measured yet.</p>"
    note = '<p class="note">docs/metrics.md explains each of them.</p>'
    return note + table(["metric", "first", "last", "lowest", "highest", "lines"], rows)


def _numbers(tree: _Line, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line, those of groups as ``group/name``."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _settings(config: Config | None, header: dict[str, Any] | None) -> Iterator[str]:
    """Yield what the run was begun with, the keys that differ from their defaults, and all of them."""
    if header is not None:
        facts = [
            ("digest of the base model's weights", header["base_weights_digest"]),
            ("trained", f"{len(header['parameters'])} parameters of {num_trained(header):,} elements"),
            ("noise version", header["noise_version"]),
            ("begun with shardes", header["shardes_version"]),
        ]
        yield table(["the run", ""], facts, num_texts=2)
    if config is None:
        yield '<p class="note">There is no config.yaml that this version can read.</p>'
        if header is not None:
            yield folded(
                "The configuration in the journal", f"<pre>{text_of(dump_yaml(header['config']))}</pre>"
            )
        return
    rows = list(_given(config))
    yield folded(
        f"{len(rows)} keys that differ from their defaults",
        table(["key", "value", "default"], rows, num_texts=3),
        is_open=True,
    )
    yield folded("The whole configuration", _whole(dump_config(config)))


def _whole(text: str) -> str:
    return f"<pre>{text_of(text, most=_LONGEST_CONFIGURATION)}</pre>"


def _given(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield keys whose values are not the defaults, as text."""
    for section in type(config).model_fields:
        part = getattr(config, section)
        if isinstance(part, BaseModel):
            for key, field in type(part).model_fields.items():
                default = field.get_default(call_default_factory=True) if not field.is_required() else None
                if (value := getattr(part, key)) != default:
                    yield f"{section}.{key}", str(value), "" if field.is_required() else str(default)
