"""The engine ``vllm``: vLLM schedules, batches and caches; members are written into its weights in place."""

from collections.abc import Sequence
from typing import Any

import torch

from shardes.backends.vllm.backend import VllmBackend
from shardes.config.schema import RolloutConfig
from shardes.distributed.group import Group, Mesh
from shardes.es.update import Perturbation
from shardes.models.build import end_tokens
from shardes.rollout.batching import LikelihoodBatch, MicroBatch
from shardes.rollout.engines.base import Completions, Engine
from shardes.rollout.engines.vllm.adapter_slots import AdapterSlots
from shardes.rollout.engines.vllm.finite import FiniteLogits
from shardes.rollout.engines.vllm.requests import Request, RequestLoop
from shardes.rollout.lowrank.check import check_agreement
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.stop_strings import make_stop_strings
from shardes.utils.timers import PhaseTimer
from shardes.weights.master import Weights

# Random numbers of an answer that make up the seed of its request: 24 bits each.
_NUM_SEED_NUMBERS = 2
# Parameters of requests whose tokens' log-likelihoods are wanted: an engine generates at least one token.
_SCORING = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "flat_logprobs": True}
# Tokens by which adapters are compared with weights.
_NUM_CHECKED_TOKENS = 16


class VllmEngine(Engine):
    """Generates and scores with the vLLM engine that holds the backend's shards.

    All micro-batches of a member are requests at the same time, so the engine never waits for the last rows
    of one before it begins the next. Seeds of drawn answers follow from the same random numbers as elsewhere:
    they depend on the iteration, the prompt and the sample alone, so that all members are judged with the
    same ones.

    Args:
        backend: The model.
        weights: Its master weights.
        mesh: The ranks.
        tokenizer: The model's tokenizer.
        settings: How prompts are answered.
        seed: Key of the run's random numbers; unused, as micro-batches bring them.
        timer: Where the time goes.
        shared: Another engine's requests and logits over the same backend; None: new ones.

    Raises:
        UserError: The settings ask for what vLLM does not do here.
    """

    is_exact = False

    def __init__(
        self,
        *,
        backend: VllmBackend,
        weights: Weights,
        mesh: Mesh,
        tokenizer: Any,
        settings: RolloutConfig,
        seed: int,
        timer: PhaseTimer,
        shared: tuple[RequestLoop, FiniteLogits, AdapterSlots | None] | None = None,
    ) -> None:
        assert settings.members_per_forward != "auto", "the engine was not started"
        self.members_per_forward = settings.members_per_forward
        self._backend, self._weights, self._mesh, self._timer = backend, weights, mesh, timer
        self._parts: dict[str, Any] = {"backend": backend, "weights": weights, "mesh": mesh}
        self._parts |= {"tokenizer": tokenizer, "seed": seed, "timer": timer}
        self._settings = settings
        self._requests, self._finite, self._slots = shared or self._attach()
        self._num_members = 0
        self._eos_ids = end_tokens(backend.sharded_model, tokenizer)
        self._stop = make_stop_strings(settings, tokenizer)
        self._in_flight: dict[int, tuple[MicroBatch | LikelihoodBatch, list[Request]]] = {}

    def _attach(self) -> tuple[RequestLoop, FiniteLogits, AdapterSlots | None]:
        """Return what belongs to the backend's engine rather than to settings: made once."""
        backend, count = self._backend, self.members_per_forward
        requests = RequestLoop(backend.llm, timeout_seconds=backend.timeout_seconds)
        if count == 1:
            return requests, FiniteLogits(backend.model), None
        slots = AdapterSlots(backend, self._weights, count=count)
        finite = FiniteLogits(backend.model, slot_of_rows=lambda: slots.slot_of_rows, num_slots=count)
        return requests, finite, slots

    def with_settings(self, settings: RolloutConfig) -> "VllmEngine":
        """Return an engine over the same weights that answers by other settings."""
        shared = self._requests, self._finite, self._slots
        return VllmEngine(settings=settings, shared=shared, **self._parts)

    @property
    def facts(self) -> dict[str, Any]:
        """Return vLLM's version, the dtype and the number of ranks, which decide the last bits of logits."""
        import vllm

        return {
            "version": vllm.__version__,
            "device": self._mesh.world.device.type,
            "dtype": str(self._backend.dtype).removeprefix("torch."),
            "tensor_parallel_size": self._mesh.shard.world_size,
            "batch_invariant": self._settings.batch_invariant,
        }

    @property
    def group(self) -> Group:
        """Return the ranks of a replica, which answer together."""
        return self._mesh.shard

    @property
    def forward_is_collective(self) -> bool:
        """Return whether a replica has several ranks, which compute parts of the same forwards."""
        return self._mesh.shard.world_size > 1

    @property
    def ranks_per_forward(self) -> int:
        """Return the size of a replica."""
        return self._mesh.shard.world_size

    @property
    def gather(self) -> str:
        """Return ``layer``: each rank keeps its part of every layer."""
        return "layer"

    @property
    def num_prefilled_tokens(self) -> int:
        """Return how many tokens of prompts were not in vLLM's prefix cache, which spans a member's turns."""
        return self._requests.num_prefilled_tokens

    def begin(self, num_bytes: int) -> None:
        """Write the centre if members are adapters; the engine's memory was taken when it was started."""
        if self._slots is not None:
            self.load_centre()

    def check(self, *, sigma: float) -> None:
        """Compare members as adapters with members as weights, by the likelihood of some tokens.

        Raises:
            UserError: They differ by more than rounding explains.
        """
        if self._slots is None:
            return
        config: Any = self._backend.sharded_model.config
        vocabulary = config.get_text_config().vocab_size
        ids = [1 + place % (vocabulary - 1) for place in range(_NUM_CHECKED_TOKENS)]

        def scores(adapters: Sequence[Any]) -> torch.Tensor:
            requests = [self._requests.add(ids, _SCORING, adapter=adapter) for adapter in adapters]
            self._requests.finish(requests)
            return torch.stack([request.scores for request in requests]).double()

        members = [Perturbation(0, 0, sigma), Perturbation(0, 1, -sigma)]
        as_weights = []
        for member in members:
            self._weights.perturb(member)
            self._forget(0)
            as_weights.append(scores([None]))
        self.load_centre()
        centre = scores([None])
        self.load(members)
        check_agreement(
            scores(self._slots.requests[: len(members)]),
            wanted=torch.cat(as_weights),
            centre=centre,
            dtype=self._backend.dtype,
            world=self._mesh.world,
            what="likelihoods",
        )

    def load(self, members: Sequence[Perturbation]) -> None:
        """Write a member into vLLM's parameters, or several into its adapters, and have it forget its caches.

        With adapters the parameters are the centre's, see ``begin``.
        """
        with self._timer("perturb"):
            if self._slots is None:
                (member,) = members
                self._weights.perturb(member)
                self._forget(0)
            else:
                self._slots.fill(members)
                self._forget(len(members))

    def load_centre(self) -> None:
        """Write the centre; otherwise as ``load``."""
        self._weights.centre()
        self._forget(0)

    def _forget(self, num_members: int) -> None:
        self._num_members = num_members
        self._in_flight = {}
        self._requests.forget()
        if not self._finite.is_finite:
            # Kernels multiply what they mask by zero, which leaves a NaN in a block that is used again.
            for cache in self._backend.caches:
                cache.zero_()
        self._finite.reset()

    def expect(self, batches: Sequence[MicroBatch | LikelihoodBatch]) -> None:
        """Request the answers of all micro-batches at once."""
        for batch in batches:
            self._request(batch)

    def generate(self, batch: MicroBatch, *, prompts: PromptBatch) -> Completions:
        """Return the completions of a micro-batch, while those of others go on."""
        requests = self._finished(batch)
        answers = [self._cut(request.tokens) for request in requests]
        of_members = self._finite.of_slots(self._num_members)
        return Completions(answers, of_members * (len(answers) // len(of_members)))

    def log_likelihood(self, batch: LikelihoodBatch) -> list[torch.Tensor]:
        """Return the log-likelihoods of given completions, which vLLM reads as parts of prompts."""
        requests, batch = self._finished(batch), batch.for_members(max(self._num_members, 1))
        rows = zip(batch.prompt_lengths, batch.lengths, requests, strict=True)
        return [request.scores[start - 1 : end - 1] for start, end, request in rows]

    def _finished(self, batch: MicroBatch | LikelihoodBatch) -> list[Request]:
        """Return the requests of a micro-batch, once they are done."""
        if id(batch) not in self._in_flight:
            self._request(batch)
        _, requests = self._in_flight.pop(id(batch))
        self._requests.finish(requests)
        return requests

    def _request(self, batch: MicroBatch | LikelihoodBatch) -> None:
        """Add a request for each row of a micro-batch and each member, side by side."""
        of_members, key = batch.for_members(max(self._num_members, 1)), id(batch)
        if isinstance(of_members, LikelihoodBatch):
            self._in_flight[key] = batch, self._score(of_members)
        else:
            self._in_flight[key] = batch, self._complete(of_members)

    def _adapters(self, num_rows: int) -> Sequence[Any]:
        """Return the adapter of each row of a micro-batch; None: none."""
        if self._slots is None or not self._num_members:
            return [None] * num_rows
        return [self._slots.requests[row % self._num_members] for row in range(num_rows)]

    def _complete(self, batch: MicroBatch) -> list[Request]:
        """Add a request for each row, to be completed."""
        settings, width = self._settings, batch.input_ids.shape[1]
        parameters: dict[str, Any] = {"temperature": settings.temperature, "stop_token_ids": self._eos_ids}
        if settings.temperature > 0:
            parameters |= {"top_k": settings.top_k or 0, "top_p": settings.top_p}
        rows, budgets = batch.input_ids.tolist(), [settings.max_new_tokens] * len(batch.rows)
        if batch.budgets is not None:
            budgets = batch.budgets.tolist()
        requests, adapters = [], self._adapters(len(rows))
        for i, (row, length, budget) in enumerate(zip(rows, batch.lengths, budgets, strict=True)):
            own: dict[str, Any] = {"max_tokens": budget}
            if batch.uniforms is not None and batch.uniforms[i, 0] < 0:
                own["temperature"] = 0.0
            elif batch.uniforms is not None:
                own["seed"] = _seed(batch.uniforms[i])
            stop = self._stop if self._stop else None
            prompt = row[width - length :]
            requests.append(self._requests.add(prompt, parameters | own, stop=stop, adapter=adapters[i]))
        return requests

    def _score(self, batch: LikelihoodBatch) -> list[Request]:
        """Add a request for each row, whose tokens' log-likelihoods are wanted."""
        rows = zip(batch.input_ids.tolist(), batch.lengths, self._adapters(len(batch.rows)), strict=True)
        return [self._requests.add(row[:length], _SCORING, adapter=adapter) for row, length, adapter in rows]

    def _cut(self, tokens: list[int]) -> list[int]:
        """Cut an answer after the text that ended it."""
        end = self._stop.find(tokens) if self._stop else None
        return tokens if end is None else tokens[:end]

    def bytes_for(self, batch: MicroBatch | LikelihoodBatch) -> int:
        """Return 0: vLLM has its memory already, and has rows wait that it does not hold."""
        return 0

    def fits(self, batch: MicroBatch | LikelihoodBatch, *, prompts: PromptBatch) -> bool:
        """Return True: vLLM has rows wait that it does not hold."""
        return True

    def release(self) -> None:
        """End what is in flight."""
        self._in_flight = {}
        self._requests.abandon()


def _seed(uniforms: torch.Tensor) -> int:
    """Return the seed of an answer: the bits of its first random numbers, which are multiples of 2**-24."""
    seed = 0
    for value in uniforms[:_NUM_SEED_NUMBERS].tolist():
        seed = seed << 24 | int(value * 2**24)
    return seed
