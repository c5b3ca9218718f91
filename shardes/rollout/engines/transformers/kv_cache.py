"""Cache keys and values in storage that is allocated once, written in place, and drops finished rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class SlabLayer(CacheLayerMixin):
    """Keys and values of one layer, in storage that outlives the batch.

    Tensors are of shape [rows, heads, tokens, head size]. All tokens are kept, also those outside of a
    sliding window, which the attention mask hides.

    Attributes:
        rows: The rows of the next forward.
        length: Number of columns that are filled.
        column: Column of the next token, int64 of shape [1], if the shapes of a step must not depend on
            the length: ``length`` then stays, and ``update`` returns the whole storage. None otherwise.
    """

    # Masks are then always made while decoding, where transformers would otherwise look at the device's data
    # to see whether one is needed, and wait for it.
    is_compileable = True
    is_sliding = False
    is_initialized: bool
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.column: torch.Tensor | None = None
        self.rows = slice(0)
        self._low = 0
        self._shape = (0, 0)

    def restart(self, *, rows: int, max_length: int) -> None:
        """Forget all tokens; the storage is replaced only if it is too small."""
        self.look_at(slice(rows), low=0, length=0)
        if self.is_initialized and (self.keys.shape[0] < rows or self.keys.shape[2] < max_length):
            self.keys = self.values = None
            self.is_initialized = False
        self._shape = (max(rows, self._shape[0]), max(max_length, self._shape[1]))

    def look_at(self, rows: slice, *, low: int, length: int) -> None:
        """Select some rows, whose columns from ``low`` to ``length`` are filled, for the next forwards."""
        self.rows, self._low, self.length = rows, low, length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the storage, by the shapes and dtypes of the first keys and values."""
        rows, max_length = self._shape
        self.keys = key_states.new_zeros(rows, key_states.shape[1], max_length, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], max_length, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens to the selected rows; return all their keys and values, as views of the storage."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.column is not None:
            keys, values = self.keys[self.rows], self.values[self.rows]
            keys.index_copy_(2, self.column, key_states)
            values.index_copy_(2, self.column, value_states)
            return keys, values
        end = self.length + key_states.shape[2]
        self.keys[self.rows, :, self.length : end] = key_states
        self.values[self.rows, :, self.length : end] = value_states
        self.length = end
        return self.keys[self.rows, :, self._low : end], self.values[self.rows, :, self._low : end]

    def keep(self, *, rows: int, sources: torch.Tensor, targets: torch.Tensor, swaps: bool = False) -> None:
        """Keep the first ``rows`` rows, after copying rows ``sources`` over rows ``targets``.

        Args:
            rows: Number of rows that the next forwards compute.
            sources: Indices of rows to copy, int64.
            targets: Indices of as many others.
            swaps: Whether rows change places instead, so that none is lost.
        """
        if swaps:
            sources, targets = torch.cat([sources, targets]), torch.cat([targets, sources])
        if len(sources):
            for storage in (self.keys, self.values):
                storage[targets, :, : self.length] = storage[sources, :, : self.length]
        self.rows = slice(rows)

    def copied(self, *, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a copy of the keys and values of some columns of some rows; see ``SlabCache.copied``."""
        keys, values = self.keys.transpose(1, 2), self.values.transpose(1, 2)
        return keys[rows[:, None], columns], values[rows[:, None], columns]

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill the first columns of the first rows; arguments as ``copied`` returns them."""
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        rows, self.length = keys.shape[0], keys.shape[2]
        self.keys[:rows, :, : self.length] = keys
        self.values[:rows, :, : self.length] = values

    def take_prefix(self, prefix: Self, shifts: Sequence[int]) -> None:
        """Fill each row from another layer, shifted to the right by the padding of the row.

        The other layer's rows are taken in turn: its only one, or one for each member. Tokens that a shift
        moves beyond the prefix's length are left out, so that all rows have that length.

        Args:
            prefix: Layer of the same sizes that holds the prefix.
            shifts: Number of padding tokens of each row, in descending order.
        """
        if not self.is_initialized:
            self.lazy_initialization(prefix.keys, prefix.values)
        self.length = prefix.length
        low = 0
        while low < len(shifts):
            high = low + 1
            while high < len(shifts) and shifts[high] == shifts[low]:
                high += 1
            shift = min(shifts[low], self.length)
            taken: Any = slice(1)
            if prefix.rows.stop > 1:
                taken = torch.arange(low, high, device=prefix.keys.device) % prefix.rows.stop
            for storage, source in ((self.keys, prefix.keys), (self.values, prefix.values)):
                storage[low:high, :, :shift] = 0
                storage[low:high, :, shift : self.length] = source[taken, :, : self.length - shift]
            low = high

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the keys that the next ``query_length`` tokens see."""
        return self.length - self._low + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens held of the selected rows."""
        return self.length - self._low

    def get_max_length(self) -> int:
        """Return the number of tokens that fit into a row."""
        return self._shape[1]


class SlabCache(Cache):
    """One ``SlabLayer`` for each layer of a model.

    Args:
        num_layers: Number of layers of the model.
        has_windows: True if some of the layers attend to a sliding window only.
    """

    def __init__(self, num_layers: int, *, has_windows: bool = False) -> None:
        super().__init__(layers=[SlabLayer() for _ in range(num_layers)])
        self.has_windows = has_windows

    def restart(self, *, rows: int, max_length: int) -> None:
        """Make room for a batch of ``rows`` rows of ``max_length`` tokens, and forget the one before."""
        for layer in self.layers:
            layer.restart(rows=rows, max_length=max_length)

    def look_at(self, rows: slice, *, low: int, length: int) -> None:
        """Select some rows, whose columns from ``low`` to ``length`` are filled, for the next forwards."""
        for layer in self.layers:
            layer.look_at(rows, low=low, length=length)

    def keep(self, *, rows: int, sources: torch.Tensor, targets: torch.Tensor, swaps: bool = False) -> None:
        """Keep the first ``rows`` rows, after moving others; see ``SlabLayer.keep``."""
        for layer in self.layers:
            layer.keep(rows=rows, sources=sources, targets=targets, swaps=swaps)

    def copied(self, *, rows: torch.Tensor, columns: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return a copy of the keys and values of some columns of some rows.

        Args:
            rows: Indices of rows, int64 of shape [rows].
            columns: Indices of columns of each, int64 of shape [rows, columns].

        Returns:
            Keys and values of each layer, of shape [rows, columns, heads, head size].
        """
        return [layer.copied(rows=rows, columns=columns) for layer in self.layers]

    def fill(
        self,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        rows: torch.Tensor,
        columns: torch.Tensor,
    ) -> None:
        """Fill the first columns of the first rows; arguments as ``copied`` takes and returns them."""
        for layer, (keys, values) in zip(self.layers, layers, strict=True):
            layer.fill(keys[rows[:, None], columns], values[rows[:, None], columns])

    def bytes_per_token(self) -> int:
        """Return the bytes of a token's keys and values."""
        storages = [storage for layer in self.layers for storage in (layer.keys, layer.values)]
        return sum(each.shape[1] * each.shape[3] * each.itemsize for each in storages)

    @contextmanager
    def at(self, column: torch.Tensor, *, rows: int) -> Iterator[None]:
        """Have a step see the whole storage within the context, so that no shape varies.

        Args:
            column: Where tokens are written, int64 of shape [1].
            rows: Number of rows of the step.
        """
        before = [layer.rows for layer in self.layers]
        for layer in self.layers:
            layer.column, layer.rows = column, slice(rows)
        try:
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                layer.column, layer.rows = None, own

    def clear(self) -> None:
        """Fill the storage with zeros: values that are not finite would get through a mask."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()

    def advance(self) -> None:
        """Count a token that was written to the end within ``at``."""
        for layer in self.layers:
            layer.length += 1

    def capacity(self) -> tuple[int, int]:
        """Return the numbers of rows and of tokens that fit."""
        return self.layers[0].keys.shape[0], self.layers[0].keys.shape[2]

    def device(self) -> torch.device:
        """Return the device of the storage."""
        return self.layers[0].keys.device

    def addresses(self) -> list[int]:
        """Return the addresses of each layer's storage of keys and of values."""
        return [storage.data_ptr() for layer in self.layers for storage in (layer.keys, layer.values)]

    def take_prefix(self, prefix: Self, shifts: Sequence[int]) -> None:
        """Begin each row with the tokens of another cache's rows; see ``SlabLayer.take_prefix``."""
        for layer, source in zip(self.layers, prefix.layers, strict=True):
            layer.take_prefix(source, shifts)


def make_slab(model_config: Any) -> SlabCache | None:
    """Return an empty cache for a model; None if one of its layers keeps more than keys and values."""
    layers = DynamicCache(config=model_config).layers
    kinds = {type(layer) for layer in layers}
    if not layers or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return None
    return SlabCache(len(layers), has_windows=DynamicSlidingWindowLayer in kinds)
