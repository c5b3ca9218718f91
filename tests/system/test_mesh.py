"""Replicas of shards, members by themselves and chosen parameters: the bytes of one process, every time."""

import json
import random
import signal
import time
from dataclasses import dataclass, replace

import pytest
import torch
import yaml

from shardes.distributed.group import Group, Mesh, make_mesh
from shardes.errors import UserError
from shardes.session import open_session
from tests.helpers.exports import fingerprint
from tests.helpers.inprocess import call
from tests.helpers.models import make_config, tiny_model, tree
from tests.helpers.ranks import Ranks
from tests.helpers.runs import gathers_of, run_cases, steady_metrics

CPU = torch.device("cpu")
TRAINABLE = [".*", "!.*(norm|embed).*", r"model\.norm\.weight"]
# What an oracle is asked for: a model, a dtype, and which parameters are trained.
KINDS = {
    # Five members, so that teams of ranks do not have equally many.
    "plain": {"model": "tied", "model__dtype": "float32", "es__population": 5},
    "narrow": {"model": "untied", "model__dtype": "bfloat16"},
    "partly": {"model": "untied", "model__dtype": "bfloat16", "es__trainable": TRAINABLE},
    "even": {"model": "even", "model__dtype": "float32"},
}


@pytest.mark.parametrize(("world_size", "size"), [(4, 3), (2, 4), (6, 4)])
def test_a_shard_size_that_does_not_divide_the_ranks_is_refused(world_size, size):
    world = Group(0, world_size, CPU)
    with pytest.raises(UserError, match=rf"parallel\.shard_size: got {size}, .* {world_size} rank\(s\)"):
        make_mesh(world, shard_size=size, timeout_seconds=1)


def test_without_a_shard_size_all_ranks_hold_one_replica():
    world = Group(1, 3, CPU)
    mesh = make_mesh(world, shard_size=None, timeout_seconds=1)
    assert mesh == Mesh(world, world) == make_mesh(world, shard_size=3, timeout_seconds=1)
    assert (mesh.num_replicas, mesh.replica, mesh.alone.world_size) == (1, 0, 1)


def test_replicas_are_runs_of_consecutive_ranks():
    places = [Mesh(Group(rank, 6, CPU), Group(rank % 2, 2, CPU)) for rank in range(6)]
    assert [mesh.replica for mesh in places] == [0, 0, 1, 1, 2, 2]
    assert {mesh.num_replicas for mesh in places} == {3}


@pytest.fixture(scope="module")
def oracle(model_dirs, tmp_path_factory):
    """One process: fingerprints and metrics by kind."""
    root = tmp_path_factory.mktemp("oracle")
    trees = [
        tree(root, run_dir=root / kind, **(keys | {"model": model_dirs[keys["model"]]}))
        for kind, keys in KINDS.items()
    ]
    prints = run_cases(root, "oracle", trees, 1)
    return {kind: (prints[i], steady_metrics(root / kind)) for i, kind in enumerate(KINDS)}


def case(kind, backend, mode="auto", shard_size=None, *, shortages=(), **changes):
    keys = {"parallel__backend": backend, "rollout__gather": mode, "parallel__shard_size": shard_size}
    return kind, keys | changes, list(shortages)


CASES = {
    2: [
        case("plain", "single"),
        case("narrow", "single", "member", 2),
        case("narrow", "zero3", "iteration"),
        case("partly", "zero3", "layer"),
        case("plain", "fsdp", "iteration"),
        case("narrow", "fsdp", "layer", 1),
        case("partly", "fsdp", "auto", 1, weights__master_device="cpu"),
        # Calls of decode: 3 micro-batches a member, and 3 shared by the ranks for the centre before them. The
        # last of rank 1's first member; and rank 0's 15th, which it reaches only after that.
        case("plain", "fsdp", shortages=[("decode", 1, 3), ("decode", 0, 14)]),
        case("plain", "zero3", shortages=[("reserve", 1, 0), ("decode", 1, 0)]),
    ],
    3: [
        case("partly", "zero3", "iteration"),
        case("narrow", "fsdp", "auto"),
        case("plain", "fsdp", "member", 1),
    ],
    4: [
        case("plain", "single", "auto", 2),
        case("plain", "fsdp", "layer", 2),
        case("narrow", "fsdp", "member", 2),
        case("partly", "fsdp", "iteration", 2),
        case("plain", "zero3", "layer", 2),
        # Three micro-batches of held-out problems: one replica answers none of them.
        case("plain", "zero3", "layer", 1),
        # Its logits agree to rounding only, which is not enough to change an answer here.
        case("even", "tensor_parallel", "layer", 2),
    ],
}


def check_cases(cases, *, world_size, model_dirs, oracle, tmp_path):
    trees = []
    for i, (kind, changes, _) in enumerate(cases):
        keys = KINDS[kind] | {"model": model_dirs[KINDS[kind]["model"]]} | changes
        trees.append(tree(tmp_path, run_dir=tmp_path / f"run{i}", **keys))
    shortages = {i: missing for i, (*_, missing) in enumerate(cases)}
    found = run_cases(tmp_path, "cases", trees, world_size, shortages)
    for i, (kind, changes, missing) in enumerate(cases):
        prints, metrics = oracle[kind]
        assert found[i] == prints, (kind, changes)
        assert steady_metrics(tmp_path / f"run{i}") == metrics, (kind, changes)
        modes = gathers_of(tmp_path / f"run{i}")
        if missing:
            assert modes[-1] == "layer", modes
        elif changes["rollout__gather"] == "auto":
            shares = changes["parallel__backend"] == "single" or changes["parallel__shard_size"] == 1
            assert set(modes) == {"member" if shares else "iteration"}
        else:
            assert set(modes) == {changes["rollout__gather"]}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", CASES)
def test_meshes_give_the_bytes_and_the_rewards_of_one_process(world_size, model_dirs, oracle, tmp_path):
    arguments = {"world_size": world_size, "model_dirs": model_dirs, "oracle": oracle, "tmp_path": tmp_path}
    check_cases(CASES[world_size], **arguments)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_so_does_every_mode_in_every_mesh(world_size, model_dirs, oracle, tmp_path):
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    cases = [
        case("plain", backend, mode, size)
        for backend in ("zero3", "fsdp")
        for mode in ("layer", "member", "iteration")
        for size in sizes
    ]
    cases += [case("plain", "single", "member", size) for size in sizes]
    cases += [case("even", "tensor_parallel", "layer", size) for size in sizes if size <= 2]
    arguments = {"world_size": world_size, "model_dirs": model_dirs, "oracle": oracle, "tmp_path": tmp_path}
    check_cases(cases, **arguments)


def wait_for_lines(path, count, ranks):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(process.poll() is None for process in ranks.processes):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(400)
def test_kills_in_a_mesh_change_no_byte_and_lose_only_what_was_in_flight(tmp_path):
    path = tmp_path / "config.yaml"
    model = tiny_model(tmp_path / "model", tied=True)
    path.write_text(yaml.safe_dump(tree(tmp_path, model=model, run_dir=tmp_path / "run", es__iterations=8)))
    undisturbed = call("train", "--config", path, f"run.dir={tmp_path / 'undisturbed'}")
    assert undisturbed.returncode == 0, undisturbed.stderr

    journal = tmp_path / "run" / "journal.jsonl"
    chance = random.Random(3)
    command = ["launch/train.py", "--config", path, "parallel.backend=fsdp", "parallel.timeout_seconds=20"]
    # A mesh of two times two, then every rank by itself; every rank a replica at the end.
    for world_size, *keys in [
        (4, "parallel.shard_size=2", "rollout.gather=layer"),
        (2, "rollout.gather=iteration"),
    ]:
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        logs = tmp_path / f"logs{lines}"
        with Ranks([*command, *keys], world_size=world_size, log_dir=logs) as ranks:
            wait_for_lines(journal, lines + chance.randint(4, 9), ranks)
            victim = chance.choice(ranks.processes)
            assert victim.poll() is None, ranks.output()
            victim.kill()
            statuses = ranks.wait(60)
            assert 0 not in statuses
            assert -signal.SIGKILL in statuses
        assert journal.read_bytes().count(b"\n") > lines
    with Ranks([*command, "parallel.shard_size=1"], world_size=2, log_dir=tmp_path / "logs") as ranks:
        assert ranks.wait(120) == [0, 0], ranks.output()

    exports = [tmp_path / f"export-{name}" for name in ("run", "undisturbed")]
    for out in exports:
        run_dir = tmp_path / out.name.removeprefix("export-")
        result = call("shardes", "export", run_dir, out)
        assert result.returncode == 0, result.stderr
    assert fingerprint(exports[0]) == fingerprint(exports[1])
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    members = [(r["iteration"], r["member"]) for r in records if r["type"] == "member"]
    assert len(members) == len(set(members)) == 8 * 4, "a known member was evaluated again"


@dataclass(frozen=True)
class TwoRanks(Group):
    """This rank, and rank 0 with a value of its own."""

    value_of_rank_0: int = 0

    def broadcast_json(self, value):
        return self.value_of_rank_0

    def any(self, flag):
        return flag

    def gather_int64(self, values):
        return [[self.value_of_rank_0 - (self.value_of_rank_0 >> 63 << 64)], values]


def test_replicas_that_drift_apart_end_the_job(model_dirs, tmp_path):
    with open_session(make_config(tmp_path, model=model_dirs["tied"], run_dir=tmp_path / "run")) as session:
        digest = int(session.digest(), 16)
        alone = Group(0, 1, CPU)
        same = replace(session, mesh=Mesh(TwoRanks(1, 2, CPU, value_of_rank_0=digest), alone))
        assert same.digest() == session.digest()
        other = replace(session, mesh=Mesh(TwoRanks(1, 2, CPU, value_of_rank_0=digest ^ 1), alone))
        with pytest.raises(RuntimeError, match="replicas hold different weights") as caught:
            other.digest()
        assert f"{digest ^ 1:016x} in replica 0, {digest:016x} in replica 1" in str(caught.value)
