"""What a run will take, before anything of it is loaded: memory, traffic, and about how long.

Everything is computed from the configuration, the architecture (``config.json``) and the shapes of its
parameters, by the rules that the run itself follows: those of the backends for who holds what, and those of
``rollout/memory.py`` for what ``rollout.gather: auto`` compares with the memory that is free.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from shardes.backends.footprint import RankFootprint, ShardingPlan
from shardes.config.schema import Config
from shardes.errors import UserError
from shardes.es.strategy import optimizer_of
from shardes.models.build import parameter_aliases
from shardes.planning.machine import Machine
from shardes.planning.workload import Workload
from shardes.rollout.memory import cache_bytes, generation_bytes, likelihood_bytes, mode_bytes
from shardes.utils.units import shown_bytes
from shardes.weights.master import CHUNK_ELEMENTS
from shardes.weights.trainable import select_trainable

# Numbers of ranks that are tried in the search for the fewest.
_MOST_RANKS = 1024


@dataclass(frozen=True)
class RankMemory:
    """What a rank holds, in bytes.

    Attributes:
        working: The weights that generate: its part of them.
        master: Its part of the master weights, wherever they are.
        optimizer: Of what the optimizer keeps, wherever it is.
        passing: On the device, for what is kept in host memory and passes through.
        is_on_host: Whether master and optimizer are in host memory.
        modes: By ``rollout.gather``, the fastest first: what it holds besides.
        gather_buffers: For the moment of gathering a whole model.
        cache: Keys and values of a micro-batch.
        activations: Activations and logits of a micro-batch.
    """

    working: int
    master: int
    optimizer: int
    passing: int
    is_on_host: bool
    modes: dict[str, int]
    gather_buffers: int
    cache: int
    activations: int

    @property
    def held(self) -> int:
        """On the device, whatever the mode."""
        kept = 0 if self.is_on_host else self.master + self.optimizer
        return self.working + self.passing + kept

    @property
    def on_host(self) -> int:
        """In pinned host memory."""
        return self.master + self.optimizer if self.is_on_host else 0

    def needed(self, mode: str) -> int:
        """The most on the device in a mode."""
        moment = self.activations
        if mode != "layer":
            moment = max(moment, self.gather_buffers)
        return self.held + self.modes[mode] + self.cache + moment


@dataclass(frozen=True)
class ModeCost:
    """What an iteration takes of a rank in a mode.

    Attributes:
        num_gathers: How often the whole model is gathered.
        received_bytes: In collectives of weights or activations.
        seconds: Of generating and receiving, at a machine's rates.
    """

    num_gathers: int
    received_bytes: float
    seconds: float


class Plan:
    """What a run takes with a number of ranks.

    Args:
        config: What the run is told.
        model: The model; its parameters may be on meta.
        workload: What an iteration asks.
        machine: What a rank has.
        world_size: Number of ranks; None: the fewest that hold one replica.

    Attributes:
        config: The same.
        model: The same.
        workload: The same.
        machine: The same.
        world_size: The same, found if it was None.
        shard_size: Ranks that hold one replica together.
        memory: What a rank holds.

    Raises:
        UserError: The ranks cannot be parted so, or cannot split the model; or none are enough.
    """

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        *,
        workload: Workload,
        machine: Machine,
        world_size: int | None,
    ) -> None:
        self.config, self.model, self.workload, self.machine = config, model, workload, machine
        self._spread = ShardingPlan(model, backend=config.parallel.backend)
        self._shapes = {name: parameter.shape.numel() for name, parameter in model.named_parameters()}
        self._trained = select_trainable(
            list(self._shapes), config.es.trainable, aliases=parameter_aliases(model)
        )
        is_single = config.parallel.backend == "single"
        shard_size = config.parallel.shard_size or (1 if is_single else world_size)
        if shard_size is None:
            wanted = config.rollout.gather
            modes = [wanted] if wanted != "auto" else self._mode_names()
            found = [size for mode in modes if (size := self.fewest_ranks(mode)) is not None]
            if not found:
                raise UserError(
                    f"--device-memory: got {shown_bytes(machine.memory_bytes)}, but no number of ranks up "
                    f"to {_MOST_RANKS} holds the model with rollout.gather: {wanted}; give "
                    "--world-size to see what is missing, a smaller rollout.micro_batch_size, or another one"
                )
            shard_size = min(found)
        self.world_size = world_size or shard_size
        if self.world_size % shard_size:
            raise UserError(
                f"--world-size: got {self.world_size}, which parallel.shard_size, {shard_size}, does not "
                "divide; change one of the two"
            )
        self.shard_size = shard_size
        self.memory = self._memory(self._spread.over(shard_size))

    @property
    def usable_bytes(self) -> int:
        """What a rank's device has for us."""
        return self.machine.memory_bytes - self.machine.reserved_bytes

    @property
    def num_replicas(self) -> int:
        """How many times the model is held."""
        return self.world_size // self.shard_size

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model."""
        return sum(self._shapes.values())

    @property
    def num_trained(self) -> int:
        """Elements that are trained."""
        return sum(self._shapes[name] for name in self._trained)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The model's."""
        dtype: torch.dtype = getattr(torch, self.config.model.dtype)
        return dtype

    def fits(self, mode: str) -> bool:
        """Whether a mode's memory is there."""
        return self.memory.needed(mode) <= self.usable_bytes

    @property
    def chosen_mode(self) -> str | None:
        """What ``rollout.gather`` comes to; None if that does not fit."""
        wanted = self.config.rollout.gather
        names = list(self.memory.modes) if wanted == "auto" else [wanted]
        return next((name for name in names if self.fits(name)), None)

    def _mode_names(self) -> list[str]:
        if self.config.parallel.backend == "tensor_parallel":
            return ["layer"]
        return ["iteration", "layer"] if self.config.rollout.is_batched else ["iteration", "member", "layer"]

    @property
    def _members_per_forward(self) -> int:
        """Members whose answers are rows of one forward; what ``auto`` finds is not known before a run."""
        if not self.config.rollout.is_batched:
            return 1
        count = self.config.rollout.members_per_forward
        return count if isinstance(count, int) else 1

    def fewest_ranks(self, mode: str) -> int | None:
        """The smallest number of ranks that hold a replica and evaluate in a mode; None if there is none."""
        for num_ranks in self._sizes():
            try:
                memory = self._memory(self._spread.over(num_ranks))
            except UserError:  # so many ranks cannot share the heads
                continue
            if memory.needed(mode) <= self.usable_bytes:
                return num_ranks
            if num_ranks > 1 and memory.modes[mode] > self.usable_bytes:
                break  # more ranks do not make a copy smaller
        return None

    def _sizes(self) -> Iterator[int]:
        """Numbers of ranks that could hold a replica."""
        backend = self.config.parallel.backend
        if backend == "single":
            yield 1
        elif backend == "tensor_parallel":
            heads = self.model.config.get_text_config().num_attention_heads
            yield from (size for size in range(1, heads + 1) if heads % size == 0)
        else:
            yield from range(1, 16)
            yield from range(16, _MOST_RANKS + 1, 8)

    def _memory(self, shares: RankFootprint) -> RankMemory:
        config, itemsize = self.config, self.dtype.itemsize
        trained = sum(size for name, size in shares.held.items() if name in self._trained)
        master_itemsize = torch.float32.itemsize if config.weights.master == "float32" else itemsize
        num_states = len(optimizer_of(config.es).state_names)
        is_on_host = config.weights.master_device == "cpu"
        chunk_bytes = CHUNK_ELEMENTS * (master_itemsize + num_states * torch.float32.itemsize)
        is_split = config.parallel.backend == "tensor_parallel"
        load = self.workload
        wanted: dict[str, Any] = {
            "rows": load.micro_batch_rows * self._members_per_forward,
            "length": load.prompt_tokens + load.answer_tokens,
            "dtype": self.dtype,
            "num_sharers": shares.num_ranks if is_split else 1,
        }
        generating = (generation_bytes if load.answer_tokens else likelihood_bytes)(
            self.model.config, **wanted
        )
        cache = cache_bytes(self.model.config, **wanted)
        return RankMemory(
            working=sum(shares.held.values()) * itemsize,
            master=trained * master_itemsize,
            optimizer=trained * num_states * torch.float32.itemsize,
            passing=chunk_bytes if is_on_host else 0,
            is_on_host=is_on_host,
            modes=self._modes(shares),
            gather_buffers=0
            if is_split or self._is_whole
            else shares.gather_buffer_bytes(itemsize, device_type=self.machine.device_type),
            cache=cache,
            activations=generating - cache,
        )

    @property
    def _is_whole(self) -> bool:
        """Whether every rank holds a whole model anyway."""
        return self.config.parallel.backend == "single"

    def _modes(self, shares: RankFootprint) -> dict[str, int]:
        itemsize = self.dtype.itemsize
        layer = {"layer": shares.gathered * itemsize}
        if self.config.parallel.backend == "tensor_parallel":
            return dict.fromkeys(self._mode_names(), shares.gathered * itemsize)
        if self.config.rollout.is_batched:
            copy = shares.whole * itemsize * (shares.num_ranks > 1 and not self._is_whole)
            return {"iteration": copy} | layer
        if self._is_whole:
            return {"member": 0, "iteration": 0, "layer": 0}
        held = mode_bytes(
            copy=shares.whole * itemsize,
            centre=self.num_trained * itemsize,
            is_sharded=shares.num_ranks > 1,
        )
        # Of a replica on one rank, members are gathered as with ``member``.
        return held | {"iteration": held.get("iteration", held["member"])} | layer

    def cost(self, mode: str) -> ModeCost:
        """What an iteration takes of a rank, if every answer is as long as it may be."""
        load, machine, ranks = self.workload, self.machine, self.shard_size
        is_split = self.config.parallel.backend == "tensor_parallel"
        is_batched = self.config.rollout.is_batched
        is_apart = (mode == "iteration" or is_batched) and not is_split
        num_teams = self.world_size if is_apart else self.num_replicas
        together = self._members_per_forward
        num_members = -(-load.num_members // (num_teams * together))
        num_batches = -(-load.num_sequences // load.micro_batch_rows)
        if not (is_apart or is_split):
            num_batches = -(-num_batches // ranks)
        num_batches *= num_members
        num_steps = max(load.answer_tokens - 1, 0)
        num_forwards = num_batches * (1 + num_steps)
        rows, config = load.micro_batch_rows * together, self.model.config.get_text_config()
        num_tokens = num_batches * rows * (load.prompt_tokens + num_steps)
        itemsize, share = self.dtype.itemsize, (ranks - 1) / ranks
        if self._is_whole or (ranks == 1 and not is_split):
            num_gathers, received = 0, 0.0
        elif is_split:
            num_gathers = 0
            reductions = 2 * config.num_hidden_layers * config.hidden_size * itemsize
            received = 2 * share * reductions * num_tokens
        else:
            num_gathers = {"iteration": 1, "member": num_members}.get(mode, num_forwards)
            received = num_gathers * self.num_parameters * itemsize * share
        part = 1 / ranks if is_split else 1.0
        reading = part * self.num_parameters * itemsize / machine.memory_bytes_per_second
        computing = part * 2 * self.num_parameters * rows / machine.flops_per_second
        seconds = received / machine.gather_bytes_per_second
        seconds += num_batches * max(reading, computing * load.prompt_tokens)
        seconds += num_batches * num_steps * max(reading, computing)
        return ModeCost(num_gathers, received, seconds)
