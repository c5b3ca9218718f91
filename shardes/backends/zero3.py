"""DeepSpeed ZeRO-3: each rank holds 1/W of every parameter.

DeepSpeed keeps gathered copies of parameters (persistent ones always, others while they are prefetched), and
a forward reads such a copy without noticing that the shard underneath was written. ``commit`` drops them.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from shardes.backends.base import Backend
from shardes.distributed import Group
from shardes.errors import UserError
from shardes.modeling import fill_parameters, parameter_aliases, parameter_ids
from shardes.shards import Run, Shard

# Bytes of a rank's shards that are copied together to be gathered at once.
_BUCKET_BYTES = 16 * 2**20

_RELIED_ON = ("ds_tensor", "ds_numel", "ds_shape", "ds_process_group")


def import_deepspeed() -> Any:
    """DeepSpeed, or a clear refusal where it is not installed.

    Raises:
        UserError: It cannot be imported.
    """
    try:
        import deepspeed
        import deepspeed.comm.torch
    except ImportError as error:
        raise UserError(
            f"parallel.backend: zero3 needs deepspeed, which cannot be imported ({error}); "
            "install it with: pip install 'shardes[zero3]', or set parallel.backend: single"
        ) from None
    return deepspeed


class Zero3Backend(Backend):
    """A model sharded by DeepSpeed ZeRO-3, without an optimizer.

    Args:
        skeleton: The model, parameters on meta, buffers real; it becomes the replica of ``gathered``.
        deepspeed_config: A complete DeepSpeed configuration (see ``deepspeed_config.py``).
        group: The ranks; a process group exists even if there is only one.
        trust_remote_code: Whether the model's own Python code may run.
    """

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
        self._group = group
        self._replica = skeleton
        self._replica_storage: dict[str, torch.Tensor] | None = None
        self.dtype = skeleton.dtype
        self.device = group.device
        self.aliases = parameter_aliases(skeleton)
        if group.device.type == "cpu":
            # Its shared-memory collectives take a minute to compile at the first start, and gain nothing.
            sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        deepspeed.init_distributed(
            dist_backend="nccl" if group.device.type == "cuda" else "gloo", verbose=False
        )
        with (
            no_init_weights(),
            deepspeed.zero.Init(config_dict_or_path=deepspeed_config, mem_efficient_linear=False),
        ):
            model = AutoModelForCausalLM.from_config(
                skeleton.config, dtype=skeleton.dtype, trust_remote_code=trust_remote_code
            )
        model.tie_weights()
        model.generation_config = skeleton.generation_config
        _copy_buffers(skeleton, model)
        self._engine, *_ = deepspeed.initialize(model=model, config=deepspeed_config)
        self._engine.eval()
        self.lockstep_model = model
        self._parameters = dict(sorted(model.named_parameters()))
        self._check_layout(skeleton)
        self._buckets = _buckets(self._parameters)
        ids = parameter_ids(list(self._parameters))
        self.shards = tuple(
            Shard(name, ids[name], tuple(parameter.ds_shape), parameter.ds_tensor.data, _runs(parameter))
            for name, parameter in self._parameters.items()
        )

    def _check_layout(self, skeleton: nn.Module) -> None:
        """What is read here are private attributes of DeepSpeed: stop if they are not what they were."""
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

    @property
    def is_sharded(self) -> bool:
        """Whether there is more than one rank to shard over."""
        return self._group.world_size > 1

    def commit(self) -> None:
        """Drops every gathered copy, so that the next forward gathers the shards anew."""
        self._engine.optimizer.empty_partition_cache()

    def gathered(self) -> nn.Module:
        """A hook-free replica, filled from all ranks' shards."""
        if self._replica_storage is None:
            self._replica_storage = self._build_replica()
        for bucket in self._buckets:
            self._gather_bucket(bucket, self._replica_storage)
        return self._replica

    def _gather_bucket(self, names: list[str], storage: dict[str, torch.Tensor]) -> None:
        """Gathers parameters in one collective: small ones cost a collective's latency, not its bandwidth."""
        local = [self._parameters[name].ds_tensor.data for name in names]
        if len(names) == 1:
            _all_gather(storage[names[0]], local[0])
            return
        sent = torch.cat(local)
        received = sent.new_empty(self._group.world_size, sent.numel())
        _all_gather(received.view(-1), sent)
        for name, part in zip(names, received.split([t.numel() for t in local], dim=1), strict=True):
            storage[name].view(self._group.world_size, -1).copy_(part)

    def _build_replica(self) -> dict[str, torch.Tensor]:
        storage, views = {}, {}
        for name, parameter in self._parameters.items():
            # Padded at its end, so that a gather needs no copy.
            flat = torch.empty(
                parameter.ds_tensor.numel() * self._group.world_size,
                dtype=self.dtype,
                device=self._group.device,
            )
            storage[name] = flat
            views[name] = flat[: parameter.ds_numel].view(parameter.ds_shape)
        fill_parameters(self._replica, views)
        self._replica.to(self._group.device)
        return storage

    def gather_parameter(self, shard: Shard, values: torch.Tensor) -> torch.Tensor | None:
        """The shards of one parameter, joined on rank 0 without the padding."""
        parts = (
            [torch.empty_like(values) for _ in range(self._group.world_size)] if self._group.is_main else None
        )
        dist.gather(values.contiguous(), parts, group=self._group.process_group, group_dst=0)
        if parts is None:
            return None
        return torch.cat(parts)[: self._parameters[shard.name].ds_numel].view(shard.shape)


def _all_gather(output: torch.Tensor, local: torch.Tensor) -> None:
    # torch 2.13 renames the function and warns about the old name, the only one that 2.11 has.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, local)


def _buckets(parameters: dict[str, Any]) -> list[list[str]]:
    """Names to gather together: neighbours, as long as their shards fit into a bucket."""
    buckets: list[list[str]] = []
    size = _BUCKET_BYTES
    for name, parameter in parameters.items():
        num_bytes = parameter.ds_tensor.numel() * parameter.ds_tensor.element_size()
        if size + num_bytes > _BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(name)
        size += num_bytes
    return buckets


def _runs(parameter: Any) -> tuple[Run, ...]:
    """The one run of elements that this rank owns, or none. What follows it in the shard is padding."""
    length = parameter.ds_tensor.numel()
    start = length * dist.get_rank(parameter.ds_process_group)
    owned = max(0, min(length, parameter.ds_numel - start))
    return (Run(0, start, owned),) if owned else ()


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Mends buffers: zero.Init casts what constructors make to the model's dtype, rotary frequencies too."""
    modules = dict(target.named_modules())
    for name, buffer in source.named_buffers():
        owner, _, key = name.rpartition(".")
        old = modules[owner]._buffers[key]
        modules[owner]._buffers[key] = buffer.detach().to(old.device if old is not None else "cpu").clone()
