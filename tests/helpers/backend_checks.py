"""Run on every rank: a backend's shards against plain tensors, after every way of writing them.

python backend_checks.py CASES.json, a list of {"config": tree, "checks": names of further checks}
"""

import json
import math
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from shardes.backends.build import make_backend
from shardes.backends.registry import BACKENDS
from shardes.config.loading import parse_config
from shardes.distributed.group import Group, make_mesh
from shardes.distributed.launch import process_group
from shardes.distributed.stop import Stop
from shardes.es.update import Perturbation, Update
from shardes.models.checkpoint import Checkpoint
from shardes.noise.kinds.gaussian import Gaussian
from shardes.rollout.batching import IDLE_COHORT, compose
from shardes.rollout.engines.transformers.decoder import Decoder
from shardes.weights.export_view import gather_centre
from shardes.weights.master import Weights
from shardes.weights.master_digest import master_digest
from tests.helpers.decoding import Remembered, random_prompts
from tests.helpers.episodes import next_prompts, said, turn_batch
from tests.helpers.tracing import Trace

NUM_MEMBERS = 4  # DeepSpeed starts to keep gathered copies once it has seen two whole forwards
NUM_UPDATES = 3
NUM_TRACES = 5
SENTINEL = 49152.0  # exact in every dtype, and no weight
ACTIVATION_BYTES = 20_000  # of a forward of one token, generously


def fill_padding(backend):
    """Puts a sentinel behind the owned elements of every shard; returns where."""
    tails = []
    for shard in backend.shards:
        tail = shard.local[shard.num_owned :]
        tail.fill_(SENTINEL)
        tails.append(tail)
    return tails


def assert_same(one, other, what):
    assert torch.equal(one, other), (what, (one.float() - other.float()).abs().max())


def assert_close(one, other, what):
    """For sums in another order: a bfloat16 step is 2**-8, and layers add up."""
    error = (one.float() - other.float()).abs().max() / other.float().abs().max()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 1e-1}[one.dtype], (what, error)


class Case:
    """A backend and the oracle, both loaded with the same model."""

    def __init__(self, config, group, *, oracle=None):
        self.config, self.group = config, group
        self.oracle, self.wanted = oracle or make_oracle(config, Group(0, 1, group.device))
        self.backend = make_backend(config, group=group)
        self.tails = fill_padding(self.backend)
        self.weights = Weights(self.backend, seed=7)
        checkpoint = Checkpoint(config.model.path)
        self.weights.load(checkpoint)
        self.bytes_read = checkpoint.bytes_read
        spec = BACKENDS[config.parallel.backend]
        facts = (self.backend.is_sharded, self.backend.needs_same_batch)
        are_several = group.world_size > 1
        assert facts == (spec.is_sharded and are_several, spec.needs_same_batch and are_several)
        vocab_size = self.oracle.sharded_model.config.vocab_size
        # Ranks have prompts of their own, unless the backend wants the same on all.
        shift = 0 if self.backend.needs_same_batch else group.rank
        self.ids = (torch.arange(24).view(4, 6) + shift) % vocab_size
        self.assert_logits = assert_close if self.backend.needs_same_batch else assert_same

    def check_load(self):
        """A rank reads its own elements, and together they read everything."""
        owned = sum(shard.num_owned for shard in self.backend.shards)
        num_bytes = owned * torch.float32.itemsize  # the files are float32
        if self.backend.needs_same_batch and self.group.world_size > 1:
            # Short rows are read with what is between them.
            whole = sum(shard.num_elements for shard in self.backend.shards) * torch.float32.itemsize
            assert num_bytes <= self.bytes_read <= whole
        else:
            assert self.bytes_read == num_bytes
        counted = sum(shard.num_owned for shard in self.backend.shards if not shard.is_copy)
        total = sum(shard.num_elements for shard in self.oracle.shards)
        assert self.group.sum_int64(counted) == total
        if self.backend.needs_same_batch:
            linears = [m for m in self.backend.sharded_model.modules() if type(m) is torch.nn.Linear]
            assert not any(isinstance(p, DTensor) for m in linears for p in m.parameters())
        for mine, its in zip(self.backend.shards, self.oracle.shards, strict=True):
            assert (mine.name, mine.param_id, mine.shape) == (its.name, its.param_id, its.shape)
            if mine.num_owned < mine.num_elements:
                rows = mine.shape[0] if self.config.parallel.backend == "fsdp" else 1
                most = -(-max(rows, self.group.world_size) // self.group.world_size)
                assert mine.num_owned <= most * -(-mine.num_elements // rows), mine.name

    def forwards(self):
        """What every way of running the model gives."""
        yield "stream", self.backend.sharded_model(self.ids).logits
        if not self.backend.needs_same_batch:
            yield "prompts", self.backend.gathered()(self.ids).logits

    def check_forwards(self, what):
        logits = self.oracle.sharded_model(self.ids).logits
        for name, found in self.forwards():
            self.assert_logits(found, logits, (name, what))

    def check_members(self):
        for direction in range(NUM_MEMBERS):
            for weights in (self.weights, self.wanted):
                weights.perturb(Perturbation(0, direction, 0.1))
            self.check_forwards(f"member {direction}")
            self.check_shards(f"member {direction}")

    def check_parts(self):
        """Members that perturb a part of the weights, each made of the one before, and updates of parts."""
        before = self.weights, self.wanted
        self.weights, self.wanted = (
            Weights(each.backend, seed=7, kind=Gaussian(num_parts=3)) for each in before
        )
        for each in (self.weights, self.wanted):
            each.base = before[0].base  # a backend that has loaded weights itself compares the first ones
            each.load(Checkpoint(self.config.model.path))
        for iteration, direction in ((0, 0), (0, 1), (0, 4), (2, 4)):
            for weights in (self.weights, self.wanted):
                weights.perturb(Perturbation(iteration, direction, 0.1))
            self.check_shards(f"part of member {direction}")
        for weights in (self.weights, self.wanted):
            weights.update(Update(0, [0.1, -0.2, 0.05, 0.3]))
            weights.perturb(Perturbation(1, 0, 0.1))
        self.check_forwards("a part after an update of parts")
        self.check_shards("a part after an update of parts")
        self.weights, self.wanted = before
        self.wanted.centre()

    def check_shards(self, what):
        """Working and master elements are those of the oracle, bit for bit."""
        for mine, its in zip(self.backend.shards, self.oracle.shards, strict=True):
            pairs = [
                (mine.local, its.local),
                (self.weights.masters.tensors[mine.name], self.wanted.masters.tensors[its.name]),
            ]
            for span in mine.spans:
                for found, wanted in pairs:
                    rows = span.of(found).view(span.rows, span.length)
                    assert_same(rows, span.inside(wanted), (what, mine.name, span))

    def check_updates(self):
        for iteration in range(NUM_UPDATES):
            for weights in (self.weights, self.wanted):
                weights.update(Update(iteration, [0.1, -0.2, 0.05]))
                weights.centre()
            self.check_forwards(f"centre after update {iteration}")
        self.check_shards("after the updates")
        assert self.group.sum_int64(master_digest(self.weights)) == master_digest(self.wanted)
        for mine, its in zip(self.backend.shards, self.oracle.shards, strict=True):
            whole = gather_centre(self.weights, mine)
            assert (whole is not None) == self.group.is_main
            if self.group.is_main:
                assert_same(whole, gather_centre(self.wanted, its), mine.name)

    def check_padding(self):
        for tail in self.tails:
            assert (tail == torch.tensor(SENTINEL).to(tail.dtype)).all(), "padding was written"
        return sum(tail.numel() for tail in self.tails)

    def check_decoding(self):
        """Ranks that share forwards replay captured steps, unless one of them cannot, and answer the same."""
        if self.group.world_size == 1 or not self.backend.needs_same_batch:
            return
        model, steps = self.backend.sharded_model, 6
        rows = [[2 + i, 5, 7][: 1 + i % 3] for i in range(5)]
        (batch,) = compose(rows, micro_batch_size=5, pad_id=0, max_new_tokens=steps)

        def fails(function):
            function()
            raise RuntimeError("cannot be captured on this rank")

        is_last = self.group.rank == self.group.world_size - 1
        found = []
        for make_graph, is_used in (
            (None, False),
            (Remembered, True),
            (fails if is_last else Remembered, False),
        ):
            decoder = Decoder(eos_ids=[], pad_id=0, max_new_tokens=steps, make_graph=make_graph)
            decoder.begin(model)
            found.append(decoder.decode(model, batch, any_rank=self.group.any, is_split=True).tokens)
            assert is_used == (decoder._graphs is not None and decoder._graphs.is_usable)
        assert found[0] == found[1] == found[2]

    def check_episodes(self):
        """Ranks that play episodes of their own in step, one for longer, say what each would say alone."""
        if self.group.world_size == 1:
            return
        is_split = self.backend.needs_same_batch
        # The last rank has episodes of fewer turns, and then goes along.
        num_own = 1 if not is_split and self.group.rank == self.group.world_size - 1 else 3
        starts = random_prompts(0 if is_split else self.group.rank, num_prompts=7)

        def play(model, *, make_graph=None, **in_step):
            decoder = Decoder(eos_ids=[3, 9, 20], pad_id=0, max_new_tokens=6, make_graph=make_graph)
            decoder.begin(model)
            prompts, answered, num_new = dict(enumerate(starts)), [], sum(map(len, starts))
            for turn in range(3 if in_step else num_own):
                cohort = 0 if turn < num_own else IDLE_COHORT
                batch = turn_batch(prompts, cohort=cohort)
                answers = decoder.decode(model, batch, **in_step).tokens
                if cohort != IDLE_COHORT:
                    answered.append(answers)
                    prompts = next_prompts(prompts, answers, turn=turn)
                    if turn + 1 < num_own:  # the last token of an answer is computed with what follows it
                        num_new += sum(1 + len(said(episode, turn)) for episode in prompts)
            assert decoder.num_prefilled_tokens == num_new
            return answered

        found = play(self.backend.sharded_model, any_rank=self.group.any, is_split=is_split, num_prefills=3)
        if not is_split:  # others round the same sums otherwise
            assert found == play(self.oracle.sharded_model)
            return
        captured = {"any_rank": self.group.any, "is_split": True, "make_graph": Remembered}
        assert found == play(self.backend.sharded_model, **captured)

    def trace(self):
        """Forwards of one token, each under new weights."""
        held = [shard.local for shard in self.backend.shards] + list(self.weights.masters.tensors.values())
        for _ in range(NUM_TRACES):
            self.backend.commit()
            with Trace(held) as trace:
                self.backend.sharded_model(torch.zeros(1, 1, dtype=torch.int64))
            yield trace

    def check_traffic(self):
        """A forward gathers every parameter once, but for the padding of uneven shards."""
        shards, world_size = self.backend.shards, self.group.world_size
        least = sum(shard.num_elements for shard in shards) if world_size > 1 else 0
        most = sum(shard.num_elements + world_size * math.prod(shard.shape[1:]) for shard in shards)
        # Not the first: DeepSpeed learns from it what is needed again, and gathers a tied weight twice there.
        counts = [trace.gathered for trace in self.trace()][1:]
        assert least <= min(counts) <= max(counts) <= most, (least, counts, most)

    def check_memory(self):
        """No more is ever held than this rank's share, and twice the largest layer."""
        itemsize = self.backend.dtype.itemsize
        # Not the first, from which DeepSpeed learns what to fetch ahead. The least of the others: gloo's
        # threads may hold a buffer a moment longer than the forward.
        trace = min(list(self.trace())[1:], key=lambda trace: trace.peak_bytes)
        bound = trace.base_bytes + 2 * itemsize * largest_layer(self.oracle) + ACTIVATION_BYTES
        report = f"peak {trace.peak_bytes} base {trace.base_bytes} bound {bound}"
        sys.stdout.write(report + "\n")
        assert trace.peak_bytes <= bound, report
        elements = sum(shard.num_elements for shard in self.backend.shards)
        share = elements * (itemsize + 4) / self.group.world_size
        assert share * 0.9 <= trace.base_bytes <= share * 1.1, (trace.base_bytes, share)


def make_oracle(config, alone):
    """A backend of plain tensors, and its weights, for this rank by itself."""
    changes = {"backend": "single", "deepspeed": None, "shard_size": None}
    single = config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})
    oracle = make_backend(single, group=alone)
    weights = Weights(oracle, seed=7)
    weights.load(Checkpoint(config.model.path))
    return oracle, weights


def largest_layer(oracle):
    """Elements of the largest block, embedding or head."""
    model = oracle.sharded_model
    layers = [*model.model.layers, model.get_input_embeddings(), model.get_output_embeddings()]
    return max(sum(p.numel() for p in layer.parameters()) for layer in layers)


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    with process_group(timeout_seconds=60, always=True, stop=Stop(), stop_seconds=60) as world:
        for number, raw in enumerate(json.loads(Path(sys.argv[1]).read_text())):
            config = parse_config(raw["config"], source="case")
            sys.stdout.write(f"case {number}: {config.parallel.backend} {config.model.path.name}\n")
            sys.stdout.flush()
            mesh = make_mesh(world, shard_size=config.parallel.shard_size, timeout_seconds=60)
            case = Case(config, mesh.shard)
            case.check_load()
            for check in raw["checks"]:
                getattr(case, f"check_{check}")()
            case.check_members()
            case.check_updates()
            case.check_parts()
            sys.stdout.write(f"padding {case.check_padding()} checked\n")
            world.barrier()  # rank 0 keeps the store that others may still need


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason
