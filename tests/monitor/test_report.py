"""The report of a run: one file that loads nothing, with texts as texts and the run's numbers."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from shardes.monitor.plot import draw_runs, read_metrics
from shardes.monitor.thinning import thinned
from tests.helpers.inprocess import call
from tests.helpers.ranks import ROOT

pytest.importorskip("matplotlib", reason="pip install 'shardes[plot]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = (
    "</pre></table><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<style>*{display:none}</style><!-- &amp; ]]>"
)
VOID = {"meta", "link", "img", "br", "hr", "input", "base"}
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "header", "footer", "section", "nav", "article"),
    *("h1", "h2", "p", "a", "ul", "li", "b", "span", "div", "pre", "figure", "details", "summary"),
    *("table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "defs", "path", "use", "text", "clippath", "rect", "tspan"),
}


class Page(HTMLParser):
    """Elements, attributes and texts of a document whose elements must be closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return "".join(self.texts)


def line(iteration, reward, **more):
    numbers = {"reward_std": 0.25, "reward_min": reward - 1, "reward_max": reward + 1}
    seconds = {"rollout": 2.0, "update": 0.5}
    return {
        "iteration": iteration,
        "reward_mean": reward,
        **numbers,
        "num_tokens": 10,
        "seconds": seconds,
        **more,
    }


def sample(iteration, completion, reward, **more):
    return {
        "iteration": iteration,
        "prompt": f"1+1? {HOSTILE}",
        "completion": completion,
        "reward": reward,
        **more,
    }


def make_run(path, lines, samples=(), tail=""):
    path.mkdir(parents=True)
    for name, rows in (("metrics.jsonl", lines), ("samples.jsonl", samples)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def report(run_dir, *options):
    done = call("shardes", "report", run_dir, *options)
    assert done.returncode == 0, done.stderr
    text = (run_dir / "report.html").read_text()
    assert done.stdout.strip() == str(run_dir / "report.html")
    return text


def check_is_alone(page):
    """Nothing is loaded, nothing runs, and every element is one that the report makes."""
    assert {tag for tag, _ in page.elements} <= ALLOWED
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert "url(http" not in (attributes.get("style") or "")
    (style,) = [text for text in page.texts if "@" in text or "border-collapse" in text]
    assert "@import" not in style
    assert "url(" not in style


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    lines = [
        line(0, 0.5, heldout_reward=0.125, components={"length": 3, "</td><script>": 1.5}),
        line(1, 0.75, kl_to_base=0.5),
        line(2, 1.0, heldout_reward=0.375, note=HOSTILE, weights_digest="00ff<b>"),
    ]
    talk = [{"role": "user", "content": "hi"}, *({"role": "<i>", "content": HOSTILE} for _ in range(3))]
    samples = [
        sample(0, f"{HOSTILE}\ud800\x1b]0;x\x07", None),
        sample(0, "of a member", 0.5, member=0),
        sample(2, "much longer " * 1000, 1.5),
        sample(2, "", -1.0, messages=talk, set=HOSTILE),
    ]
    return make_run(
        tmp_path_factory.mktemp("runs") / "a<b>&'$x$", lines, samples, tail='{"iteration": 3, "rew'
    )


@pytest.fixture(scope="module")
def hostile_page(hostile_run):
    return report(hostile_run)


def test_texts_are_texts_and_nothing_is_loaded(hostile_page):
    page = Page(hostile_page)
    check_is_alone(page)
    assert page.text.count(HOSTILE) >= 6  # the prompt of each problem, an answer, a conversation, a set
    assert "a<b>&'$x$" in page.text
    assert f"{HOSTILE}\ufffd\ufffd]0;x\ufffd" in page.text
    assert "[... 8000 more characters]" in page.text
    policy = next(attributes for tag, attributes in page.elements if "http-equiv" in attributes)
    assert policy["content"].startswith("default-src 'none'")


def test_numbers_are_those_of_the_run(hostile_page):
    page = Page(hostile_page)
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["metric"] == ["first", "last", "lowest", "highest", "lines"]
    assert rows["reward_mean"] == ["0.5", "1", "0.5", "1", "3"]
    assert rows["heldout_reward"] == ["0.125", "0.375", "0.125", "0.375", "2"]
    assert rows["components/</td><script>"] == ["1.5", "1.5", "1.5", "1.5", "1"]
    assert rows["seconds/rollout"] == ["2", "2", "2", "2", "3"]
    assert rows["after 0"] == ["no reward", f"{HOSTILE}\ufffd\ufffd]0;x\ufffd"]
    assert ["after 2", "reward 1.5"] in [row[:2] for row in page.rows]
    assert ["", "reward 0.5", "of a member"] in page.rows
    facts = "".join(page.texts)
    for fact in ("3iterations, not finished", "0.375held-out reward after 2", "30tokens of members", "7.5 s"):
        assert fact in facts, fact


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_shows_it_and_runs_nothing(hostile_page, tmp_path):
    # The same page with what escaping keeps out: the page's own policy must keep a browser from running it.
    broken = hostile_page.replace("<nav>", "<nav><script>document.title='ran'</script><img src='file:///x'>")
    assert broken != hostile_page
    for name, text in (
        ("whole", hostile_page),
        ("broken", broken),
        ("open", broken.replace("default-src", "x-src")),
    ):
        (tmp_path / f"{name}.html").write_text(text)
        options = (
            *(
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-sync",
            ),
            *("--disable-background-networking", "--disable-component-update", "--dump-dom"),
            f"--user-data-dir={tmp_path / 'profile'}",
        )
        shown = subprocess.run(
            [CHROMIUM, *options, f"file://{tmp_path / name}.html"],
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        title = shown[shown.index("<title>") + 7 : shown.index("</title>")]
        # Without the policy a script does run, so that the other two say something.
        assert title == ("ran" if name == "open" else "a&lt;b&gt;&amp;'$x$"), name
        if name == "whole":
            given, found = Page(hostile_page), Page(shown)
            check_is_alone(found)
            assert [tag for tag, _ in found.elements] == [tag for tag, _ in given.elements]
            assert found.text.split() == given.text.split()


def test_runs_that_have_hardly_begun_are_reported(tmp_path):
    # A member's reward is not known, nothing was held out, and the last line is torn.
    unknown = dict.fromkeys(("reward_mean", "reward_std", "reward_min", "reward_max"))
    young = make_run(tmp_path / "young", [{"iteration": 0, **unknown, "num_members": 4}], tail="{")
    page = Page(report(young))
    assert "1iterations, not finished" in page.text
    assert "held-out reward" not in page.text.partition("Curves")[0].replace("Curves", "")
    assert "There are no samples yet." in page.text
    # A header of a journal, and no iteration yet.
    old = next((ROOT / "tests" / "fixtures" / "e070420").glob("plain/run"))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "journal.jsonl").write_bytes((old / "journal.jsonl").read_bytes().partition(b"\n")[0] + b"\n{")
    page = Page(report(begun))
    assert "No iteration has ended yet." in page.text
    assert "Nothing has been measured yet." in page.text
    assert "begun with shardes" in page.text
    # The one line of a run of no iterations, and a whole run of an older version.
    ended = make_run(tmp_path / "ended", [{"iteration": 0, "heldout_reward": 0.5}])
    assert "0iterations, finished" in Page(report(ended)).text
    whole = tmp_path / "whole"
    shutil.copytree(old, whole)
    page = Page(report(whole))
    assert "The configuration in the journal" in page.text  # its own has a place to be filled in
    config = (old / "config.yaml").read_text().replace("{REPOSITORY}", str(ROOT))
    (whole / "config.yaml").write_text(config)
    page = Page(report(whole))
    check_is_alone(page)
    rows = page.rows
    assert ["es.sigma", "0.02", "0.001"] in rows
    assert "  alpha_schedule: linear" in page.text
    assert "more characters" not in page.text
    assert [row for row in rows if row[0] == "es.noise"] == []


def test_a_long_run_is_thinned_and_keeps_its_extremes(tmp_path):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=5003)
    known = [i for i in range(5003) if not 2000 <= i < 2040]  # lines of a run that was stopped get lost
    points = {
        i: {"reward_mean": rewards[i], "reward_min": rewards[i] - 1, "reward_max": rewards[i] + 1}
        for i in known
    } | {5003: {"heldout_reward": 0.5}}
    few, step = thinned(points, most=600)
    assert (step, len(few)) == (9, 554)  # of 556 groups, 3 have nothing; and the last line
    for iteration in (0, 1995, 2034, 4995):
        inside = [i for i in known if i // 9 == iteration // 9]
        group = few[iteration // 9 * 9]
        assert group["reward_mean"] == pytest.approx(np.mean(rewards[inside]), abs=1e-12)
        assert group["reward_min"] == min(rewards[inside]) - 1
        assert group["reward_max"] == max(rewards[inside]) + 1
    assert few[5003] == {"heldout_reward": 0.5}
    assert min(p["reward_min"] for p in few.values() if p.keys() > {"reward_min"}) == rewards[known].min() - 1
    axes = draw_runs([few], labels=["a"], step=step).axes[0]
    mean = np.array(axes.get_lines()[0].get_xydata())
    assert np.isnan(mean[:, 1]).sum() == 1  # one gap, where lines got lost
    # A few points stay as they are.
    assert thinned({0: {"seconds": 1.0}, 7: {}}, most=8) == ({0: {"seconds": 1.0}, 7: {}}, 1)
    # In a page, whose size does not grow with the run.
    run = make_run(tmp_path / "long", [line(i, float(rewards[i])) for i in range(5003)])
    text = report(run)
    assert "Each point stands for 9 iterations." in Page(text).text
    assert len(text) < 600_000
    assert len(read_metrics(run)) == 5003


def test_what_is_no_run_is_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    run = make_run(tmp_path / "run", [line(0, 0.5)])
    damaged = make_run(tmp_path / "damaged", [line(0, 0.5)], [{"iteration": 0, "messages": 5}])
    for arguments, said in (
        ((tmp_path / "none",), "none: it does not exist; give the directory of a run"),
        ((empty,), "metrics.jsonl cannot be read"),
        ((run, "--out", tmp_path / "none" / "x.html"), "give a file in a directory that exists: --out FILE"),
        ((run, "--out", empty), "give a file in a directory that exists: --out FILE"),
        ((damaged,), "its files are damaged"),
    ):
        done = call("shardes", "report", *arguments)
        assert done.returncode == 2, arguments
        assert said in done.stderr, done.stderr
    assert not (damaged / "report.html").exists()
