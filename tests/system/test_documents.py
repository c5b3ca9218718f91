"""The code blocks of the README and of docs/ do what they say.

Python blocks are executed, those of one page in one namespace. Shell blocks are taken command by command:
``shardes`` commands are executed on a small run, in place of the one that they name. What is not executed is
listed here with the reason, and that list is compared with the pages: what is new is executed or listed.
"""

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
import yaml

from shardes.cli import cli
from shardes.config.loading import parse_config
from shardes.config.schema import Config
from tests.helpers.inprocess import call
from tests.helpers.ranks import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", flags=re.MULTILINE | re.DOTALL)

# Python blocks that are not executed, by their first line, and why.
PYTHON_NOT_RUN = {
    "# my_reward.py": "a file that the reader makes; rewards like it are in test_rewards.py",
    "from accelerate import notebook_launcher": "starts ranks; test_examples.py does, as an example does it",
}
# Commands that are not executed, by how they begin, and why.
SHELL_NOT_RUN = {
    "bash tools/": "sets up an environment, trains or tests for minutes",
    "bash .ci/run": "runs this test",
    "mkdocs build": "CI does",
    "deepspeed --num_gpus": "starts ranks; test_cli.py does, with each launcher",
    "torchrun --nproc-per-node": "the same",
    "torchrun --standalone --nproc-per-node 2 examples/": "test_examples.py does",
    "python examples/": "the same",
    "accelerate launch": "the same",
    "lm_eval run": "fetches benchmarks; test_lm_eval.py runs it on local files",
    "python3 -m venv": "sets up an environment, as CI does with tools/setup.sh",
    "pip install": "the same",
    "git clone": "the same",
    "python tools/get_smollm2.py": "fetches 98 MB; test_real_model.py uses what it makes, if that is there",
}
# What stands for something of the reader's in a command, and what the small run has.
MEANT = {
    "RUN_DIR": "runs/quickstart",
    "RUN_DIR@20": "runs/quickstart@1",
    "RUN_DIR@best": "runs/quickstart@best",
    "OUT_DIR": "exported",
    "DIR": "configs/quickstart/model",
    "FILE": "small.yaml",
    "other.yaml": "small.yaml",
    "runs/guess_number": "runs/quickstart",
    "runs/smollm2-receipts": "runs/quickstart",
    "models/smollm2-135m-instruct": "configs/quickstart/model",
    "my-run/train.yaml": "small.yaml",
    "my-run/run": "runs/quickstart",
    "my-run/run@best": "runs/quickstart@best",
    "my-run/model": "exported",
}


def blocks(page, *languages):
    return [text for language, text in _BLOCK.findall(page.read_text()) if language in languages]


def commands(page):
    """The commands of a page's shell blocks, without comments."""
    lines = [line for text in blocks(page, "bash", "sh") for line in text.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def is_listed(words):
    return any(shlex.join(words).startswith(start) for start in SHELL_NOT_RUN)


def test_every_block_has_a_language_that_is_known():
    for page in PAGES:
        assert {language for language, _ in _BLOCK.findall(page.read_text())} <= {
            *("", "bash", "bibtex", "python", "yaml", "json"),
        }, page


def test_every_command_is_executed_or_listed_and_what_is_listed_exists():
    every = [words for page in PAGES for words in commands(page)]
    assert [words for words in every if words[0] != "shardes" and not is_listed(words)] == []
    for start in SHELL_NOT_RUN:
        assert any(shlex.join(words).startswith(start) for words in every), start
    first_lines = {text.splitlines()[0] for page in PAGES for text in blocks(page, "python")}
    assert set(PYTHON_NOT_RUN) <= first_lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_and_options_that_a_page_names_in_commands_exist(page):
    known = {f"{s}.{k}" for s, field in Config.model_fields.items() for k in field.annotation.model_fields}
    for words in commands(page):
        keys = {word.partition("=")[0] for word in words if re.match(r"[a-z]+\.\w+=", word)}
        assert keys <= known, words
    # In the text, too.
    timer = re.findall(r"`(shardes [^`]+)`", page.read_text())
    for words in [*commands(page), *(span.replace("[", "").replace("]", "").split() for span in timer)]:
        if words[0] == "shardes" and len(words) > 1 and not words[1].startswith("-"):
            command = cli.get_command(click.Context(cli), words[1])
            assert command is not None, words
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words[2:] if word.startswith("--")} <= options, words


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda page: page.name)
def test_pieces_of_configurations_are_accepted(page):
    for text in blocks(page, "yaml"):
        given = yaml.safe_load(text)
        task = {"data": "rows.jsonl"} | given.pop("task", {})
        if not task.keys() & {"name", "reward", "rewards", "environment", "tools", "harness"}:
            task["name"] = "countdown"
        whole = {"model": {"path": "m"}, "run": {"dir": "r"}, "es": {"iterations": 9}, "task": task} | given
        whole["rollout"] = {"max_new_tokens": 9} | given.get("rollout", {})
        parse_config(whole, source=page.name)


def executed_python(page):
    return [text for text in blocks(page, "python") if text.splitlines()[0] not in PYTHON_NOT_RUN]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A directory with what the pages count on, where they may write."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "configs").symlink_to(ROOT / "configs")
    (root / "runs").mkdir()
    return root


# Pages whose Python takes more than a few seconds.
EXHAUSTIVE = {"noise.md"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.name, marks=[pytest.mark.exhaustive] if p.name in EXHAUSTIVE else [])
        for p in PAGES
        if executed_python(p)
    ],
)
def test_the_python_of_a_page_does_what_it_says(page, checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    namespace = {"__name__": "__main__"}
    for text in executed_python(page):
        exec(compile(text, page.name, "exec"), namespace)
    if page.name == "api.md":
        assert capsys.readouterr().out.splitlines()[-1] == "False"  # its callback has stopped the run
        assert (checkout / "my-short-model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_shardes_commands_of_the_pages_do_what_they_say(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    small = (
        "es.iterations=2",
        "es.population=4",
        "task.batch_size=8",
        "eval.every=1",
        "parallel.backend=single",
    )
    done = call("train", "--config", "configs/quickstart.yaml", "run.dir=runs/quickstart", *small)
    assert done.returncode == 0, done.stderr
    lines = Path("configs/quickstart/heldout.jsonl").read_text().splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(lines[:8]))
    text = Path("runs/quickstart/config.yaml").read_text()
    text = re.sub("heldout_data: .*", f"heldout_data: {checkout}/few.jsonl", text)
    for path in ("runs/quickstart/config.yaml", "small.yaml"):
        Path(path).write_text(text)
    num_done = 0
    for page in PAGES:
        for words in commands(page):
            if words[0] == "shardes":
                arguments = [MEANT.get(word, word) for word in words[1:]]
                done = call("shardes", *arguments)
                assert done.returncode == 0, (page.name, words, done.stderr)
                num_done += 1
        shutil.rmtree("my-model", ignore_errors=True)
    assert num_done >= 6
