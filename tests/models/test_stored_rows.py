"""Blocks of rows: every element of a region once, from where it is stored to where it belongs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shardes.models import checkpoint as checkpoint_module
from shardes.models.checkpoint import JoinedTensor, TensorReader
from shardes.models.stored_rows import DifferentStridesError, shared
from shardes.noise import Region


def elements(rows):
    """The indices of the elements of rows, in order."""
    first, length, count, stride = rows
    return [first + row * stride + i for row in range(count) for i in range(length)]


@st.composite
def some_rows(draw, stride):
    """Rows at a stride within 12 of them, or a range without a stride."""
    size = 12 * stride
    if draw(st.booleans()):
        first = draw(st.integers(0, size))
        return (first, draw(st.integers(0, size - first)), 1, draw(st.sampled_from([0, 5])))
    length, first = draw(st.integers(1, stride)), draw(st.integers(0, 3 * stride))
    return (first, length, draw(st.integers(1, (size - first - length) // stride + 1)), stride)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_blocks_are_what_two_sets_of_rows_share(data):
    stride = data.draw(st.integers(1, 9))
    wanted, stored = data.draw(some_rows(stride)), data.draw(some_rows(stride))
    targets = {element: place for place, element in enumerate(elements(wanted))}
    sources = {element: 100 + place for place, element in enumerate(elements(stored))}
    found = []
    for block in shared(wanted, stored, place=100):
        for row in range(block.rows):
            for i in range(block.length):
                source = block.source + row * block.source_stride + i
                found.append((source, block.target + row * block.target_stride + i))
    assert sorted(found) == sorted((sources[each], targets[each]) for each in sources.keys() & targets.keys())


def test_few_blocks_are_made_of_many_rows():
    rows = 100_000
    for wanted, stored in [
        ((3, 2, rows, 9), (0, 9 * rows, 1, 0)),
        ((3, 2, rows, 9), (3, 2, rows, 9)),
        ((0, 9 * rows, 1, 0), (3, 2, rows, 9)),
        ((4, 17 * rows, 1, 0), (15, 2, 2 * rows, 9)),
        ((3, 5, rows, 9), (1, 7, rows, 9)),
    ]:
        assert 1 <= len(list(shared(wanted, stored, place=0))) <= 3


@pytest.mark.parametrize("stored", [(0, 3, 4, 7), (0, 9, 4, 3)], ids=["another stride", "overlapping rows"])
def test_other_strides_are_read_row_by_row(stored):
    with pytest.raises(DifferentStridesError):
        list(shared((0, 3, 4, 8), stored, place=0))


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """A reader of a parameter that three tensors of a file make up, and its values."""
    path = tmp_path_factory.mktemp("joined") / "model.safetensors"
    values = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"a": values[:20].clone(), "b": values[20:21].clone(), "c": values[21:].clone()}, path)
    tensors = checkpoint_module.stored_tensors(path)
    reader = TensorReader({"w": JoinedTensor(tuple(tensors[name] for name in "abc"), (60, 7))})
    return reader, values.flatten()


@pytest.mark.parametrize(("block", "gap"), [(64, 1 << 17), (1 << 22, 1 << 17), (1 << 22, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_rows_are_read(joined, dtype, block, gap, data):
    reader, values = joined
    rows = data.draw(some_rows(data.draw(st.integers(1, 35))))
    region = Region(0, 420, rows[0], rows[1], rows=rows[2], stride=rows[3])
    out = torch.full((region.num_elements + 4,), 9.0, dtype=dtype)
    before = reader.bytes_read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "BLOCK_BYTES", block)
        patch.setattr(checkpoint_module, "_GAP_BYTES", gap)
        reader.read("w", region=region, out=out[2:-2])
    assert torch.equal(out[2:-2], values[elements(rows)].to(dtype))
    assert torch.equal(out[[0, 1, -2, -1]], torch.full((4,), 9.0, dtype=dtype))
    spread = (rows[2] - 1) * rows[3] + rows[1] if rows[1] else 0
    assert 2 * region.num_elements <= reader.bytes_read - before <= 2 * spread
    if gap == 0:
        assert reader.bytes_read - before == 2 * region.num_elements
