"""Which device a rank takes, that no two take the same, and that no machine's name is asked for on GPUs."""

import json
import os
import socket
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from shardes.backends.zero3 import numbered_by_device
from shardes.distributed import interface
from shardes.distributed.devices import check_devices_differ, choose_device
from shardes.distributed.launch import process_group
from shardes.distributed.place import Place
from shardes.distributed.stop import Stop
from shardes.errors import UserError
from tests.helpers.hosts import why_not
from tests.helpers.ranks import run_command

WHY_NOT = why_not()


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are some; returns the devices that were made the current one."""
    current = []

    def pretend(count, uuid="GPU-1"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))
        return current

    return pretend


@pytest.mark.parametrize(("count", "local_rank", "index"), [(8, 0, 0), (8, 7, 7), (1, 0, 0), (1, 5, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one(gpus, count, local_rank, index):
    current = gpus(count)
    assert choose_device(Place(9, 10, local_rank)) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]


def test_more_ranks_than_gpus_are_refused(gpus, monkeypatch):
    gpus(2)
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with (
        pytest.raises(UserError, match=r"has 2 GPU\(s\), but rank 2 is number 3 on it"),
        process_group(timeout_seconds=1, always=False, stop=Stop(), stop_seconds=1),
    ):
        pass


def test_ranks_with_the_same_gpu_are_refused(gpus):
    store, device = dist.HashStore(), torch.device("cuda", 0)
    store.set("device/0", "GPU-1")
    gpus(1, uuid="GPU-2")
    check_devices_differ(store, device, rank=1, world_size=2)
    gpus(1, uuid="GPU-1")
    with pytest.raises(UserError, match=r"ranks 0 and 1 have the same GPU \(GPU-1\); start one rank per GPU"):
        check_devices_differ(store, device, rank=1, world_size=2)
    check_devices_differ(store, torch.device("cpu"), rank=1, world_size=2)


def test_deepspeed_is_told_the_number_of_the_device(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    with numbered_by_device(torch.device("cuda", 0)):
        assert os.environ["LOCAL_RANK"] == "0"
    assert os.environ["LOCAL_RANK"] == "5"
    with numbered_by_device(torch.device("cpu")):
        assert os.environ["LOCAL_RANK"] == "5"


@pytest.mark.parametrize(
    ("stands_for", "given", "wanted"),
    [
        ("127.0.1.1", None, "lo0"),
        ("10.0.0.7", None, None),
        ("127.0.1.1", "eth9", "eth9"),
        (None, None, "lo0"),
    ],
)
def test_gloo_is_told_an_interface_only_where_a_name_is_of_no_use(monkeypatch, stands_for, given, wanted):
    def lookup(name):
        if stands_for is None:
            raise socket.gaierror
        return stands_for

    monkeypatch.setattr(socket, "gethostbyname", lookup)
    monkeypatch.setattr(interface, "_interface_of", lambda address: "lo0")
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: None)
    for own, expected in (("10.0.0.7", wanted), ("127.0.0.1", given)):  # the second: all on one machine
        monkeypatch.setattr(socket.socket, "getsockname", lambda self, own=own: (own, 1))
        with mock.patch.dict(os.environ):
            os.environ.pop("GLOO_SOCKET_IFNAME", None)
            if given is not None:
                os.environ["GLOO_SOCKET_IFNAME"] = given
            interface.choose_interface("10.0.0.1")
            assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


def join(tmp_path, *arguments):
    """Has two hosts whose names stand for 127.0.1.1 join; returns what each rank says."""
    script = [sys.executable, "-m", "tests.helpers.named_hosts", tmp_path, *arguments]
    result = run_command(script, timeout_seconds=160)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[[")]


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_hosts_whose_names_are_loopback_addresses_meet(tmp_path):
    on_gpus, on_cpus = join(tmp_path, "usual", "gloo")
    assert on_gpus == [["127.0.1.1", "nccl", 0], ["127.0.1.1", "nccl", 0]]
    assert on_cpus == [["127.0.1.1", "gloo", 0], ["127.0.1.1", "gloo", 0]]


@pytest.mark.exhaustive
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_with_gloo_beside_nccl_they_would_not(tmp_path):
    (found,) = join(tmp_path, "cpu:gloo,cuda:nccl")
    assert any(status != 0 for *_, status in found), found
