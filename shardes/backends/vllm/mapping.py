"""Turn recorded copies into shards: stretches of a vLLM parameter with the elements that they hold."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from shardes.backends.layout import compress
from shardes.backends.shard import Shard, ShardSpan
from shardes.backends.vllm.recording import RecordedCopy
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.models.build import parameter_ids

_REMEDY = "set parallel.backend: fsdp or zero3"


class _Rows:
    """Rows of elements that are contiguous both in a target and in a parameter.

    Args:
        copies: Copies of file tensors of one parameter into one target.

    Attributes:
        target_starts: Index of each row's first element in the target's storage, ascending.
        starts: Row-major index of the same element in the whole parameter.
        lengths: Elements of each row.
    """

    def __init__(self, copies: Sequence[RecordedCopy]) -> None:
        parts = np.concatenate([_rows_of(copy) for copy in copies], axis=1)
        # A loader may make a copy twice, as for a tied weight.
        self.target_starts, self.starts, self.lengths = np.unique(parts, axis=1)

    @property
    def has_overlaps(self) -> bool:
        """Return whether an element of the target is copied from several elements."""
        return bool((self.target_starts[1:] < (self.target_starts + self.lengths)[:-1]).any())

    @property
    def bounds(self) -> tuple[int, int]:
        """Return the first element in the target's storage, and the one after the last."""
        return int(self.target_starts[0]), int(self.target_starts[-1] + self.lengths[-1])

    def spans(self, origin: int) -> tuple[ShardSpan, ...]:
        """Return the rows as spans of a tensor that begins at element ``origin`` of the target's storage."""
        places = self.target_starts - origin
        gaps = np.flatnonzero(places[1:] != (places + self.lengths)[:-1]) + 1
        spans: list[ShardSpan] = []
        for low, high in zip([0, *gaps], [*gaps, len(places)], strict=True):
            of_stretch = compress(self.starts[low:high], self.lengths[low:high])
            first = int(places[low])
            spans += [replace(span, local_start=span.local_start + first) for span in of_stretch]
        return tuple(spans)


def _rows_of(copy: RecordedCopy) -> np.ndarray:
    """Return the rows of a copy: place in the target, place in the parameter, length; int64 of [3, rows]."""
    dims = list(zip(copy.shape, copy.target_strides, copy.source_strides, strict=True))
    length = 1
    while dims and (dims[-1][0] == 1 or dims[-1][1] == dims[-1][2] == length):
        length *= dims.pop()[0]
    target_starts = source_starts = np.zeros(1, dtype=np.int64)
    for size, target_stride, source_stride in dims:
        index = np.arange(size)
        target_starts = (target_starts[:, None] + index * target_stride).ravel()
        source_starts = (source_starts[:, None] + index * source_stride).ravel()
    return np.stack(
        [
            target_starts + copy.target_offset,
            source_starts + copy.source_offset + copy.source.start,
            np.full(len(target_starts), length),
        ]
    )


def make_shards(
    targets: Mapping[str, nn.Parameter],
    copies: Mapping[str, Sequence[RecordedCopy]],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Shard, ...]:
    """Make this rank's shards, sorted by name, whose local tensors are views of the targets.

    Args:
        targets: vLLM's parameters by name, each once.
        copies: Recorded copies by target.
        shapes: Shape of each whole parameter of the model, by its name in the checkpoint.
        dtype: Dtype of the model.
        device: Device of the targets.

    Raises:
        UserError: A target has another dtype or strides, holds elements that no file tensor has, or a
            parameter is in several targets.
    """
    ids, shards = parameter_ids(list(shapes)), {}
    homes: dict[str, str] = {}
    for target_name, target in targets.items():
        by_parameter: dict[str, list[RecordedCopy]] = {}
        for copy in copies[target_name]:
            by_parameter.setdefault(copy.source.parameter, []).append(copy)
        if by_parameter:
            _check_target(target_name, target, copies[target_name], dtype)
        origin = target.storage_offset()
        rows = {name: _Rows(found) for name, found in by_parameter.items()}
        _check_rest(target_name, target, list(rows.values()))
        for name, of_parameter in rows.items():
            if name in homes:
                raise UserError(
                    f"parallel.backend: vllm holds {name} twice, in {homes[name]} and in {target_name}; "
                    f"{_REMEDY}"
                )
            homes[name] = target_name
            low, high = of_parameter.bounds
            local = target.data.view(-1)[low - origin : high - origin]
            shards[name] = Shard(name, ids[name], shapes[name], local, of_parameter.spans(low))
    for name in shapes:  # a rank may have nothing but the padding of the vocabulary
        empty = torch.empty(0, dtype=dtype, device=device)
        shards.setdefault(name, Shard(name, ids[name], shapes[name], empty, ()))
    return tuple(shards[name] for name in sorted(shards))


def _check_target(
    name: str, target: nn.Parameter, copies: Sequence[RecordedCopy], dtype: torch.dtype
) -> None:
    """Check that a target holds what it is loaded with, in the model's dtype and in the order of the files.

    Raises:
        UserError: It does not.
    """
    if target.dtype != dtype:
        reason = f"with the dtype {target.dtype} instead of model.dtype, {dtype}"
    elif not target.is_contiguous():
        reason = f"with the strides {target.stride()}"
    elif any(_is_transposed(copy) for copy in copies):
        reason = "transposed"
    else:
        return
    raise UserError(
        f"parallel.backend: vllm keeps {name} {reason}, so that it cannot be perturbed in place; {_REMEDY}"
    )


def _is_transposed(copy: RecordedCopy) -> bool:
    """Return whether elements that follow each other in the target do not in the file tensor."""
    dims = [
        dim for dim in zip(copy.shape, copy.target_strides, copy.source_strides, strict=True) if dim[0] > 1
    ]
    # Of one dimension there are few elements, whatever their stride.
    return len(dims) > 1 and (dims[-1][1] != 1 or dims[-1][2] != 1)


def _check_rest(name: str, target: nn.Parameter, rows: Sequence[_Rows]) -> None:
    """Check that a target's elements are each copied once, or are zeros that pad it.

    Raises:
        UserError: They are not.
    """
    total = sum(int(each.lengths.sum()) for each in rows)
    bounds = sorted(each.bounds for each in rows)
    is_apart = all(one[1] <= other[0] for one, other in itertools.pairwise(bounds))
    has_overlaps = any(each.has_overlaps for each in rows)
    if total == target.numel() and is_apart and not has_overlaps:
        return
    is_free = torch.ones(target.numel(), dtype=torch.bool)
    for each in rows:
        for start, length in zip(each.target_starts.tolist(), each.lengths.tolist(), strict=True):
            first = start - target.storage_offset()
            is_free[first : first + length] = False
    if has_overlaps or int(is_free.sum()) + total != target.numel():
        raise UserError(
            f"parallel.backend: vllm loads elements of {name} from several places of the files; {_REMEDY}"
        )
    rest = target.data.reshape(-1)[is_free.to(target.device)]
    if bool((rest != 0).any()):
        raise UserError(
            f"parallel.backend: vllm: {rest.numel()} elements of {name} come from no tensor of the files, so "
            f"that a member's weights would not reach them; {_REMEDY}"
        )


def mark_copies(
    shards: Sequence[Shard], group: Group
) -> tuple[tuple[Shard, ...], dict[str, list[tuple[ShardSpan, ...]]]]:
    """Find the elements that several ranks hold, which only the first of them counts; a collective.

    Args:
        shards: This rank's shards.
        group: Ranks that hold the model together.

    Returns:
        The shards, and by name the spans of each rank.

    Raises:
        UserError: Ranks hold parts of each other's elements, or some elements are held by none.
    """
    own = {shard.name: [list(vars(span).values()) for span in shard.spans] for shard in shards}
    of_ranks = [
        {name: tuple(ShardSpan(*span) for span in spans) for name, spans in found.items()}
        for found in group.gather_json(own)
    ]
    marked, every = [], {}
    for shard in shards:
        spans = [found[shard.name] for found in of_ranks]
        held = [_elements(each) for each in spans]
        counted = [span for each in dict.fromkeys(held) for span in spans[held.index(each)]]
        if not _is_partition(counted, shard.num_elements):
            raise UserError(
                f"parallel.backend: vllm: some elements of {shard.name} are held twice, together with others "
                f"that are not, or by none of the {group.world_size} rank(s); let fewer ranks hold the model "
                f"(parallel.shard_size), or {_REMEDY}"
            )
        is_copy = bool(shard.spans) and held.index(held[group.rank]) < group.rank
        marked.append(replace(shard, is_copy=is_copy))
        every[shard.name] = spans
    return tuple(marked), every


def _elements(spans: Sequence[ShardSpan]) -> tuple[tuple[int, int, int, int], ...]:
    """Return the elements of some spans, wherever they lie in the shard."""
    return tuple(sorted((s.global_start, s.length, s.rows, s.stride) for s in spans))


def _is_partition(spans: Sequence[ShardSpan], num_elements: int) -> bool:
    """Return whether some spans have each of a parameter's elements once."""
    starts = [span.global_start + np.arange(span.rows) * span.stride for span in spans]
    lengths = [np.full(span.rows, span.length) for span in spans]
    if not spans:
        return num_elements == 0
    first, count = np.concatenate(starts), np.concatenate(lengths)
    order = np.argsort(first)
    ends = np.cumsum(count[order])
    return bool((first[order] == np.concatenate([[0], ends[:-1]])).all() and ends[-1] == num_elements)
