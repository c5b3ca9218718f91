"""Capture the decoding step as CUDA graphs, one for each number of rows, replayed for all members.

A step of a large model is thousands of small kernels, which take the host longer to launch than the device to
run. Between members only the values of weights and cache change, never their addresses, so that one capture
serves the whole run.

A graph's shapes are fixed: the step attends to the whole storage of the cache, with the columns that are not
written yet masked, and a batch shrinks only to the sizes of ``ladder``.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from shardes.rollout.engines.transformers.kv_cache import SlabCache
from shardes.rollout.memory import is_shortage

logger = logging.getLogger(__name__)

# Runs before a capture, in which libraries choose their kernels and allocate what they keep.
WARM_UPS = 3
LEAST_ROWS = 8


def ladder(num_rows: int) -> list[int]:
    """Return the batch sizes that are captured: ``num_rows``, and halves of it down to ``LEAST_ROWS``."""
    sizes = [num_rows]
    while sizes[-1] >= 2 * LEAST_ROWS:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


class CudaGraphs:
    """Captures functions as CUDA graphs that share a pool of memory, as long as no two of them run at once.

    A pool belongs to the graphs of one cache: when these are dropped, nothing holds blocks of it any more.

    Args:
        stream: Stream to capture on; None: a new one. Libraries keep a workspace for each that they see.
    """

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream
        self._pool: Any = None

    def renewed(self) -> "CudaGraphs":
        """Return one that captures on the same stream into a pool of its own."""
        return CudaGraphs(self._stream)

    def __call__(self, function: Callable[[], None]) -> Any:
        """Capture a function and return its graph, which has a method ``replay``.

        A capture that fails leaves the current stream as it was. Its own stream and its pool are not used
        again.

        Args:
            function: Function to capture; it works on tensors whose addresses do not change.
        """
        current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream = self._stream or torch.cuda.Stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    function()
            current.wait_stream(self._stream)
            # Calls of other threads (a snapshot's copies, NCCL's watchdog) must not end the capture.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                function()
        except BaseException:
            self._stream = self._pool = None
            with suppress(RuntimeError):
                graph.reset()
            raise
        finally:
            # torch does not leave the stream of a capture that could not begin, or not end.
            torch.cuda.set_stream(current)
        return graph


MakeGraph = Callable[[Callable[[], None]], Any]
"""Captures a function; returns an object with a method ``replay``."""


class StepGraphs:
    """Captured decoding steps of one model over one cache.

    Args:
        model: Causal language model whose layers all attend to all tokens.
        slab: Cache of the model, holding a batch.
        make_graph: Function that captures a function.
        any_rank: Where ranks compute parts of the same steps, a collective that returns True if its argument
            is True on any rank: they all use a captured step, or none does. None: this rank is alone.

    Attributes:
        is_usable: False once a step could not be captured, or gave other logits than the model.
    """

    def __init__(
        self,
        model: nn.Module,
        slab: SlabCache,
        *,
        make_graph: MakeGraph,
        any_rank: Callable[[bool], bool] | None = None,
    ) -> None:
        self.is_usable = True
        self._any_rank = any_rank or bool
        self._model = model
        self._slab = slab
        self._make_graph = make_graph
        self._storage = slab.addresses()
        self._graphs: dict[int, Any] = {}
        rows, length = slab.capacity()
        device = slab.device()
        self._token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)
        self._column = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits: dict[int, torch.Tensor] = {}

    def fits(self, model: nn.Module, slab: SlabCache) -> bool:
        """Return True if the graphs were captured with this model and with the cache's present storage."""
        return model is self._model and slab is self._slab and slab.addresses() == self._storage

    def step(
        self,
        token: torch.Tensor,
        *,
        positions: torch.Tensor,
        attention_mask: torch.Tensor,
        num_rows: int | None = None,
    ) -> torch.Tensor | None:
        """Return the logits after one token of each row; None, with nothing done, if it cannot be captured.

        Args:
            token: Token id of each row, int64 of shape [rows].
            positions: Position of each token, int64 of shape [rows, 1].
            attention_mask: 1 on tokens and 0 on padding, int64 of shape [rows, length], where ``length``
                counts the tokens so far, including this one.
            num_rows: Number of rows to compute, at least those that there are: the others repeat the first,
                in rows of the cache of which this column is not wanted. None: those that there are.

        Returns:
            Logits of shape [rows, vocabulary], overwritten by the next step of as many rows.
        """
        if not self.is_usable:
            return None
        own, length = attention_mask.shape
        rows = num_rows or own
        self._token[:own, 0].copy_(token)
        self._positions[:own].copy_(positions)
        self._mask[:own, 0, 0, :length].copy_(attention_mask)
        if rows > own:
            self._token[own:rows, 0] = token[0]
            self._positions[own:rows] = positions[:1]
            self._mask[own:rows, 0, 0, :length] = attention_mask[:1].bool()
        self._mask[:rows, 0, 0, length:] = False
        self._column.fill_(length - 1)
        if rows not in self._graphs and not self._capture(rows):
            return None
        self._graphs[rows].replay()
        self._slab.advance()
        return self._logits[rows][:own]

    def _capture(self, rows: int) -> bool:
        """Capture the step of ``rows`` rows, and compare it with the model's; return True if it is usable.

        A captured collective waits for other ranks when it is replayed, so nothing is replayed before all
        have captured it.

        Raises:
            RuntimeError: A rank had no memory left, see ``is_shortage``; on all ranks.
        """

        def run() -> None:
            self._logits[rows] = self._forward(rows)

        wanted = graph = problem = None
        try:
            wanted = self._forward(rows)
            graph = self._make_graph(run)
        except Exception as error:  # whatever a model does that cannot be captured
            problem = error
        has_failed = self._any_rank(problem is not None)
        if has_failed and self._any_rank(problem is not None and is_shortage(problem)):
            if problem is not None and is_shortage(problem):
                raise problem
            raise torch.OutOfMemoryError("another rank had no memory left to capture a step")
        if not has_failed:
            assert wanted is not None and graph is not None, "there was no problem"
            graph.replay()
            tolerance = 1e-4 if wanted.dtype == torch.float32 else 3e-2
            if not torch.allclose(self._logits[rows], wanted, rtol=tolerance, atol=tolerance):
                problem = RuntimeError("a replayed step gave other logits than the model")
            has_failed = self._any_rank(problem is not None)
        if has_failed:
            problem = problem or RuntimeError("another rank could not")
            self.is_usable = False
            logger.warning(
                "%s cannot be captured as a CUDA graph (%s: %s), so each token is decoded kernel by kernel",
                type(self._model).__name__,
                type(problem).__name__,
                str(problem).split("\n")[0],
            )
            return False
        self._graphs[rows] = graph
        return True

    def _forward(self, rows: int) -> torch.Tensor:
        with self._slab.at(self._column, rows=rows):
            output: Any = self._model(
                input_ids=self._token[:rows],
                attention_mask=self._mask[:rows],
                position_ids=self._positions[:rows],
                past_key_values=self._slab,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1]


def can_be_captured(model: Any, slab: SlabCache | None) -> bool:
    """Return True if a step may be captured: all layers attend to all tokens, by torch's attention."""
    is_known = getattr(model.config, "_attn_implementation", None) == "sdpa"
    return slab is not None and is_known and not slab.has_windows
