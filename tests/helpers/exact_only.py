"""A context in which torch may do nothing but what has the same bits on every device."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardes.es.arithmetic import EXACT_OPERATIONS, SQRT_OPERATIONS


class InexactOperationError(AssertionError):
    pass


class ExactOnly(TorchDispatchMode):
    """Fails at an operator that docs/updates.md does not list, or that is used otherwise than it says."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name, kwargs = str(operator), kwargs or {}
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        numbers = [each for each in args if isinstance(each, (int, float))]
        is_root = any(tensor.dtype == torch.float64 for tensor in tensors)
        problem = None
        if name not in (SQRT_OPERATIONS if is_root else EXACT_OPERATIONS):
            problem = "is not listed"
        elif kwargs.get("alpha", 1) != 1 or len(args) > 2:
            problem = "does two things at once"
        elif name in ("aten.split.Tensor", "aten.empty.memory_format", "aten.view.default"):
            pass  # nothing is computed
        elif numbers and (name.startswith("aten.div") or numbers != [float(np.float32(numbers[0]))]):
            problem = "has a number that it may not have"
        elif len({tensor.shape for tensor in tensors}) > 1:
            problem = "has tensors of two shapes, of which one counts as a number"
        elif "copy" not in name and len({tensor.dtype for tensor in tensors}) > 1:
            problem = "has tensors of two dtypes"
        if problem:
            raise InexactOperationError(f"{name} {problem}")
        self.seen.add(name)
        return operator(*args, **kwargs)
