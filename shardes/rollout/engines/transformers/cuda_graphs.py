"""Capture the decoding step as CUDA graphs, one for each number of rows, replayed for all members.

A step of a large model is thousands of small kernels, which take the host longer to launch than the device to
run. Between members only the values of weights and cache change, never their addresses, so that one capture
serves the whole run.

A graph's shapes are fixed: the step attends to the whole storage of the cache, with the columns that are not
written yet masked, and a batch shrinks only to the sizes of ``ladder``.
"""

import logging
from collections.abc import Callable
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


class CudaGraph:
    """CUDA graph of a function.

    Args:
        function: Function to capture; it works on tensors whose addresses do not change.
    """

    _pool: Any = None

    def __init__(self, function: Callable[[], None]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        if CudaGraph._pool is None:
            CudaGraph._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(self._graph, pool=CudaGraph._pool):
            function()

    def replay(self) -> None:
        """Run the captured function again."""
        self._graph.replay()


MakeGraph = Callable[[Callable[[], None]], Any]
"""Captures a function; returns an object with a method ``replay``."""


class StepGraphs:
    """Captured decoding steps of one model over one cache.

    Args:
        model: Causal language model whose layers all attend to all tokens.
        slab: Cache of the model, holding a batch.
        make_graph: Function that captures a function.

    Attributes:
        is_usable: False once a step could not be captured, or gave other logits than the model.
    """

    def __init__(self, model: nn.Module, slab: SlabCache, *, make_graph: MakeGraph = CudaGraph) -> None:
        self.is_usable = True
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
        self, token: torch.Tensor, *, positions: torch.Tensor, attention_mask: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the logits after one token of each row; None, with nothing done, if it cannot be captured.

        Args:
            token: Token id of each row, int64 of shape [rows].
            positions: Position of each token, int64 of shape [rows, 1].
            attention_mask: 1 on tokens and 0 on padding, int64 of shape [rows, length], where ``length``
                counts the tokens so far, including this one.

        Returns:
            Logits of shape [rows, vocabulary], overwritten by the next step of as many rows.
        """
        if not self.is_usable:
            return None
        rows, length = attention_mask.shape
        self._token[:rows, 0].copy_(token)
        self._positions[:rows].copy_(positions)
        self._mask[:rows, 0, 0, :length].copy_(attention_mask)
        self._mask[:rows, 0, 0, length:] = False
        self._column.fill_(length - 1)
        if rows not in self._graphs and not self._capture(rows):
            return None
        self._graphs[rows].replay()
        self._slab.advance()
        return self._logits[rows]

    def _capture(self, rows: int) -> bool:
        """Capture the step of ``rows`` rows, and compare it with the model's; return True if it is usable."""

        def run() -> None:
            self._logits[rows] = self._forward(rows)

        try:
            wanted = self._forward(rows)
            graph = self._make_graph(run)
            graph.replay()
            tolerance = 1e-4 if wanted.dtype == torch.float32 else 3e-2
            if not torch.allclose(self._logits[rows], wanted, rtol=tolerance, atol=tolerance):
                raise RuntimeError("a replayed step gave other logits than the model")
        except Exception as error:  # whatever a model does that cannot be captured
            if is_shortage(error):
                raise
            self.is_usable = False
            logger.warning(
                "%s cannot be captured as a CUDA graph (%s: %s), so each token is decoded kernel by kernel",
                type(self._model).__name__,
                type(error).__name__,
                str(error).split("\n")[0],
            )
            return False
        self._graphs[rows] = graph
        return True

    def _forward(self, rows: int) -> torch.Tensor:
        with self._slab.at(self._column):
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
