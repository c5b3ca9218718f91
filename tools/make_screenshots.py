"""Make the pictures of docs/watching.md from runs, by the commands that the page has.

    python tools/make_screenshots.py runs/quickstart runs/guess_number [--out docs/watching] [--only NAME ...]

The first run has to have TensorBoard's files (log.report_to=[tensorboard]), the second one episodes. What a
terminal shows is drawn by matplotlib, pages are photographed in a headless Chromium; without it, the pictures
that need it are named and left out.
"""

import argparse
import base64
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from websockets.sync.client import connect

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
_COLUMNS = 100


def shardes(*words: object) -> str:
    """Run a command of shardes and return what it prints."""
    command = [sys.executable, "-m", "shardes", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def draw_terminal(command: str, text: str, out: Path, *, most_lines: int = 40) -> None:
    """Draw a terminal with a command and what it has printed."""
    lines = [
        piece
        for line in text.rstrip().splitlines()
        for piece in ([line[i : i + _COLUMNS] for i in range(0, len(line), _COLUMNS)] or [""])
    ]
    shown = [f"$ {command}", *lines[:most_lines], *(["..."] if len(lines) > most_lines else [])]
    width, height = 0.078 * _COLUMNS + 0.3, 0.175 * len(shown) + 0.3
    figure = Figure(figsize=(width, height), dpi=110, facecolor="#1e1e1e")
    FigureCanvasAgg(figure)
    for number, line in enumerate(shown):
        figure.text(
            *(0.15 / width, 1 - (0.15 + 0.175 * number) / height),
            line.replace("$", r"\$"),
            color="#8ad7a0" if number == 0 else "#e0e0e0",
            family="DejaVu Sans Mono",
            fontsize=9.3,
            va="top",
        )
    figure.savefig(out)


def photograph(browser: str, address: str, out: Path, *, size: tuple[int, int], seconds: float = 0) -> None:
    """Save a page as a browser shows it.

    Args:
        browser: Chromium's program.
        address: Of the page.
        out: A .png file.
        size: Width and height of the window, in pixels.
        seconds: How long the page's scripts have.
    """
    with tempfile.TemporaryDirectory() as profile:
        options = [*_OPTIONS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        command = [browser, *options, "--remote-debugging-port=0", address]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            try:
                found = next(filter(None, (re.search(r"127.0.0.1:\d+", line) for line in process.stderr)))
                threading.Thread(target=process.stderr.read, daemon=True).start()
                out.write_bytes(_shot_of(found[0], seconds=seconds))
            finally:
                process.terminate()


def _shot_of(debugger: str, *, seconds: float) -> bytes:
    """Return a picture of the page that a browser shows, through its protocol for developers."""
    with urllib.request.urlopen(f"http://{debugger}/json/list") as answer:
        (page,) = [each for each in json.load(answer) if each["type"] == "page"]
    with connect(page["webSocketDebuggerUrl"], max_size=None) as connection:
        time.sleep(1 + seconds)
        connection.send(json.dumps({"id": 1, "method": "Page.captureScreenshot"}))
        while "id" not in (answer := json.loads(connection.recv(timeout=60))):
            pass
    return base64.b64decode(answer["result"]["data"])


def photograph_tensorboard(browser: str, log_dir: Path, out: Path) -> None:
    """Serve a run's TensorBoard files on a free port, and save what is shown."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--port", "0"]
    with subprocess.Popen([*command, "--host", "127.0.0.1"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            found = next(filter(None, (re.search(r"http://\S+", line) for line in server.stderr)))
            # What else it says must not fill the pipe.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            shown = "darkMode=false&tagFilter=heldout_reward|reward_mean|kl|update_norm$#timeseries"
            photograph(browser, f"{found[0]}?{shown}", out, size=(1400, 940), seconds=45)
        finally:
            server.terminate()


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("episodes_dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "watching")
    parser.add_argument("--only", nargs="+", help="Names of pictures, such as watch.")
    options = parser.parse_args(arguments)
    run, episodes, out = options.run_dir, options.episodes_dir, options.out
    out.mkdir(parents=True, exist_ok=True)
    browser = next(filter(None, map(shutil.which, _CHROMIUM)), None)

    def watch() -> None:
        text = shardes("watch", run, "--once").replace(str(run), "runs/quickstart")
        draw_terminal("shardes watch runs/quickstart", text, out / "watch.png")

    def samples() -> None:
        text = shardes("samples", episodes, "--num-samples", 1)
        draw_terminal("shardes samples runs/guess_number --num-samples 1", text, out / "samples.png")

    def plot() -> None:
        shardes("plot", run, "--out", out / "plot.png")

    def compare() -> None:
        words = ("--num-samples", 16, "--plot", out / "compare.png")
        shardes("compare", "configs/quickstart/model", run, *words)

    def report() -> None:
        assert browser is not None
        with tempfile.TemporaryDirectory() as folder:
            shardes("report", run, "--out", Path(folder) / "report.html")
            photograph(
                browser, f"file://{folder}/report.html", out / "report.png", size=(1100, 2500), seconds=3
            )

    def tensorboard() -> None:
        assert browser is not None
        photograph_tensorboard(browser, run / "tensorboard", out / "tensorboard.png")

    makers = {make.__name__: make for make in (watch, samples, plot, compare, report, tensorboard)}
    for name in options.only or makers:
        if browser is None and name in ("report", "tensorboard"):
            print(f"{name}: not made, since there is no Chromium")
            continue
        makers[name]()
        print(f"{name}: made")


if __name__ == "__main__":
    main()
