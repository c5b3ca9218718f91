"""The engine ``transformers``: the model's own forward, in a decode loop in this process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shardes.backends.base import Backend
from shardes.config.schema import RolloutConfig
from shardes.distributed.group import Group, Mesh
from shardes.es.update import Perturbation
from shardes.models.build import end_tokens, pad_token
from shardes.rollout.batching import IDLE_COHORT, LikelihoodBatch, MicroBatch
from shardes.rollout.engines.base import Completions, Engine
from shardes.rollout.engines.transformers.attention import choose_attention, warn_of_repeated_heads
from shardes.rollout.engines.transformers.decoder import Decoder
from shardes.rollout.engines.transformers.kv_cache import make_slab
from shardes.rollout.engines.transformers.likelihood import log_likelihoods
from shardes.rollout.engines.transformers.rows import OnRows, prefill_parts
from shardes.rollout.gather_modes import BatchedGather, GatherModeSelector
from shardes.rollout.lowrank.check import check_hooks
from shardes.rollout.memory import (
    cache_bytes,
    free_bytes,
    generation_bytes,
    is_shortage,
    likelihood_bytes,
    reserved_bytes,
)
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.sampling import make_sampler
from shardes.rollout.stop_strings import make_stop_strings
from shardes.utils.timers import PhaseTimer
from shardes.weights.master import Weights


class TransformersEngine(Engine):
    """Generates with the backend's model, or with a whole model that is gathered from it.

    Args:
        backend: The model.
        weights: Its master weights.
        mesh: The ranks.
        tokenizer: The model's tokenizer.
        settings: How prompts are answered.
        seed: The key of the run's random numbers.
        timer: Where the time goes.
        gather_modes: Another engine's, to share what it has gathered; None: its own, by ``settings``.
    """

    is_exact = True

    def __init__(
        self,
        *,
        backend: Backend,
        weights: Weights,
        mesh: Mesh,
        tokenizer: Any,
        settings: RolloutConfig,
        seed: int,
        timer: PhaseTimer,
        gather_modes: GatherModeSelector | None = None,
    ) -> None:
        self._backend, self._weights, self._mesh, self._timer = backend, weights, mesh, timer
        self._parts = {"backend": backend, "weights": weights, "mesh": mesh, "tokenizer": tokenizer}
        self._parts |= {"seed": seed, "timer": timer}
        self._max_new_tokens = settings.max_new_tokens
        count = settings.members_per_forward
        self.members_per_forward = 1 if count == "auto" else count
        self._modes = gather_modes or GatherModeSelector(
            settings.gather, is_batched=settings.is_batched, backend=backend, weights=weights, mesh=mesh
        )
        self._decoder = Decoder(
            eos_ids=end_tokens(backend.sharded_model, tokenizer),
            pad_id=pad_token(backend.sharded_model, tokenizer),
            max_new_tokens=settings.max_new_tokens,
            stop=make_stop_strings(settings, tokenizer),
            sampling=make_sampler(settings, seed=seed),
        )
        choose_attention(uses_cudnn=settings.cudnn_attention)
        if gather_modes is None and mesh.world.is_main:
            warn_of_repeated_heads(backend.sharded_model.config, backend.device)
        self._model: nn.Module | None = None
        self._num_members, self._has_hooks, self._is_fresh = 1, False, True

    def with_settings(self, settings: RolloutConfig) -> "TransformersEngine":
        """Return an engine over the same weights, gathered once for both, that answers by other settings."""
        return TransformersEngine(settings=settings, gather_modes=self._modes, **self._parts)

    @property
    def group(self) -> Group:
        """Return the ranks that load and answer together."""
        return self._modes.current.group

    @property
    def forward_is_collective(self) -> bool:
        """Return whether the layers are gathered, or split over the ranks, in every forward."""
        return self._modes.current.forward_is_collective

    @property
    def ranks_per_forward(self) -> int:
        """Return the size of a replica where its ranks split each layer, otherwise 1."""
        return self._mesh.shard.world_size if self._backend.needs_same_batch else 1

    @property
    def num_loads(self) -> int:
        """Return the number of ranks where each has its own members in forwards that gather for all."""
        mode = self._modes.current
        is_own = isinstance(mode, BatchedGather) and not self._backend.needs_same_batch
        return mode.group.world_size if is_own else 1

    @property
    def gather(self) -> str | None:
        """Return the gather mode's name; None before ``begin`` where memory decides."""
        return self._modes.name

    @property
    def can_step_down(self) -> bool:
        """Return whether a gather mode that takes less memory may be chosen."""
        return self._modes.can_step_down

    @property
    def num_prefilled_tokens(self) -> int:
        """Return how many tokens of prompts were computed so far."""
        return self._decoder.num_prefilled_tokens

    def expect_cohorts(self, count: int, *, size: int, max_context: int) -> None:
        """Keep no more than so many cohorts, and grow the cache no further than contexts do."""
        self._decoder.kept.most = count
        self._decoder.max_rows, self._decoder.max_context = size, max_context

    def begin(self, num_bytes: int) -> None:
        """Choose the gather mode if that is still to do, and gather what serves all members; a collective."""
        self._modes.choose(num_bytes)
        with self._timer("gather"):
            self._modes.current.begin()

    def check(self, *, sigma: float) -> None:
        """Compare members that share a forward with members by themselves; a collective of all ranks.

        Raises:
            UserError: Their logits differ by more than rounding explains.
        """
        mode = self._modes.current
        if isinstance(mode, BatchedGather):
            check_hooks(
                mode, backend=self._backend, weights=self._weights, world=self._mesh.world, sigma=sigma
            )

    def load(self, members: Sequence[Perturbation]) -> None:
        """Perturb the weights, or fill the low-rank factors of members that share forwards."""
        self._decoder.kept.forget()
        with self._timer("perturb"):
            self._modes.current.load(members)
        self._loaded(len(members))

    def load_centre(self) -> None:
        """Make the model the centre."""
        self._decoder.kept.forget()
        self._modes.current.load_centre()
        self._loaded(0)

    def _loaded(self, num_members: int) -> None:
        with self._timer("gather"):
            self._model = self._modes.current.model()
        self._num_members, self._is_fresh = max(num_members, 1), True
        self._has_hooks = num_members > 0 and isinstance(self._modes.current, BatchedGather)

    def generate(self, batch: MicroBatch, *, prompts: PromptBatch) -> Completions:
        """Generate with the decode loop; what all prompts begin with is computed once after a load.

        Where keys and values of episodes are in the way, these are computed anew instead.
        """
        # Other ranks would not make the same forwards again.
        may_repeat = bool(self._decoder.kept) and not self.forward_is_collective
        try:
            return self._generate(batch, prompts)
        except (RuntimeError, MemoryError) as error:
            if not (may_repeat and is_shortage(error)):
                raise
        self._decoder.kept.give_up()
        return self._generate(batch, prompts)

    def _generate(self, batch: MicroBatch, prompts: PromptBatch) -> Completions:
        assert self._model is not None, "load comes first"
        batch = batch.for_members(self._num_members)
        with self._hooks() as on_rows:
            if self._is_fresh:
                prefix = prompts.prefix
                if prefix is not None:
                    prefix = prefix.expand(batch.num_members, -1)
                self._decoder.begin(self._model, prefix, on_rows=on_rows)
                self._is_fresh = False
            return self._decoder.decode(
                self._model,
                batch,
                any_rank=self._any_rank,
                is_split=self._backend.needs_same_batch,
                num_prefills=self._num_prefills(prompts) if self.forward_is_collective else 1,
                on_rows=on_rows,
            )

    def log_likelihood(self, batch: LikelihoodBatch) -> list[torch.Tensor]:
        """Score completions in one forward."""
        assert self._model is not None, "load comes first"
        batch = batch.for_members(self._num_members)
        with self._hooks() as on_rows:
            if on_rows is not None:
                on_rows(torch.arange(len(batch.rows), device=batch.input_ids.device))
            return log_likelihoods(self._model, batch)

    @contextmanager
    def _hooks(self) -> Iterator[OnRows | None]:
        """Have the model compute the loaded members' outputs, if these share forwards."""
        mode = self._modes.current
        if not (self._has_hooks and isinstance(mode, BatchedGather)):
            yield None
            return
        assert self._model is not None, "load comes first"
        with mode.hooks.on(self._model):
            yield mode.hooks.on_rows

    @property
    def _any_rank(self) -> Callable[[bool], bool] | None:
        """Return the collective "or" of the ranks that go on together; None if this rank goes by itself."""
        return self._mesh.shard.any if self.forward_is_collective else None

    def _num_prefills(self, prompts: PromptBatch) -> int:
        """Return the most forwards that a micro-batch takes before its first token, on any rank."""
        count = self.members_per_forward if self._has_hooks else 1
        batches = [batch for batch in prompts.micro_batches if isinstance(batch, MicroBatch)]
        return max((len(prefill_parts(batch.lengths, num_members=count)) for batch in batches), default=1)

    def bytes_for(self, batch: MicroBatch | LikelihoodBatch) -> int:
        """Return about how many bytes caches, activations and logits take, by a formula."""
        config: Any = self._backend.sharded_model.config
        rows, width = batch.input_ids.shape
        rows *= self.members_per_forward
        kept = self._kept_bytes(batch)
        dtype, num_sharers = self._backend.dtype, self.ranks_per_forward
        if isinstance(batch, LikelihoodBatch):
            return likelihood_bytes(config, rows=rows, length=width, dtype=dtype, num_sharers=num_sharers)
        return kept + generation_bytes(
            config,
            rows=rows,
            length=width + self._max_new_tokens,
            dtype=dtype,
            num_sharers=num_sharers,
            prompt_length=width,
        )

    def _kept_bytes(self, batch: MicroBatch | LikelihoodBatch) -> int:
        """Return the bytes that episodes take besides, if all cohorts are like this batch."""
        config: Any = self._backend.sharded_model.config
        if isinstance(batch, LikelihoodBatch) or batch.cohort is None or self.members_per_forward > 1:
            return 0
        if make_slab(config) is None:
            return 0
        rows, width = batch.input_ids.shape
        length = (self._decoder.kept.most or 0) * (width + self._max_new_tokens)
        length += self._max_new_tokens  # by which the cache grows beyond the largest context
        dtype, num_sharers = self._backend.dtype, self.ranks_per_forward
        return cache_bytes(config, rows=rows, length=length, dtype=dtype, num_sharers=num_sharers)

    def fits(self, batch: MicroBatch | LikelihoodBatch, *, prompts: PromptBatch) -> bool:
        """Return whether this rank has the memory for a micro-batch; a collective of ``group``.

        Trying is no choice where too much memory ends the process instead of raising an error, or where the
        other ranks would wait for the rest of a collective: then the formula has to do.
        """
        device = self._mesh.world.device
        is_collective = self.forward_is_collective
        usable = free_bytes(device) - reserved_bytes(device)
        if (device.type == "cpu" or is_collective) and self.bytes_for(batch) > usable:
            return False
        if is_collective:
            return True
        batch = batch.for_members(self.members_per_forward)
        try:
            model = self._modes.current.model()
            if isinstance(batch, LikelihoodBatch):
                log_likelihoods(model, batch)
            else:
                if batch.cohort is not None:
                    batch = replace(batch, cohort=IDLE_COHORT)
                others = torch.empty(self._kept_bytes(batch), dtype=torch.uint8, device=device)
                self._decoder.begin(model, prompts.prefix)
                self._decoder.decode(model, batch, most_tokens=2)
                del others
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            return False
        finally:
            self.release()
        return True

    def step_down(self) -> None:
        """Go on with the gather mode that takes less memory; a collective of all ranks."""
        self.release()
        self._modes.step_down()

    def release(self) -> None:
        """Free the decode loop's caches."""
        self._decoder.release()
        self._is_fresh = True
