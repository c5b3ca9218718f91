"""The table of configurations has every file, says of each what is true, and its commands start them."""

import re
import shlex

import pytest

from shardes.cli import train
from shardes.config.loading import load_config
from tests.helpers.ranks import ROOT

TABLE = ROOT / "configs" / "README.md"
FILES = {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml")}
COLUMNS = ("model", "task", "hardware", "measured", "command")
# What stands before the script in a command, by launcher: options, and how many words each has.
LAUNCHERS = {
    "deepspeed": {"--num_gpus": 2},
    "torchrun": {
        "--nnodes": 2,
        "--nproc-per-node": 2,
        "--rdzv-backend": 2,
        "--rdzv-endpoint": 2,
        "--rdzv-id": 2,
    },
    "python": {},
}


def rows():
    """The rows of the table by the file that each links to."""
    found = {}
    for line in TABLE.read_text().splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        link = re.fullmatch(r"\[(.*\.yaml)\]\((.*)\)", name)
        if link and len(cells) == len(COLUMNS):
            assert link[1] == link[2]
            assert link[1] not in found, f"{link[1]} is there twice"
            found[link[1]] = dict(zip(COLUMNS, cells, strict=True))
    return found


def started(command):
    """Return the number of ranks that a command starts, its configuration and its overrides."""
    launcher, *words = shlex.split(command.strip("`"))
    options = {}
    while words[0].startswith("-"):
        name = words[0]
        options[name], words = words[1], words[LAUNCHERS[launcher][name] :]
    assert words[0] == "launch/train.py"
    context = train.make_context("train", words[1:], resilient_parsing=False)
    ranks = options.get("--num_gpus") or options.get("--nproc-per-node", "1")
    num_ranks = int(ranks) * int(options.get("--nnodes", "1"))
    return num_ranks, context.params["config_path"], list(context.params["overrides"])


def test_every_file_has_a_row_and_every_row_a_file():
    assert rows().keys() == FILES


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_row_says_what_its_file_is(name):
    row = rows()[name]
    path = ROOT / "configs" / name
    num_ranks, config_path, overrides = started(row["command"])
    assert ROOT / config_path == path
    config = load_config(path, overrides)
    model = str(config.model.path).rstrip("/").rpartition("/")[2]
    assert row["model"].startswith("toy, " if model == "model" else model)
    if config.task.name is not None:
        assert row["task"] == config.task.name
    # Nodes, if there are several, and devices of each.
    devices = re.match(r"(?:(\d+) x )?(\d+) (?:GPU|CPU core)s?\b", row["hardware"])
    assert devices is not None, row["hardware"]
    assert int(devices[1] or 1) * int(devices[2]) == num_ranks
    # What was measured names where the result is; what was not claims nothing.
    assert re.fullmatch(r"no|planned|yes: .*\[\w+\]\(\S+\)", row["measured"]), row["measured"]
    # The head has the same command.
    head = re.sub(r"\\\n#\s+", "", path.read_text().partition("\n\n")[0])
    assert f"#     {row['command'].strip('`')}" in head


def test_no_file_says_itself_whether_it_has_been_run():
    assert [name for name in FILES if "real weights" in (ROOT / "configs" / name).read_text()] == []
