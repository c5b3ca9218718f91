"""The memory, the traffic and about the time that a run will take, before anything of it is loaded.

Everything is computed from the configuration, the architecture (``config.json``) and the shapes of its
parameters, by the rules that the run itself follows: the backends' ``footprint`` functions for the shares of
ranks, and ``rollout/memory.py`` for the needs that ``rollout.gather: auto`` compares with free memory.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from shardes.backends.footprint import RankFootprint, parameter_sizes
from shardes.backends.registry import BACKENDS
from shardes.config.schema import Config
from shardes.errors import UserError
from shardes.es.optimizers import PlainStep
from shardes.es.strategy import optimizer_of
from shardes.models.build import parameter_aliases
from shardes.models.checkpoint import BLOCK_BYTES
from shardes.planning.machine import Machine
from shardes.planning.rank_memory import RankMemory
from shardes.planning.timing import Forward, ForwardTimer, noise_seconds
from shardes.planning.workload import Workload
from shardes.rollout.memory import cache_bytes, generation_bytes, likelihood_bytes, mode_bytes
from shardes.utils.units import shown_bytes
from shardes.weights.master import CHUNK_ELEMENTS, STEP_ELEMENTS
from shardes.weights.pinned import pinned_bytes
from shardes.weights.trainable import select_trainable
from shardes.weights.update_stats import BYTES_AT_ONCE, NUM_AT_ONCE

# Numbers of ranks that are tried in the search for the fewest.
_MOST_RANKS = 1024


@dataclass(frozen=True)
class GatherCost:
    """Cost of an iteration to a rank with a value of ``rollout.gather``.

    Attributes:
        num_gathers: Number of gathers of the whole model.
        received_bytes: Bytes received in collectives of weights or activations.
        seconds: Seconds of generating and receiving, at a machine's rates.
    """

    num_gathers: int
    received_bytes: float
    seconds: float


class Plan:
    """A run's needs with a number of ranks.

    Args:
        config: Configuration of the run.
        model: Model, whose parameters may be on meta.
        workload: Work of an iteration.
        machine: Device of each rank.
        world_size: Number of ranks; None for the fewest that hold one replica.

    Attributes:
        config: Argument ``config``.
        model: Argument ``model``.
        workload: Argument ``workload``.
        machine: Argument ``machine``.
        world_size: Number of ranks, found if the argument is None.
        dtype: Dtype of the model.
        shard_size: Ranks that hold one replica together.
        memory: Memory of a rank.

    Raises:
        UserError: The ranks cannot be divided into replicas or cannot split the model, or no number of ranks
            is enough.
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
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._spec = BACKENDS[config.parallel.backend]
        footprint = self._spec.load().footprint
        self._footprint = cache(lambda num_ranks: footprint(model, num_ranks=num_ranks))
        self._sizes = parameter_sizes(model)
        self._trained = select_trainable(
            list(self._sizes), config.es.trainable, aliases=parameter_aliases(model)
        )
        shard_size = config.parallel.shard_size or self._spec.default_shard_size or world_size
        if shard_size is None:
            wanted = config.rollout.gather
            gathers = self._memory(self._footprint(1)).gathers if wanted == "auto" else [wanted]
            found = [size for gather in gathers if (size := self.fewest_ranks(gather)) is not None]
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
        self.memory = self._memory(self._footprint(shard_size))

    @property
    def usable_bytes(self) -> int:
        """Bytes of a rank's device that the run may use."""
        return self.machine.memory_bytes - self.machine.reserved_bytes

    @property
    def num_replicas(self) -> int:
        """Number of replicas of the model."""
        return self.world_size // self.shard_size

    @property
    def num_parameters(self) -> int:
        """Number of elements of the whole model."""
        return sum(self._sizes.values())

    @property
    def num_trained(self) -> int:
        """Number of elements that are trained."""
        return sum(self._sizes[name] for name in self._trained)

    def fits(self, gather: str) -> bool:
        """Return whether a rank has the memory for a value of ``rollout.gather``."""
        return self.memory.needed(gather) <= self.usable_bytes

    @property
    def chosen_gather(self) -> str | None:
        """The value that ``rollout.gather`` comes to; None if it does not fit."""
        wanted = self.config.rollout.gather
        gathers = self.memory.gathers if wanted == "auto" else [wanted]
        return next((gather for gather in gathers if self.fits(gather)), None)

    @property
    def _members_per_forward(self) -> int:
        """Number of members in one forward; 1 for ``auto``, whose number is not known before a run."""
        if not self.config.rollout.is_batched:
            return 1
        count = self.config.rollout.members_per_forward
        return count if isinstance(count, int) else 1

    def fewest_ranks(self, gather: str) -> int | None:
        """Find the smallest number of ranks that hold a replica with a value of ``rollout.gather``.

        Returns:
            The number of ranks; None if none is enough.
        """
        for num_ranks in self._shard_sizes():
            try:
                memory = self._memory(self._footprint(num_ranks))
            except UserError:  # so many ranks cannot share the heads
                continue
            if memory.needed(gather) <= self.usable_bytes:
                return num_ranks
            if num_ranks > 1 and memory.gathers[gather] > self.usable_bytes:
                break  # more ranks do not make a copy smaller
        return None

    def _shard_sizes(self) -> Iterable[int]:
        """Return the numbers of ranks that could hold a replica, in ascending order."""
        if not self._spec.is_sharded:
            return [1]
        if self._spec.needs_same_batch:  # ranks share the heads
            heads = self.model.config.get_text_config().num_attention_heads
            return [size for size in range(1, heads + 1) if heads % size == 0]
        return [*range(1, 16), *range(16, _MOST_RANKS + 1, 8)]

    def _memory(self, footprint: RankFootprint) -> RankMemory:
        """Compute the memory of a rank that has a footprint."""
        config, itemsize = self.config, self.dtype.itemsize
        held = {name: size for name, size in footprint.held.items() if name in self._trained}
        trained = sum(held.values())
        master_itemsize = torch.float32.itemsize if config.weights.master == "float32" else itemsize
        num_states = len(optimizer_of(config.es).state_names)
        kept = [
            {name: size * each for name, size in held.items()}
            for each in (master_itemsize, *num_states * [torch.float32.itemsize])
        ]
        is_on_host = config.weights.master_device == "cpu"
        chunk_bytes = CHUNK_ELEMENTS * (master_itemsize + num_states * torch.float32.itemsize)
        is_split, load = self._spec.needs_same_batch, self.workload
        wanted: dict[str, Any] = {
            "rows": load.micro_batch_rows * self._members_per_forward,
            "length": load.prompt_tokens + load.answer_tokens,
            "dtype": self.dtype,
            "num_sharers": footprint.num_ranks if is_split else 1,
        }
        cache = cache_bytes(self.model.config, **wanted)
        if load.answer_tokens:
            generating = generation_bytes(self.model.config, **wanted, prompt_length=load.prompt_tokens)
        else:
            generating = likelihood_bytes(self.model.config, **wanted)
        reserved = config.rollout.kv_cache_gib
        return RankMemory(
            working=sum(footprint.held.values()) * itemsize,
            master=trained * master_itemsize,
            optimizer=trained * num_states * torch.float32.itemsize,
            passing=chunk_bytes if is_on_host else 0,
            pinned=sum(map(pinned_bytes, kept)) if is_on_host else 0,
            gathers=self._gather_bytes(footprint),
            gather_buffers=footprint.gather_buffer_bytes(itemsize, device_type=self.machine.device_type)
            if self._spec.is_sharded and not is_split
            else 0,
            cache=cache if reserved is None else int(reserved * 2**30),
            activations=generating - cache,
            update=self._update_bytes(held, master_itemsize),
            process=self.machine.process_bytes,
            fragments=self._fragment_bytes(footprint),
        )

    def _fragment_bytes(self, footprint: RankFootprint) -> int:
        """Compute the memory of gathered layers that a process keeps when they are freed.

        They are freed between tensors that live longer, so the C library keeps their places: in the end about
        as much as the model has (benchmarks/plan-smollm2-cpu.json).
        """
        if self.machine.process_bytes == 0 or footprint.gathered == 0 or footprint.num_ranks == 1:
            return 0
        return self.num_parameters * self.dtype.itemsize

    def _update_bytes(self, held: Mapping[str, int], master_itemsize: int) -> int:
        """Compute the bytes that an update takes temporarily, a part of a parameter at a time.

        The plain step of a float32 master adds noise in place. Otherwise there is the gradient, and Adam's
        intermediate results; an update that is measured has the last step, and masters before and at first.
        """
        config, es, optimizer = self.config, self.config.es, optimizer_of(self.config.es)
        is_measured = config.log.instruments_every > 0
        is_one_sum = isinstance(optimizer, PlainStep) and es.weight_decay == 0 and es.member_reuse is None
        if is_one_sum and not is_measured and master_itemsize == 4:
            return 0
        itemsize = torch.float32.itemsize * (3 if len(optimizer.state_names) > 1 else 1)
        size, sums = min(max(held.values(), default=0), STEP_ELEMENTS), 0
        if is_measured:
            itemsize += torch.float32.itemsize + 2 * master_itemsize
            sums = min(size, NUM_AT_ONCE[self.machine.device_type]) * BYTES_AT_ONCE
            if self._spec.needs_same_batch:  # the base model's rows are read whole
                sums = max(sums, min(BLOCK_BYTES, 4 * max(self._sizes.values())))
        return size * itemsize + sums

    def _gather_bytes(self, footprint: RankFootprint) -> dict[str, int]:
        """Compute the bytes that each value of ``rollout.gather`` takes besides what is held at all times."""
        itemsize = self.dtype.itemsize
        is_sharded = self._spec.is_sharded and footprint.num_ranks > 1
        copy = footprint.whole * itemsize * self._spec.is_sharded
        if self.config.rollout.is_batched:
            held = {"iteration": copy * is_sharded}
        else:
            held = mode_bytes(copy=copy, centre=self.num_trained * itemsize, is_sharded=is_sharded)
            held.setdefault("iteration", held["member"])  # of one rank, which gathers nothing
        held["layer"] = footprint.gathered * itemsize
        return {gather: size for gather, size in held.items() if gather in self._spec.gathers}

    def with_rows_found(self) -> "Plan":
        """Return the plan for the micro-batches that ``rollout.micro_batch_size: auto`` is expected to find.

        As in a run, ``rollout.gather`` is chosen before, and the first try gives work to all ranks that share
        a member's prompts; then half as many rows are tried, until they fit.
        """
        gather, load = self.chosen_gather, self.workload
        if gather is None:
            return self
        rows = -(-load.num_sequences // self._num_sharers(gather))
        while True:
            guess = f"{rows} prompts in a forward, by the formula (rollout.micro_batch_size: auto tries)"
            found = copy(self)
            found.workload = replace(load, micro_batch_rows=rows, assumed=(*load.assumed, guess))
            found.memory = found._memory(found._footprint(found.shard_size))
            if found.fits(gather) or rows == 1:
                return found
            rows = -(-rows // 2)

    def _is_apart(self, gather: str) -> bool:
        """Return whether each rank has members of its own."""
        is_batched = self.config.rollout.is_batched
        return (gather == "iteration" or is_batched) and not self._spec.needs_same_batch

    def _num_sharers(self, gather: str) -> int:
        """Return the number of ranks among which a member's micro-batches are divided."""
        return 1 if self._is_apart(gather) or self._spec.needs_same_batch else self.shard_size

    def cost(self, gather: str) -> GatherCost:
        """Estimate the cost of an iteration to a rank, if every answer is as long as it may be."""
        load, machine, ranks = self.workload, self.machine, self.shard_size
        is_split, is_apart = self._spec.needs_same_batch, self._is_apart(gather)
        num_teams = self.world_size if is_apart else self.num_replicas
        together = self._members_per_forward
        num_members = -(-load.num_members // (num_teams * together))
        num_batches = -(-load.num_sequences // load.micro_batch_rows)
        num_batches = -(-num_batches // self._num_sharers(gather))
        num_batches *= num_members
        num_steps = max(load.answer_tokens - 1, 0)
        num_prefixes = num_members if load.prefix_tokens > 0 else 0
        num_forwards = num_batches * (1 + num_steps) + num_prefixes
        rows, config = load.micro_batch_rows * together, self.model.config.get_text_config()
        num_tokens = num_batches * rows * (load.computed_tokens + num_steps)
        itemsize, share = self.dtype.itemsize, (ranks - 1) / ranks
        if ranks == 1 or not self._spec.is_sharded:
            num_gathers, received = 0, 0.0
        elif is_split:
            num_gathers = 0
            reductions = 2 * config.num_hidden_layers * config.hidden_size * itemsize
            received = 2 * share * reductions * num_tokens
        else:
            num_gathers = {"iteration": 1, "member": num_members}.get(gather, num_forwards)
            received = num_gathers * self.num_parameters * itemsize * share
        rate, seconds = machine.gather_bytes_per_second, 0.0
        if gather == "layer" and ranks > 1:
            seconds = num_forwards * self._footprint(ranks).num_collectives * machine.collective_seconds
            rate = rate if is_split else machine.collective_bytes_per_second
        seconds += received / rate
        timer = ForwardTimer(
            self.model,
            machine=machine,
            dtype=self.dtype,
            num_sharers=ranks if is_split else 1,
            has_terms=self.config.rollout.is_batched,
        )
        seconds += num_batches * self._batch_seconds(timer, rows)
        if num_prefixes:
            prefix = load.prefix_tokens
            seconds += num_prefixes * timer.seconds(Forward(together, prefix, prefix / 2))
        seconds += self._noise_seconds(num_members * together, is_whole=is_apart or not self._spec.is_sharded)
        return GatherCost(num_gathers, received, seconds)

    def _batch_seconds(self, timer: ForwardTimer, rows: int) -> float:
        """Estimate the seconds of the forwards of a micro-batch of so many rows."""
        load = self.workload
        if load.answer_tokens == 0:
            return timer.seconds(
                Forward(rows, load.computed_tokens, load.computed_tokens / 2, load.computed_tokens)
            )
        seconds = timer.seconds(Forward(rows, load.computed_tokens, load.prompt_tokens))
        # Captured steps of GPUs read all that is kept of a row, others what is there.
        longest = load.prompt_tokens + load.answer_tokens
        context = longest if self.machine.device_type == "cuda" else (load.prompt_tokens + longest) / 2
        return seconds + (load.answer_tokens - 1) * timer.seconds(Forward(rows, 1, context))

    def _noise_seconds(self, num_members: int, *, is_whole: bool) -> float:
        """Estimate the seconds in which a rank perturbs weights for its members, updates and digests them.

        Args:
            num_members: Number of members that this rank takes part in.
            is_whole: Whether it perturbs a whole model, instead of its shards.
        """
        es, ranks = self.config.es, self.shard_size
        own = self.num_trained / ranks
        num_directions = self.workload.num_members / (2 if es.antithetic else 1)
        perturbed = 0.0
        if not self.config.rollout.is_batched:
            perturbed = num_members * (self.num_trained if is_whole else own)
        seconds = noise_seconds(perturbed, num_directions * own, es=es, machine=self.machine)
        return seconds + own / self.machine.noise_elements_per_second
