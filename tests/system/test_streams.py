"""What one stream writes and another reads is ordered, by a model of streams over the real backends."""

import functools
import json

import pytest
import torch

from shardes.backends.build import make_backend
from shardes.distributed.group import Group, Mesh
from shardes.es.update import Perturbation
from shardes.models.checkpoint import Checkpoint
from shardes.rollout.engines.transformers.cuda_graphs import CudaGraphs
from shardes.rollout.engines.transformers.decoder import Decoder
from shardes.weights.master import Weights
from tests.helpers.decoding import PAD, composed, generated, random_prompts
from tests.helpers.models import make_config, tiny_model, tree
from tests.helpers.ranks import ROOT, run_ranks
from tests.helpers.stream_checks import report
from tests.helpers.streams import Streams, Timeline

SCRIPT = ROOT / "tests" / "helpers" / "stream_checks.py"


def check(tmp_path, *cases):
    """Runs cases on two ranks, each a backend, a DeepSpeed configuration and what is left out."""
    model, raw = tiny_model(tmp_path / "model", tied=True), []
    for backend, zero, without in cases:
        changes = {"parallel__backend": backend, "rollout__gather": "layer"}
        if zero is not None:
            changes["parallel__deepspeed"] = path = tmp_path / f"deepspeed-{len(raw)}.json"
            path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
        config = tree(tmp_path, model=model, run_dir=tmp_path / f"run-{len(raw)}", **changes)
        raw.append({"config": config, "without": without})
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(raw))
    output = run_ranks([SCRIPT, path], world_size=2, log_dir=tmp_path / "logs")
    reports = [json.loads(line) for line in output.splitlines() if line.startswith('{"accesses"')]
    assert len(reports) == 2 * len(cases)
    return [reports[i :: len(cases)] for i in range(len(cases))]


def unordered(reports):
    """What is not ordered on any rank: (earlier, later) with the stream of each."""
    return [{(one, other) for one, other, _ in report["unordered"]} for report in reports]


@pytest.mark.slow
def test_gathers_are_ordered_with_perturbations(tmp_path):
    pytest.importorskip("deepspeed")
    ahead = {"stage3_prefetch_bucket_size": 5 * 10**7}
    *ordered, neither, unrecorded, no_wait = check(
        tmp_path,
        ("zero3", None, []),
        # With DeepSpeed one is enough: the wait of a commit, or gathers on the stream of writes.
        ("zero3", ahead | {"overlap_comm": True}, []),
        ("zero3", ahead, ["commit"]),
        ("fsdp", None, []),
        # So is what FSDP2 fetches ahead by itself.
        ("fsdp", None, ["hook"]),
        ("zero3", ahead | {"overlap_comm": True}, ["commit"]),
        ("zero3", ahead | {"overlap_comm": True}, ["record"]),
        ("fsdp", None, ["hook", "wait"]),
    )
    for reports in ordered:
        assert unordered(reports) == [set(), set()]
        assert min(report["collectives"] for report in reports) > 30, reports
        assert min(report["accesses"] for report in reports) > 10_000
    assert unordered(neither) == 2 * [{("perturb (default)", "all_gather_into_tensor (nccl)")}]
    assert all(report["unordered"][0][-1] > 100 for report in neither)
    for found in unordered(unrecorded):
        assert {later for _, later in found} == {"freed and allocated anew"}
    for found in unordered(no_wait):
        assert ("perturb (default)", "fsdp::all_gather_copy_in (side)") in found


@pytest.mark.parametrize(
    ("without", "is_pinned", "wanted"),
    [
        ([], True, set()),
        ([], False, set()),
        # The host looks for numbers that are not finite, or reads a file, while copies are queued.
        (["masters"], True, {"aminmax (host)", "read (host)"}),
        # An update changes what a snapshot is being written from.
        (["finish"], True, {"write_values (host)"}),
        (["finish"], False, {"write_values (side)"}),
    ],
)
def test_masters_are_ordered_with_copies_of_them(tmp_path, without, is_pinned, wanted):
    model = tiny_model(tmp_path / "model", tied=True)
    config = make_config(tmp_path, model=model, run_dir=tmp_path / "run", es__optimizer="adam")
    group = Group(0, 1, torch.device("cpu"))
    with Streams() as streams:
        found = report(
            streams, config, Mesh(group, group), without=without, num_members=1, is_pinned=is_pinned
        )
    assert found["accesses"] > 1000
    (pairs,) = unordered([found])
    assert bool(pairs) == bool(wanted)
    assert wanted <= {each for pair in pairs for each in pair}, pairs


class Computed:
    """A graph whose replay is booked by the model, and computes."""

    def __init__(self, function, streams):
        self._graph, self._function, self._streams = CudaGraphs()(function), function, streams

    def replay(self):
        self._graph.replay()
        with self._streams.unbooked():
            self._function()


@pytest.mark.parametrize("waits", [True, False])
def test_captured_steps_are_ordered_with_members(tmp_path, monkeypatch, waits):
    if not waits:
        monkeypatch.setattr(Timeline, "wait_stream", lambda self, other: None)
    model = tiny_model(tmp_path / "model", tied=True)
    config = make_config(tmp_path, model=model, run_dir=tmp_path / "run")
    group = Group(0, 1, torch.device("cpu"))
    backend = make_backend(config, group=group)
    batch = composed(random_prompts(0, num_prompts=19))
    with Streams() as streams:
        weights = Weights(backend, seed=7)
        weights.load(Checkpoint(config.model.path))
        decoder = Decoder(
            eos_ids=[3], pad_id=PAD, max_new_tokens=6, make_graph=functools.partial(Computed, streams=streams)
        )
        for direction in range(2):
            weights.perturb(Perturbation(0, direction, 0.1))
            decoder.begin(backend.sharded_model)
            answers = decoder.decode(backend.sharded_model, batch).tokens
            with streams.unbooked():
                assert answers == generated(backend.sharded_model, batch, max_new_tokens=6, eos_ids=[3])
        assert decoder._graphs.is_usable
        found = streams.report()
    (pairs,) = unordered([found])
    assert found["accesses"] > 1000
    assert bool(pairs) != waits, pairs
    assert waits or any("(default)" in one and "(side)" in other for one, other in pairs)
