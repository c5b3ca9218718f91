"""Requests to a vLLM engine in this process: added, stepped until they are done, and never left behind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from shardes.errors import UserError
from shardes.rollout.engines.vllm.step_limit import StepLimit
from shardes.rollout.stop_strings import GrowingAnswer, StopStrings

# Tokens between two looks for texts that end an answer.
TOKENS_PER_CHECK = 8


@dataclass
class Request:
    """A request in flight, or done.

    Attributes:
        tokens: Token ids of the answer so far.
        is_done: Whether there will be no more.
        num_unread: Tokens of the prompt that are not known to be computed; 0 once they are.
        prompt_logprobs: Log-likelihood of each token of the prompt but the first, float32 of shape [tokens -
            1]; None if it was not asked for, or is not known yet.
    """

    tokens: list[int] = field(default_factory=list)
    is_done: bool = False
    num_unread: int = 0
    prompt_logprobs: torch.Tensor | None = None
    growing: GrowingAnswer | None = None
    num_checked: int = 0

    @property
    def scores(self) -> torch.Tensor:
        """Return ``prompt_logprobs`` of a request that asked for them and is done."""
        assert self.prompt_logprobs is not None, "they were asked for"
        return self.prompt_logprobs


class RequestLoop:
    """Requests of this rank; every rank of a replica makes the same ones in the same order.

    Args:
        llm: vLLM's ``LLM``, whose worker is this process.
        timeout_seconds: Seconds that a step may take, which end the process.

    Attributes:
        num_prefilled_tokens: Tokens of prompts that were computed so far, and not found in the cache.
    """

    def __init__(self, llm: Any, *, timeout_seconds: float) -> None:
        self._engine = llm.llm_engine
        self._limit = StepLimit(timeout_seconds)
        self._vocab_size: int = self._engine.model_config.get_vocab_size()
        self._max_length: int = self._engine.model_config.max_model_len
        self.num_prefilled_tokens = 0
        self._number = 0
        self._in_flight: dict[str, Request] = {}
        self._ids: dict[str, str] = {}

    @property
    def num_in_flight(self) -> int:
        """Return the number of requests that are not done."""
        return len(self._in_flight)

    def add(
        self,
        prompt: Sequence[int],
        parameters: Mapping[str, Any],
        *,
        stop: StopStrings | None = None,
        adapter: Any = None,
    ) -> Request:
        """Add a request; nothing is computed before ``finish``.

        Args:
            prompt: Token ids.
            parameters: Arguments of ``vllm.SamplingParams``.
            stop: Texts that end the answer; None: none.
            adapter: vLLM's ``LoRARequest`` of the adapter by which it is answered; None: none.

        Raises:
            UserError: The engine cannot take so many tokens, or one of them is none of the model's.
        """
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        self._check(prompt, max_tokens=parameters["max_tokens"])
        kind = RequestOutputKind.DELTA if stop else RequestOutputKind.FINAL_ONLY
        request = Request(growing=GrowingAnswer(stop) if stop else None, num_unread=len(prompt))
        self._number += 1
        # What ends an answer is said in each request, and text is none of the engine's business.
        arguments = {"ignore_eos": True, "detokenize": False, "output_kind": kind, **parameters}
        name = str(self._number)
        self._ids[name] = self._engine.add_request(
            name,
            tokens_input(list(prompt)),
            SamplingParams(**arguments),
            arrival_time=0.0,
            lora_request=adapter,
        )
        self._in_flight[name] = request
        return request

    def _check(self, prompt: Sequence[int], *, max_tokens: int) -> None:
        if len(prompt) + max_tokens > self._max_length:
            raise UserError(
                f"rollout.vllm: a prompt of {len(prompt)} tokens and an answer of {max_tokens} need "
                f"{len(prompt) + max_tokens} positions, but the engine has {self._max_length} "
                "(max_model_len, or what its cache holds); set a larger rollout.kv_cache_gib or "
                "max_model_len, or a smaller rollout.max_new_tokens"
            )
        largest = max(prompt)
        if largest >= self._vocab_size or min(prompt) < 0:
            raise UserError(
                f"model.path: a prompt has the token {largest}, but the model has {self._vocab_size}; its "
                "tokenizer does not belong to it"
            )

    def finish(self, requests: Sequence[Request]) -> None:
        """Compute until some requests are done; others go on meanwhile, as far as they come."""
        waiting = [request for request in requests if not request.is_done]
        while waiting:
            with self._limit:
                outputs = self._engine.step()
            for output in outputs:
                self._take(output)
            waiting = [request for request in waiting if not request.is_done]

    def _take(self, output: Any) -> None:
        """Take what a step has given of a request."""
        request = self._in_flight.get(output.request_id)
        if request is None:  # it was ended before this step
            return
        if request.num_unread:  # what a cache had is known from the first output on
            self.num_prefilled_tokens += request.num_unread - (output.num_cached_tokens or 0)
            request.num_unread = 0
        request.tokens += output.outputs[0].token_ids
        if output.prompt_logprobs is not None:
            request.prompt_logprobs = _flattened(output.prompt_logprobs)
        request.is_done = output.finished
        if request.growing is not None:
            new = request.tokens[request.num_checked :]
            if new and (request.is_done or len(new) >= TOKENS_PER_CHECK):
                request.num_checked = len(request.tokens)
                if request.growing.has_stopped(new) and not request.is_done:
                    self._engine.abort_request([self._ids[output.request_id]], internal=True)
                    request.is_done = True
        if request.is_done:
            del self._in_flight[output.request_id], self._ids[output.request_id]

    def abandon(self) -> None:
        """End all requests in flight, whose answers nobody wants any more."""
        if self._in_flight:
            self._engine.abort_request(list(self._ids.values()), internal=True)
            self._in_flight, self._ids = {}, {}

    def forget(self) -> None:
        """Drop the keys and values of earlier requests, which other weights have computed.

        Raises:
            RuntimeError: The engine keeps them, because a request is still running.
        """
        self.abandon()
        if not self._engine.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not drop its prefix cache, so that answers would mix the weights of two members"
            )


def _flattened(logprobs: Any) -> torch.Tensor:
    """Return the log-likelihoods of a prompt's tokens but the first, float32."""
    starts = logprobs.start_indices[1:]
    return torch.tensor([logprobs.logprobs[start] for start in starts], dtype=torch.float32)
