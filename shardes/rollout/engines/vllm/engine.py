"""The engine ``vllm``: vLLM schedules, batches and caches; members are written into its weights in place."""

from collections.abc import Sequence
from typing import Any

import torch

from shardes.backends.vllm.backend import VllmBackend
from shardes.config.schema import RolloutConfig
from shardes.distributed.group import Group, Mesh
from shardes.errors import UserError
from shardes.es.update import Perturbation
from shardes.models.build import end_tokens
from shardes.rollout.batching import LikelihoodBatch, MicroBatch
from shardes.rollout.engines.base import Completions, Engine
from shardes.rollout.engines.vllm.finite import FiniteLogits
from shardes.rollout.engines.vllm.requests import Request, RequestLoop
from shardes.rollout.prompts import PromptBatch
from shardes.rollout.stop_strings import make_stop_strings
from shardes.utils.timers import PhaseTimer
from shardes.weights.master import Weights

# Random numbers of an answer that make up the seed of its request: 24 bits each.
_NUM_SEED_NUMBERS = 2


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
    members_per_forward = 1

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
        shared: tuple[RequestLoop, FiniteLogits] | None = None,
    ) -> None:
        if settings.is_batched:
            raise UserError(
                f"rollout.members_per_forward: got {settings.members_per_forward}; rollout.engine: vllm "
                "evaluates members one by one: set it to 1"
            )
        self._backend, self._weights, self._mesh, self._timer = backend, weights, mesh, timer
        self._parts: dict[str, Any] = {"backend": backend, "weights": weights, "mesh": mesh}
        self._parts |= {"tokenizer": tokenizer, "seed": seed, "timer": timer}
        self._settings = settings
        self._requests, self._finite = shared or (
            RequestLoop(backend.llm, timeout_seconds=backend.timeout_seconds),
            FiniteLogits(backend.model),
        )
        self._eos_ids = end_tokens(backend.sharded_model, tokenizer)
        self._stop = make_stop_strings(settings, tokenizer)
        self._in_flight: dict[int, tuple[MicroBatch | LikelihoodBatch, list[Request]]] = {}

    def with_settings(self, settings: RolloutConfig) -> "VllmEngine":
        """Return an engine over the same weights that answers by other settings."""
        return VllmEngine(settings=settings, shared=(self._requests, self._finite), **self._parts)

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

    def begin(self, num_bytes: int) -> None:
        """Do nothing: the engine's memory was taken when it was started."""

    def load(self, members: Sequence[Perturbation]) -> None:
        """Write a member into vLLM's parameters, and have it forget what it has computed."""
        (member,) = members
        with self._timer("perturb"):
            self._weights.perturb(member)
            self._forget()

    def load_centre(self) -> None:
        """Write the centre; otherwise as ``load``."""
        self._weights.centre()
        self._forget()

    def _forget(self) -> None:
        self._in_flight = {}
        self._requests.forget()
        self._finite.reset()

    def expect(self, batches: Sequence[MicroBatch | LikelihoodBatch]) -> None:
        """Request the answers of all micro-batches at once."""
        for batch in batches:
            self._request(batch)

    def generate(self, batch: MicroBatch, *, prompts: PromptBatch) -> Completions:
        """Return the completions of a micro-batch, while those of others go on."""
        requests = self._finished(batch)
        answers = [self._cut(request.tokens) for request in requests]
        return Completions(answers, [self._finite.is_finite] * len(answers))

    def log_likelihood(self, batch: LikelihoodBatch) -> list[torch.Tensor]:
        """Return the log-likelihoods of given completions, which vLLM reads as parts of prompts."""
        scores = []
        for start, end, request in zip(
            batch.prompt_lengths, batch.lengths, self._finished(batch), strict=True
        ):
            assert request.prompt_logprobs is not None, "it was asked for"
            scores.append(request.prompt_logprobs[start - 1 : end - 1])
        return scores

    def _finished(self, batch: MicroBatch | LikelihoodBatch) -> list[Request]:
        """Return the requests of a micro-batch, once they are done."""
        if id(batch) not in self._in_flight:
            self._request(batch)
        _, requests = self._in_flight.pop(id(batch))
        self._requests.finish(requests)
        return requests

    def _request(self, batch: MicroBatch | LikelihoodBatch) -> None:
        if isinstance(batch, LikelihoodBatch):
            self._in_flight[id(batch)] = batch, self._score(batch)
        else:
            self._in_flight[id(batch)] = batch, self._complete(batch)

    def _complete(self, batch: MicroBatch) -> list[Request]:
        """Add a request for each row, to be completed."""
        settings, width = self._settings, batch.input_ids.shape[1]
        parameters: dict[str, Any] = {"temperature": settings.temperature, "stop_token_ids": self._eos_ids}
        if settings.temperature > 0:
            parameters |= {"top_k": settings.top_k or 0, "top_p": settings.top_p}
        rows, budgets = batch.input_ids.tolist(), [settings.max_new_tokens] * len(batch.rows)
        if batch.budgets is not None:
            budgets = batch.budgets.tolist()
        requests = []
        for i, (row, length, budget) in enumerate(zip(rows, batch.lengths, budgets, strict=True)):
            own = {"max_tokens": budget}
            if batch.uniforms is not None:
                own["seed"] = _seed(batch.uniforms[i])
            stop = self._stop if self._stop else None
            requests.append(self._requests.add(row[width - length :], parameters | own, stop=stop))
        return requests

    def _score(self, batch: LikelihoodBatch) -> list[Request]:
        """Add a request for each row, whose tokens' log-likelihoods are wanted."""
        # An engine generates at least one token.
        parameters = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0, "flat_logprobs": True}
        return [
            self._requests.add(row[:length], parameters)
            for row, length in zip(batch.input_ids.tolist(), batch.lengths, strict=True)
        ]

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
