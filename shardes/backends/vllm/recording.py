"""Record what a model's own weight loaders would put where, without any weights.

A loader copies views of checkpoint tensors into views of parameters. Given tensors on the meta device, whose
views have shapes and strides but no values, the copies say which elements of which file tensor belong into
which elements of which parameter, for any architecture. A copy of anything but a view (a repacked, quantised
or computed weight) has no such map, and is refused by the parameter's name.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardes.errors import UserError

LoadWeights = Callable[[Iterator[tuple[str, torch.Tensor]]], object]
"""A model's ``load_weights``."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the model's files.

    Attributes:
        name: Name in the files.
        shape: Shape in the files.
        parameter: Name of the parameter that it belongs to.
        start: Row-major index in the parameter of the tensor's first element.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str
    start: int


@dataclass(frozen=True)
class RecordedCopy:
    """A copy of a view of a file tensor into a view of a target.

    Attributes:
        source: File tensor that the elements come from.
        shape: Shape of both views.
        target_strides: Strides of the view of the target, in elements.
        target_offset: Index in the target's storage of the view's first element.
        source_strides: Strides of the view of the file tensor, in elements.
        source_offset: Index in the file tensor of the view's first element.
    """

    source: FileTensor
    shape: tuple[int, ...]
    target_strides: tuple[int, ...]
    target_offset: int
    source_strides: tuple[int, ...]
    source_offset: int


def record_copies(
    load_weights: LoadWeights,
    targets: dict[str, nn.Parameter],
    files: Sequence[FileTensor],
    *,
    dtype: torch.dtype,
) -> dict[str, list[RecordedCopy]]:
    """Record the copies that loading some file tensors makes; no weight is changed, and none is read.

    Args:
        load_weights: Loads named tensors into the targets.
        targets: Parameters by name, each once.
        files: The file tensors, in the order in which they are loaded.
        dtype: Dtype of the tensors that stand for them.

    Returns:
        Copies by target, in the order in which they were made.

    Raises:
        UserError: A loader computes what it copies, or needs values of the tensors.
    """
    recorder = _Recorder(targets)
    addresses = {name: target.data_ptr() for name, target in targets.items()}
    try:
        with torch.no_grad(), recorder:
            load_weights(recorder.tensors(files, dtype))
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        current = recorder.current.name if recorder.current is not None else "the first tensor"
        raise UserError(_refusal(current, f"{type(error).__name__}: {error}".splitlines()[0])) from error
    for name, target in targets.items():
        if target.is_meta or target.data_ptr() != addresses[name]:
            raise UserError(_refusal(name, "its loader replaces it by another tensor"))
    return recorder.copies


def _refusal(name: str, reason: str) -> str:
    return (
        f"parallel.backend: vllm: {name} is not held by vLLM as it is in the files ({reason}), so that it "
        "cannot be perturbed in place; set parallel.backend: fsdp or zero3"
    )


class _Recorder(TorchDispatchMode):
    """Mode that notes copies into targets instead of making them.

    Args:
        targets: Parameters by name.

    Attributes:
        copies: Copies by target.
        current: File tensor that is being loaded; None before the first.
    """

    def __init__(self, targets: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.copies: dict[str, list[RecordedCopy]] = {name: [] for name in targets}
        self.current: FileTensor | None = None
        self._targets = {_storage(target): name for name, target in targets.items() if target.numel()}
        self._sources: dict[int, FileTensor] = {}
        self._held: list[torch.Tensor] = []  # an address must not be used again meanwhile

    def tensors(self, files: Iterable[FileTensor], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a name and a tensor on meta for each file tensor."""
        for file in files:
            self.current = file
            tensor = torch.empty(file.shape, dtype=dtype, device="meta")
            self._held.append(tensor)
            self._sources[_storage(tensor)] = file
            yield file.name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = self._written_target(func, args)
        if name is None:
            return func(*args, **(kwargs or {}))
        target = args[0]
        if func in (torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar) and not any(args[1:]):
            return func(*args, **(kwargs or {}))  # the padding of a vocabulary
        source = self._sources.get(_storage(args[1])) if func is torch.ops.aten.copy_.default else None
        if source is None:
            raise UserError(_refusal(name, f"its loader writes {func} of something it has computed"))
        if not target.numel():  # a rank that has nothing but the padding of a vocabulary
            return target
        view = args[1].expand(target.shape)
        self.copies[name].append(
            RecordedCopy(
                source,
                tuple(target.shape),
                target.stride(),
                target.storage_offset(),
                view.stride(),
                view.storage_offset(),
            )
        )
        return target

    def _written_target(self, func: Any, args: Any) -> str | None:
        """Return the name of the target that an operation writes to; None if it writes to none."""
        is_written = func._schema.is_mutable and args and isinstance(args[0], torch.Tensor)
        return self._targets.get(_storage(args[0])) if is_written else None


def _storage(tensor: torch.Tensor) -> int:
    """Return what identifies a tensor's storage, as long as that lives."""
    return tensor.untyped_storage()._cdata
