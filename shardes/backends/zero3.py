"""DeepSpeed ZeRO-3: each rank holds 1/W of every parameter.

DeepSpeed keeps gathered copies of parameters (persistent ones always, others while they are prefetched), and
a forward reads such a copy without noticing that the shard underneath was written. ``commit`` drops them.
"""

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from shardes.backends.deepspeed_config import make_deepspeed_config
from shardes.backends.footprint import RankFootprint, parameter_sizes
from shardes.backends.layout import chunk, flat_layout
from shardes.backends.sharded import GatheringBackend
from shardes.config.schema import Config
from shardes.distributed.devices import collectives_of
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.models.build import largest_layer, largest_parameter
from shardes.utils.device import synchronize

_RELIED_ON = ("ds_tensor", "ds_numel", "ds_shape", "ds_process_group")


def import_deepspeed() -> Any:
    """Import DeepSpeed and return the module.

    Raises:
        UserError: It is not installed.
    """
    try:
        import deepspeed
        import deepspeed.comm.torch
        import deepspeed.runtime.zero.partitioned_param_coordinator
    except ImportError as error:
        raise UserError(
            f"parallel.backend: zero3 needs deepspeed, which cannot be imported ({error}); "
            "install it with: pip install 'shardes[zero3]', or set parallel.backend: single"
        ) from None
    return deepspeed


@contextmanager
def numbered_by_device(device: torch.device) -> Iterator[None]:
    """Have DeepSpeed take a rank's own GPU, whose number it reads from a variable of the launcher.

    The two differ where a launcher shows each rank one GPU.
    """
    given = os.environ.get("LOCAL_RANK")
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        if given is not None:
            os.environ["LOCAL_RANK"] = given


def _check_alike(group: Group, ints: list[int]) -> None:
    """Compare numbers between ranks; takes the place of DeepSpeed's check over the whole job.

    Raises:
        RuntimeError: The numbers of another rank differ.
    """
    if any(others != ints for others in group.gather_json(ints)):
        raise RuntimeError("the ranks of a replica ran the model's modules in different orders")


class _Ranks:
    """Model-parallel unit (``mpu``) by which DeepSpeed learns over which ranks to shard.

    Args:
        group: Ranks to shard over.
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def get_data_parallel_group(self) -> Any:
        return self._group.process_group or dist.group.WORLD

    def get_data_parallel_world_size(self) -> int:
        return self._group.world_size

    def get_data_parallel_rank(self) -> int:
        return self._group.rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


class Zero3Backend(GatheringBackend):
    """A model sharded by DeepSpeed ZeRO-3, without an optimizer.

    Args:
        skeleton: Model with parameters on meta and real buffers; it becomes the replica of ``gathered``.
        deepspeed_config: A complete DeepSpeed configuration (see ``deepspeed_config.py``).
        group: Ranks to shard over; a process group exists even if there is only one.
        trust_remote_code: Whether the model's own Python code may run.

    Raises:
        UserError: DeepSpeed is not installed, or has no float16 on this device.
        RuntimeError: This version of DeepSpeed lays shards out differently.
    """

    name = "zero3"

    def __init__(
        self,
        skeleton: PreTrainedModel,
        *,
        deepspeed_config: dict[str, Any],
        group: Group,
        trust_remote_code: bool,
    ) -> None:
        deepspeed = import_deepspeed()
        if skeleton.dtype == torch.float16 and not deepspeed.get_accelerator().is_fp16_supported():
            raise UserError(
                "model.dtype: deepspeed has no float16 on this device; use bfloat16 or float32, or "
                "parallel.backend: single"
            )
        super().__init__(skeleton, group=group)
        if group.device.type == "cpu":
            # Its shared-memory collectives take a minute to compile at the first start, and gain nothing.
            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        deepspeed.init_distributed(dist_backend=collectives_of(group.device), verbose=False)
        # DeepSpeed has all ranks of the job compare what their first forwards gathered. A replica that has
        # nothing to answer yet runs none, and the others would wait for it.
        coordinator: Any = sys.modules["deepspeed.runtime.zero.partitioned_param_coordinator"]
        coordinator.assert_ints_same_as_other_ranks = functools.partial(_check_alike, group)
        ranks = _Ranks(group)
        with (
            numbered_by_device(group.device),
            no_init_weights(),
            deepspeed.zero.Init(
                data_parallel_group=ranks.get_data_parallel_group(),
                config_dict_or_path=deepspeed_config,
                mem_efficient_linear=False,
                mpu=ranks,
            ),
        ):
            model = AutoModelForCausalLM.from_config(
                skeleton.config, dtype=skeleton.dtype, trust_remote_code=trust_remote_code
            )
        model.tie_weights()
        model.generation_config = skeleton.generation_config
        _copy_buffers(skeleton, model)
        with numbered_by_device(group.device):
            self._engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config, mpu=ranks)
        self._engine.eval()
        self.sharded_model = model
        self._parameters = dict(sorted(model.named_parameters()))
        self._check_layout(skeleton)
        parameters = self._parameters.items()
        self._hold(
            skeleton,
            local={name: parameter.ds_tensor.data for name, parameter in parameters},
            layouts={
                name: flat_layout(parameter.ds_numel, world_size=group.world_size)
                for name, parameter in parameters
            },
        )

    @classmethod
    def build(cls, skeleton: PreTrainedModel, *, config: Config, group: Group) -> Self:
        """Build the backend and its DeepSpeed configuration; arguments as in ``Backend.build``.

        Raises:
            UserError: DeepSpeed is not installed, or ``parallel.deepspeed`` cannot be used.
        """
        size = config.rollout.micro_batch_size
        deepspeed_config = make_deepspeed_config(
            config.parallel.deepspeed,
            dtype=skeleton.dtype,
            micro_batch_size=None if size == "auto" else size,
            world_size=group.world_size,
            hidden_size=skeleton.config.get_text_config().hidden_size,
            largest_layer=largest_layer(skeleton),
            largest_parameter=largest_parameter(skeleton),
        )
        trust = config.model.trust_remote_code
        return cls(skeleton, deepspeed_config=deepspeed_config, group=group, trust_remote_code=trust)

    @staticmethod
    def footprint(skeleton: PreTrainedModel, *, num_ranks: int) -> RankFootprint:
        """Compute the elements that the first of ``num_ranks`` ranks holds, of flat parameters in chunks."""
        sizes = parameter_sizes(skeleton)
        held = {name: chunk(size, num_ranks, 0)[1] for name, size in sizes.items()}
        # The limits that make_deepspeed_config sets: small parameters stay gathered.
        least = skeleton.config.get_text_config().hidden_size
        gathers = sum(size > least for size in sizes.values())
        return RankFootprint(num_ranks, held, 2 * largest_layer(skeleton), gathers)

    def _check_layout(self, skeleton: nn.Module) -> None:
        """Check the private attributes of DeepSpeed that are read here.

        Raises:
            RuntimeError: They are missing, or the layout is not the expected one.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        for name, parameter in self._parameters.items():
            absent = [attribute for attribute in _RELIED_ON if not hasattr(parameter, attribute)]
            if absent or not hasattr(self._engine.optimizer, "empty_partition_cache"):
                raise RuntimeError(
                    f"this version of deepspeed lays out shards differently: {name} lacks {absent}"
                )
            if tuple(parameter.ds_shape) != shapes.get(name) or parameter.ds_tensor.dtype != self.dtype:
                raise RuntimeError(
                    f"deepspeed sharded {name} as {parameter.ds_shape} {parameter.ds_tensor.dtype}"
                )
            rank, size = dist.get_rank(parameter.ds_process_group), parameter.ds_tensor.numel()
            if rank != self._group.rank or size != -(-parameter.ds_numel // self._group.world_size):
                raise RuntimeError(
                    f"deepspeed gave rank {self._group.rank} of {self._group.world_size} part {rank} of "
                    f"{name}, {size} of {parameter.ds_numel} elements"
                )

    def commit(self) -> None:
        """Drop every gathered copy, so that the next forward gathers the shards anew.

        DeepSpeed gathers on a stream of its own, which does not wait for the one that shards are written on.
        """
        self._engine.optimizer.empty_partition_cache()
        synchronize(self.device)


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy buffers, which zero.Init casts to the model's dtype, rotary frequencies included."""
    modules = dict(target.named_modules())
    for name, buffer in source.named_buffers():
        owner, _, key = name.rpartition(".")
        old = modules[owner]._buffers[key]
        modules[owner]._buffers[key] = buffer.detach().to(old.device if old is not None else "cpu").clone()
