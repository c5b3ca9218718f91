"""The weights digest: one 64-bit number for a set of weights, the same for every sharding and device.

It is the sum modulo 2**64, over elements, of a mix of (parameter id, global index, bits of the master). A sum
does not care how its terms are spread over ranks. docs/noise.md defines it.
"""

from types import ModuleType

import torch

from shardes.noise.region import Region


def add_digest(total: torch.Tensor, values: torch.Tensor, *, region: Region) -> None:
    """Add the digest of some elements to ``total``, modulo 2**64.

    Args:
        total: int64 of one element, on the device of ``values``; its bits are the unsigned sum.
        values: float32, bfloat16 or float16, contiguous.
        region: Elements of the parameter that the values are.

    Raises:
        ValueError: ``values`` are not contiguous, or not as many as the region has elements.
    """
    if not values.is_contiguous() or values.numel() != region.num_elements:
        raise ValueError(f"wanted {region.num_elements} contiguous values; got {values.numel()}")
    if region.num_elements == 0:
        return
    _kernels(values.device).add_digest(total, values, region)


def _kernels(device: torch.device) -> ModuleType:
    """Import the module whose kernel runs on a device."""
    if device.type == "cuda":
        from shardes.weights import digest_gpu

        return digest_gpu
    from shardes.weights import digest_cpu

    return digest_cpu
