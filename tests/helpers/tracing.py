"""What a forward does underneath: which collectives run, and how many bytes of tensors are alive."""

import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_GATHERS = ("_allgather_base_", "allgather_", "all_gather_into_tensor", "allgather_into_tensor_coalesced_")


class Trace(TorchDispatchMode):
    """Counts gathered elements, and the largest number of bytes that were alive at once.

    Storage is followed from the operation that makes it, so views count once, and a buffer that an engine
    frees by resizing it to nothing counts as nothing until it is filled again.

    Args:
        alive: Tensors that exist already and count as well.
        ignored: Tensors that do not count.
    """

    def __init__(self, alive, ignored=()):
        super().__init__()
        self._ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self._storages = {}
        self.peak_bytes = 0
        self.gathered = 0
        for tensor in alive:
            self._follow(tensor)
        self.peak_bytes = self.base_bytes = self._alive_bytes()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name.split("::")[-1] in _GATHERS:
            self.gathered += sum(t.numel() for t in tree_leaves(args[0]) if isinstance(t, torch.Tensor))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf)
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes())
        return result

    def _follow(self, tensor):
        # A DTensor claims the storage of the whole, of which its local tensor is what exists.
        if tensor.device.type != "meta" and not isinstance(tensor, DTensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._ignored:
                self._storages.setdefault(storage._cdata, StorageWeakRef(storage))

    def _alive_bytes(self):
        total = 0
        for key, reference in list(self._storages.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()
        return total
