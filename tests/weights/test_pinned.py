"""Masters in pinned memory: what torch rounds up is little, and no tensor overlaps another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardes.weights import pinned
from shardes.weights.pinned import pack, pinned_bytes, pinned_zeros, power_of_two

# Hidden and inner size, layers, width of keys, and vocabulary of Qwen2.5.
SIZES = {
    "7b": (3584, 18944, 28, 512, 152064),
    "32b": (5120, 27648, 64, 1024, 152064),
    "72b": (8192, 29568, 80, 1024, 152064),
}


def shard_bytes(name, *, num_ranks):
    """Bytes of float32 masters of one rank's flat shards."""
    hidden, inner, layers, keys, vocabulary = SIZES[name]
    layer = (
        [hidden * hidden] * 2
        + [hidden * keys] * 2
        + [hidden * inner] * 3
        + [hidden, keys, keys]
        + [hidden] * 2
    )
    sizes = [vocabulary * hidden] * 2 + layer * layers + [hidden]
    return {str(i): 4 * -(-size // num_ranks) for i, size in enumerate(sizes)}


@pytest.mark.parametrize(("name", "num_ranks"), [("7b", 1), ("7b", 3), ("32b", 1), ("32b", 8), ("72b", 8)])
def test_large_models_take_little_more_than_their_bytes(name, num_ranks):
    sizes = shard_bytes(name, num_ranks=num_ranks)
    assert sum(sizes.values()) <= pinned_bytes(sizes) <= 1.03 * sum(sizes.values())


def test_by_itself_each_tensor_would_take_up_to_twice_its_bytes():
    sizes = shard_bytes("32b", num_ranks=1)
    assert round(sum(map(power_of_two, sizes.values())) / 2**30) == 220
    assert round(pinned_bytes(sizes) / 2**30) == 124
    assert round(sum(sizes.values()) / 2**30) == 122


@given(st.lists(st.integers(min_value=0, max_value=100_000), max_size=40))
@settings(max_examples=100, deadline=None)
def test_tensors_lie_in_blocks_of_powers_of_two_and_do_not_overlap(sizes):
    blocks, places = pack({str(i): size for i, size in enumerate(sizes)})
    assert all(size & (size - 1) == 0 for size in blocks)
    ends = dict.fromkeys(range(len(blocks)), 0)
    for name, (block, begin) in sorted(places.items(), key=lambda place: (place[1], sizes[int(place[0])])):
        assert begin >= ends[block]
        assert begin % pinned.ALIGNMENT_BYTES == 0
        ends[block] = begin + sizes[int(name)]
        assert ends[block] <= blocks[block]
    assert len(places) == len(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_allocated_is_what_is_counted(monkeypatch, dtype):
    allocated = []

    def allocate(num_bytes):
        allocated.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(pinned, "_allocate", allocate)
    lengths = {"a": 1000, "b": 3, "none": 0, "c": 70_001, "d": 5000}
    tensors = pinned_zeros(lengths, dtype=dtype)
    assert sum(allocated) == pinned_bytes({name: n * dtype.itemsize for name, n in lengths.items()})
    assert [(name, t.numel(), t.dtype) for name, t in tensors.items()] == [
        (name, length, dtype) for name, length in lengths.items()
    ]
    assert not any(t.any() for t in tensors.values())
    for number, tensor in enumerate(tensors.values(), start=1):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors.values(), start=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device_the_memory_is_pinned():
    assert all(t.is_pinned() for t in pinned_zeros({"a": 10, "b": 300_000}, dtype=torch.float32).values())
