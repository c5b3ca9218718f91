"""Run on every rank: vLLM's shards against plain tensors, and the recorded map against one that is loaded.

python vllm_checks.py CASES.json, a list of {"config": tree, "is_repacked": whether vLLM changes the weights}
"""

import json
import os
import sys
from pathlib import Path

import torch

from shardes.backends.build import make_backend
from shardes.backends.vllm.backend import _file_tensors
from shardes.config.loading import parse_config
from shardes.distributed.group import Group, make_mesh
from shardes.distributed.launch import process_group
from shardes.distributed.stop import Stop
from shardes.errors import UserError
from shardes.models.build import parameter_ids, skeleton_of
from shardes.models.checkpoint import Checkpoint
from shardes.weights.master import Weights
from tests.helpers.backend_checks import Case, assert_same, make_oracle

BITS = 36  # of an element's index in a parameter


class VllmCase(Case):
    """Shards alone: vLLM's forwards are the engine's."""

    def check_forwards(self, what):
        """vLLM answers by its engine; and some classes of transformers cannot do so any more beside it."""

    def check_map(self):
        """The shards are where vLLM's own loaders put int64 indices instead of weights."""
        loaded = loaded_indices(self.backend, self.files)
        recorded = recorded_indices(self.backend)
        assert loaded.keys() == recorded.keys()
        for name, indices in loaded.items():
            assert_same(recorded[name], indices, name)
        held = sum(p.numel() for p in self.backend.model.parameters())
        planned = sum(self.backend.footprint(self.skeleton, num_ranks=self.num_ranks).held.values())
        assert held <= planned <= 1.03 * held, (held, planned)
        num_found = sum(int((indices >= 0).sum()) for indices in loaded.values())
        assert num_found == sum(shard.num_owned for shard in self.backend.shards) > 0


def loaded_indices(backend, files):
    """Indices of the elements of vLLM's parameters, -1 for padding, by loading them as weights.

    Every parameter is int64 meanwhile, so no bit is lost; then it is the old storage again.
    """
    ids = parameter_ids([shard.name for shard in backend.shards])
    parameters = dict(backend.model.named_parameters())
    kept = {name: parameter.data for name, parameter in parameters.items()}

    def tensors():
        for file in files:
            first = (ids[file.parameter] + 1 << BITS) + file.start  # loaders fill padding with 0
            count = torch.Size(file.shape).numel()
            yield file.name, torch.arange(first, first + count).view(file.shape)

    try:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.data = torch.zeros(parameter.shape, dtype=torch.int64)
        backend.model.load_weights(tensors())
        return {name: parameter.data.clone() - (1 << BITS) for name, parameter in parameters.items()}
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


def recorded_indices(backend):
    """The same from the shards' spans."""
    parameters = dict(backend.model.named_parameters())
    found = {name: torch.full(p.shape, -(1 << BITS)) for name, p in parameters.items()}
    homes = {parameter.untyped_storage().data_ptr(): name for name, parameter in parameters.items()}
    for shard in backend.shards:
        if not shard.spans:
            continue
        flat = found[homes[shard.local.untyped_storage().data_ptr()]].view(-1)
        for span in shard.spans:
            row = span.global_start + torch.arange(span.rows)[:, None] * span.stride
            indices = (row + torch.arange(span.length)).view(-1) + (shard.param_id << BITS)
            first = shard.local.storage_offset() + span.local_start
            flat[first : first + span.num_elements] = indices
    return found


def run(raw, world, oracle):
    config = parse_config(raw["config"], source="case")
    mesh = make_mesh(world, shard_size=None, timeout_seconds=60)
    files = oracle[2]
    if raw["is_repacked"]:
        backend = make_backend(config, group=mesh.shard)
        case = VllmCase.__new__(VllmCase)
        case.backend, case.files = backend, files
        case.skeleton, case.num_ranks = oracle[3], mesh.shard.world_size
        case.check_map()
        try:
            Weights(backend, seed=7).load(Checkpoint(config.model.path))
        except UserError as error:
            assert "keeps them packed, or in another order" in str(error), error
            assert "experts" in str(error), error
        else:
            raise AssertionError("repacked weights were not noticed")
    else:
        case = VllmCase(config, mesh.shard, oracle=oracle[:2])
        case.files, case.skeleton, case.num_ranks = files, oracle[3], mesh.shard.world_size
        addresses = {s.name: s.local.data_ptr() for s in case.backend.shards}
        case.check_map()
        case.check_load()
        case.check_members()
        case.check_updates()
        case.check_parts()
        assert addresses == {s.name: s.local.data_ptr() for s in case.backend.shards}
    case.backend.close()


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    # Before vLLM changes classes of transformers.
    alone = Group(0, 1, torch.device("cpu"))
    oracles = []
    for raw in cases:
        config = parse_config(raw["config"], source="case")
        skeleton = skeleton_of(config)
        oracles.append((*make_oracle(config, alone), _file_tensors(config), skeleton))
    with process_group(timeout_seconds=60, always=True, stop=Stop(), stop_seconds=60) as world:
        for raw, oracle in zip(cases, oracles, strict=True):
            model = raw["config"]["model"]
            sys.stdout.write(f"{Path(model['path']).name} {model['dtype']}\n")
            sys.stdout.flush()
            run(raw, world, oracle)
        world.barrier()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason
