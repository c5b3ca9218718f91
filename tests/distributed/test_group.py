"""The process group of one rank, and what is refused before there is one."""

import os

import pytest
import torch

from shardes.distributed.group import Group
from shardes.distributed.launch import process_group
from shardes.distributed.stop import Stop
from shardes.errors import UserError


def test_ranks_that_do_not_know_their_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=r"LOCAL_RANK: it is not set, so rank 1 of 2 cannot know"),
        process_group(timeout_seconds=1, always=False, stop=Stop(), stop_seconds=1),
    ):
        pass


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
