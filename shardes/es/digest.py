"""The weights digest: one 64-bit number for a set of weights, the same for every sharding and device.

It is the sum modulo 2**64, over elements, of a mix of (parameter id, global index, float32 bits). A sum does
not care how its terms are spread over ranks.
"""

import torch

_MASK = 0xFFFFFFFFFFFFFFFF
_CHUNK = 1 << 20


def _as_int64(value: int) -> int:
    value &= _MASK
    return value - (value >> 63 << 64)


# The finaliser of splitmix64 (Steele, Lea and Flood 2014) and two odd constants of 2**64/phi and 2**64/e.
_MIX_A, _MIX_B = _as_int64(0xBF58476D1CE4E5B9), _as_int64(0x94D049BB133111EB)
_INDEX, _PARAM = _as_int64(0x9E3779B97F4A7C15), _as_int64(0x5E2D58D8B3BCDF1B)


def _shift_right(value: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift: torch's is arithmetic."""
    return (value >> count) & ((1 << (64 - count)) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift_right(value, 30)) * _MIX_A
    value = (value ^ _shift_right(value, 27)) * _MIX_B
    return value ^ _shift_right(value, 31)


def digest(values: torch.Tensor, *, param_id: int, start: int) -> int:
    """The digest of elements [start, start + length) of one parameter.

    Args:
        values: float32, flat.
        param_id: The parameter's index in the name-sorted list.
        start: Row-major index of the first element in the whole parameter.

    Returns:
        A number below 2**64. Digests of parts add up, modulo 2**64, to the digest of the whole.
    """
    total = 0
    for low in range(0, values.numel(), _CHUNK):
        bits = values[low : low + _CHUNK].view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        index = torch.arange(start + low, start + low + bits.numel(), dtype=torch.int64, device=values.device)
        address = _mix(index * _INDEX + _as_int64(param_id * _PARAM))
        total += int(_mix(address ^ bits).sum().item())
    return total & _MASK
