"""vLLM: each rank is a tensor parallel worker of an engine whose own parameters are the shards.

Nothing is gathered and nothing is sent: members are written into the weights that generate, at the addresses
that captured graphs know, from master shards that lie beside them. Which elements a rank holds is recorded
from vLLM's own weight loaders (see ``recording``), and checked when the weights have been read: the centre
must be, bit for bit, what vLLM has loaded.
"""

import math
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from shardes.backends.footprint import RankFootprint
from shardes.backends.shard import Shard, ShardSpan
from shardes.backends.sharded import ShardedBackend
from shardes.backends.vllm.adapters import without_adapters
from shardes.backends.vllm.launch import end_engine, start_engine
from shardes.backends.vllm.mapping import make_shards, mark_copies
from shardes.backends.vllm.recording import FileTensor, record_copies
from shardes.config.schema import Config
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.models.build import build_model
from shardes.models.checkpoint import Checkpoint
from shardes.utils.device import synchronize

# vLLM pads vocabularies to a multiple of this, so that ranks can share them.
_VOCABULARY_UNIT = 64


class VllmBackend(ShardedBackend):
    """The parameters of a vLLM engine in this process.

    ``sharded_model`` has the model's configuration and no weights: the engine ``vllm`` generates.

    Args:
        skeleton: Model with parameters on meta and real buffers.
        group: Ranks to split over; a process group exists even if there is only one.
        llm: vLLM's engine, whose worker is this process.
        files: Tensors of the model's files.
        timeout_seconds: Seconds that a rank waits for another.

    Attributes:
        llm: Argument ``llm``.
        timeout_seconds: Argument ``timeout_seconds``.
        max_model_len: Most tokens of a prompt and its answer that the engine takes.

    Raises:
        UserError: vLLM holds weights that are no elements of the files.
    """

    name = "vllm"
    is_preloaded = True

    def __init__(
        self,
        skeleton: PreTrainedModel,
        *,
        group: Group,
        llm: Any,
        files: list[FileTensor],
        timeout_seconds: float,
    ) -> None:
        super().__init__(skeleton, group=group)
        self.llm, self.sharded_model, self.timeout_seconds = llm, skeleton, timeout_seconds
        self.max_model_len: int = llm.llm_engine.model_config.max_model_len
        model: Any = self.model
        with without_adapters(model):
            _check_derived(model)
            targets = dict(model.named_parameters())
            copies = record_copies(model.load_weights, targets, files, dtype=self.dtype)
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        shards = make_shards(targets, copies, shapes=shapes, dtype=self.dtype, device=group.device)
        self.shards, self._spans = mark_copies(shards, group)

    @classmethod
    def build(cls, skeleton: PreTrainedModel, *, config: Config, group: Group) -> Self:
        """Start vLLM and map its parameters; a collective.

        Raises:
            UserError: vLLM is missing, or cannot hold the model in a way that can be perturbed.
        """
        _check_unquantised(config, skeleton)
        held = cls.footprint(skeleton, num_ranks=group.world_size).held
        files = _file_tensors(config)
        llm = start_engine(config, skeleton=skeleton, group=group, num_elements=sum(held.values()))
        timeout_seconds = config.parallel.timeout_seconds
        return cls(skeleton, group=group, llm=llm, files=files, timeout_seconds=timeout_seconds)

    @staticmethod
    def footprint(skeleton: PreTrainedModel, *, num_ranks: int) -> RankFootprint:
        """Compute about what the first of ``num_ranks`` ranks holds; vLLM need not be there.

        Matrices are split; norms, routers and what has one dimension are counted as whole. Key-value heads
        are held by several ranks where there are fewer of them than ranks.

        Raises:
            UserError: The ranks cannot share the heads.
        """
        config = skeleton.config.get_text_config()
        heads = config.num_attention_heads
        if heads % num_ranks:
            raise UserError(
                f"parallel.backend: vllm deals whole heads to ranks, but the model has {heads} attention "
                f"heads, which {num_ranks} ranks cannot share equally; let another number of ranks hold "
                "the model (parallel.shard_size), or set parallel.backend: fsdp"
            )
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        ends = [skeleton.get_input_embeddings(), skeleton.get_output_embeddings()]
        vocabularies = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
        held = {}
        for name, parameter in skeleton.named_parameters():
            rows, size = (parameter.shape[0] if parameter.ndim else 1), parameter.numel()
            if id(parameter) in vocabularies:
                padded = -(-rows // _VOCABULARY_UNIT) * _VOCABULARY_UNIT
                size = -(-padded // num_ranks) * (size // rows)
            elif parameter.ndim > 1 and not name.endswith((".gate.weight", "expert_gate.weight")):
                parts = num_ranks
                if name.endswith(("k_proj.weight", "v_proj.weight")):
                    parts = min(num_ranks, kv_heads)
                size = -(-size // parts)
            held[name] = size
        return RankFootprint(num_ranks, held)

    @property
    def model(self) -> nn.Module:
        """Return vLLM's model."""
        model: nn.Module = self.runner.get_model()
        return model

    @property
    def runner(self) -> Any:
        """Return vLLM's model runner."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    @property
    def caches(self) -> list[torch.Tensor]:
        """Return the keys and values of vLLM's layers."""
        return [cache for cache in self.runner.kv_caches if isinstance(cache, torch.Tensor)]

    def _spans_of_ranks(self, shard: Shard) -> list[tuple[ShardSpan, ...]]:
        """Return the spans of a parameter that each rank holds."""
        return self._spans[shard.name]

    def commit(self) -> None:
        """Wait until the weights are written: vLLM may compute on streams of its own."""
        synchronize(self.device)

    def gathered(self) -> nn.Module:
        """Refuse: vLLM's weights are never gathered.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "rollout.gather: parallel.backend: vllm never gathers the model; set rollout.gather: auto"
        )

    def close(self) -> None:
        """End the engine."""
        end_engine(self.llm)


def _check_unquantised(config: Config, skeleton: PreTrainedModel) -> None:
    """Refuse a model whose files say that it is quantised.

    Raises:
        UserError: They do.
    """
    if getattr(skeleton.config, "quantization_config", None) is not None:
        raise UserError(
            f"model.path: {config.model.directory} is quantised (quantization_config in config.json): packed "
            "weights and their scales are no elements that noise can be added to; use the model's "
            "unquantised version"
        )


def _file_tensors(config: Config) -> list[FileTensor]:
    """Return the tensors of the model's files, without further names of tied weights.

    Raises:
        UserError: The files do not fit the model.
    """
    checkpoint = Checkpoint(config.model.directory)
    model, _ = build_model(config, checkpoint)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    files = []
    for parameter in shapes:
        start = 0
        for name, shape in checkpoint.pieces_of(parameter):
            files.append(FileTensor(name, tuple(shape), parameter, start))
            start += math.prod(shape)
    return files


def _check_derived(model: nn.Module) -> None:
    """Check that no module keeps weights that were computed from its parameters when they were loaded.

    Raises:
        UserError: One does, as multi-head latent attention and packed layers do.
    """
    storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_weight = isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1
            if not is_weight or key == "kv_cache" or value.untyped_storage()._cdata in storages:
                continue
            raise UserError(
                f"parallel.backend: vllm computes {name}.{key}, of shape {tuple(value.shape)}, from the "
                "weights when it loads them, so that members could not be written in place; set "
                "parallel.backend: fsdp or zero3"
            )
