"""The launcher's variables: half set, empty or impossible ones are refused by name, at once."""

import re

import pytest

from shardes.distributed.place import Place, read_place
from shardes.errors import UserError
from tests.helpers.inprocess import call

ALL = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.fixture
def launched(monkeypatch):
    def set_variables(variables):
        for name in ALL:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place()),
        ({"MASTER_ADDR": "host"}, Place()),
        ({"LOCAL_RANK": "0"}, Place(local_rank=0)),
        ({"WORLD_SIZE": "1"}, Place()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        (ALL, Place(1, 2, 1, ("host", 29500))),
        (
            {name: value for name, value in ALL.items() if name != "LOCAL_RANK"},
            Place(1, 2, None, ("host", 29500)),
        ),
    ],
)
def test_what_launchers_set(launched, variables, place):
    launched(variables)
    assert read_place() == place


def without(*names, **changes):
    return {name: value for name, value in (ALL | changes).items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (without("MASTER_ADDR", "MASTER_PORT"), "MASTER_ADDR (not set), MASTER_PORT (not set)"),
        (without("MASTER_PORT"), "MASTER_PORT (not set)"),
        (without(MASTER_ADDR=""), "MASTER_ADDR (empty)"),
        (without(WORLD_SIZE=""), "WORLD_SIZE (empty)"),
        (without("RANK", WORLD_SIZE=""), "RANK (not set), WORLD_SIZE (empty)"),
        ({"RANK": "0"}, "WORLD_SIZE (not set)"),
        ({"WORLD_SIZE": "2"}, "RANK (not set)"),
        (without(RANK="one"), "RANK: got 'one'"),
        (without(RANK="-1"), "RANK: got '-1'"),
        (without(WORLD_SIZE="0"), "WORLD_SIZE: got '0'"),
        (without(LOCAL_RANK=""), "LOCAL_RANK: got ''"),
        (without(RANK="2"), "RANK: got 2, but WORLD_SIZE is 2"),
        (without(MASTER_PORT="port"), "MASTER_PORT: got 'port'"),
        (without(MASTER_PORT="65536"), "MASTER_PORT: got 65536"),
        (without(MASTER_PORT="0"), "MASTER_PORT: got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(launched, variables, words):
    launched(variables)
    with pytest.raises(UserError, match=re.escape(words)):
        read_place()


@pytest.mark.parametrize(
    "command",
    [("train", "--config", "c"), ("evaluate", "--model", "m"), ("export", "r", "o"), ("verify", "r")],
)
def test_commands_say_it_before_they_read_anything(launched, command, monkeypatch):
    launched({"RANK": "1", "WORLD_SIZE": "2"})
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is said at once"))
    result = call("shardes", *command)
    assert result.returncode == 2
    assert "Error: MASTER_ADDR: the launcher's variables are half set" in result.stderr
