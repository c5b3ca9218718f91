"""The process group of one rank, and what is refused before there is one."""

import os

import torch

from shardes.distributed.group import Group
from shardes.distributed.launch import process_group
from shardes.distributed.stop import Stop


def test_collectives_of_one_rank_are_the_identity():
    group = Group(0, 1, torch.device("cpu"))
    assert group.is_main
    assert group.sum_float64([0.1, -2.0]) == [0.1, -2.0]
    assert group.sum_int64(-1) == 2**64 - 1
    assert group.gather_int64([3, -1]) == [[3, -1]]
    assert [group.any(flag) for flag in (True, False)] == [True, False]
    assert group.broadcast_json({"a": [1, None]}) == {"a": [1, None]}


def test_a_process_that_goes_on_is_not_taken_for_a_launched_one(monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")  # the user's own
    for _ in range(2):
        with process_group(timeout_seconds=10, always=True, stop=Stop(), stop_seconds=1) as world:
            assert world.world_size == 1
            assert [os.environ.get(name) for name in names] == ["0", "0", "1", "127.0.0.1", "0"]
        assert [name for name in names if name in os.environ] == ["LOCAL_RANK"]
