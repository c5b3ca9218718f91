"""Run on every rank: ZeRO-3 shards against plain tensors, after every way of writing them.

python zero3_checks.py CONFIG.json DEEPSPEED_OR_EMPTY
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from shardes.backends import make_backend
from shardes.checkpoint import Checkpoint
from shardes.config import parse_config
from shardes.distributed import process_group
from shardes.es.weights import Weights

NUM_MEMBERS = 6  # DeepSpeed starts to keep gathered copies once it has seen two whole forwards
SENTINEL = 1.8e25


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


@torch.no_grad()
def main():
    tree = json.loads(Path(sys.argv[1]).read_text())
    tree["parallel"]["backend"] = "zero3"
    tree["parallel"]["deepspeed"] = sys.argv[2] or None
    config = parse_config(tree, source="test")
    checkpoint = Checkpoint(config.model.path)
    torch.set_num_threads(1)
    with process_group(timeout_seconds=60, always=True) as group:
        sharded = make_backend(config, group=group)
        alone = dataclasses.replace(group, rank=0, world_size=1)
        single = config.model_copy(
            update={"parallel": config.parallel.model_copy(update={"backend": "single"})}
        )
        oracle = make_backend(single, group=alone)
        tails = fill_padding(sharded)
        weights, wanted = Weights(sharded, seed=7), Weights(oracle, seed=7)
        bytes_before = checkpoint.bytes_read
        weights.load(checkpoint)
        read = checkpoint.bytes_read - bytes_before
        owned = sum(shard.num_owned for shard in sharded.shards)
        width = next(iter(checkpoint.tensors.values())).dtype.itemsize
        assert read == owned * width, "a rank reads its own elements only"
        assert group.sum_int64(owned) == sum(shard.num_owned for shard in oracle.shards)
        wanted.load(checkpoint)

        ids = torch.arange(24).view(4, 6) % oracle.lockstep_model.config.vocab_size
        forward = {
            "stream": lambda: sharded.lockstep_model(ids).logits,
            "prompts": lambda: sharded.gathered()(ids).logits,
        }
        for direction in range(NUM_MEMBERS):
            weights.perturb(iteration=0, direction=direction, sigma=0.1)
            wanted.perturb(iteration=0, direction=direction, sigma=0.1)
            logits = oracle.lockstep_model(ids).logits
            for name, compute in forward.items():
                assert_same(compute(), logits, f"{name}, member {direction}")
        for w in (weights, wanted):
            w.update(iteration=0, directions=[0, 1, 2], coefficients=[0.1, -0.2, 0.05])
            w.centre()
        for name, compute in forward.items():
            assert_same(compute(), oracle.lockstep_model(ids).logits, f"{name}, updated centre")
        assert group.sum_int64(weights.digest()) == wanted.digest()
        for mine, its in zip(sharded.shards, oracle.shards, strict=True):
            assert (mine.name, mine.param_id, mine.shape) == (its.name, its.param_id, its.shape)
            whole = weights.gather_centre(mine)
            if group.is_main:
                assert_same(whole, wanted.gather_centre(its), mine.name)
        for tail in tails:
            assert (tail == torch.tensor(SENTINEL).to(tail.dtype)).all(), "padding was written"
        padding = sum(tail.numel() for tail in tails)
    sys.stdout.write(f"padding {padding} checked\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason
