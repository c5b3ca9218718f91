"""Every element of every parameter has one owner, for layouts too large to start."""

import functools
import math

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from shardes.backends.layout import Layout, Split, flat_layout
from shardes.noise import Region


def elements(spans):
    """Global indices in the order of the shard, and a check that rows lie back to back in it."""
    found, local = [], 0
    for span in spans:
        assert span.local_start == local
        local += span.num_elements
        for row in range(span.rows):
            start = span.global_start + row * span.stride
            found += range(start, start + span.length)
    return found


def torch_chunks(layout, coordinate):
    """The same by torch: each axis of the mesh chunks what the axis before it left."""
    part = torch.arange(math.prod(layout.shape)).view(layout.shape or (1,))
    for split, size, index in zip(layout.splits, layout.mesh, coordinate, strict=True):
        if split is None:
            continue
        mine = [
            chunk
            for piece in torch.chunk(part, split.num_pieces, split.dim)
            for chunk in torch.chunk(piece, size, split.dim)[index : index + 1]
        ]
        part = torch.cat(mine, split.dim) if mine else part.narrow(split.dim, 0, 0)
    return part.flatten().tolist()


@st.composite
def layouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    mesh = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    split = st.builds(Split, st.integers(0, max(0, len(shape) - 1)), st.sampled_from([1, 1, 2, 3]))
    splits = tuple(draw(st.one_of(st.none(), split)) for _ in mesh)
    return Layout(shape, mesh, splits)


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_runs_are_what_torch_gives_each_rank(layout):
    for coordinate in np.ndindex(*layout.mesh):
        assert elements(layout.spans(coordinate)) == torch_chunks(layout, coordinate)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_every_element_has_one_owner_in_random_layouts(layout):
    assert_partition(layout)


@given(st.integers(1, 5000), st.integers(1, 1024))
@settings(max_examples=100, deadline=None)
def test_flat_parts_are_equal_but_for_the_last(num_elements, world_size):
    layout = flat_layout(num_elements, world_size=world_size)
    size = -(-num_elements // world_size)
    owned = [sum(span.num_elements for span in layout.spans((rank,))) for rank in range(world_size)]
    assert owned == [max(0, min(size, num_elements - size * rank)) for rank in range(world_size)]
    assert_partition(layout)


def test_splits_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="wanted as many"):
        Layout((4, 4), (2, 2), (Split(0),))
    with pytest.raises(ValueError, match="does not fit the shape"):
        Layout((4, 4), (2,), (Split(2),))


def test_columns_are_one_run_of_rows():
    (span,) = Layout((8192, 28672), (8,), (Split(1),)).spans((3,))
    assert (span.rows, span.length, span.stride, span.global_start) == (8192, 3584, 28672, 3 * 3584)


def assert_partition(layout):
    """Ranks that differ on a splitting axis share nothing and leave nothing; others own the same."""
    num_elements = math.prod(layout.shape)
    is_split = [split is not None for split in layout.splits]
    distinct: dict[tuple[int, ...], tuple] = {}
    for coordinate in np.ndindex(*layout.mesh):
        spans = layout.spans(coordinate)
        key = tuple(index if split else 0 for index, split in zip(coordinate, is_split, strict=True))
        assert distinct.setdefault(key, spans) == spans, "replicas own alike"
        local, last = 0, -1
        for span in spans:
            assert span.local_start == local
            local += span.num_elements
            assert span.global_start > last, "ascending"
            # A region refuses what is out of bounds or overlaps itself.
            last = (
                Region(
                    0, num_elements, span.global_start, span.length, rows=span.rows, stride=span.stride
                ).end
                - 1
            )
    starts, ends = [], []
    for spans in distinct.values():
        for span in spans:
            first = span.global_start + span.stride * np.arange(span.rows, dtype=np.int64)
            starts.append(first)
            ends.append(first + span.length)
    if num_elements == 0:
        assert not starts
        return
    start, end = np.sort(np.concatenate(starts)), np.sort(np.concatenate(ends))
    assert start[0] == 0 and end[-1] == num_elements
    assert (start[1:] == end[:-1]).all(), "no gap, no overlap"


LARGE = {
    "Llama-3-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, num_hidden_layers=1,
    ),
    "Qwen2.5-72B": Qwen2Config(
        hidden_size=8192, intermediate_size=29568, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=152064, num_hidden_layers=1,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        hidden_size=4096, intermediate_size=12288, num_attention_heads=64, num_key_value_heads=4,
        head_dim=128, moe_intermediate_size=1536, num_experts=128, vocab_size=151936, num_hidden_layers=1,
    ),
}  # fmt: skip
# What the styles of transformers' plans do to a parameter: outputs, inputs or stacked outputs are split.
STYLES = {
    "rowwise": -1,
    "rowwise_split_input": -1,
    "embedding_rowwise": 0,
    "colwise": -2,
    "packed_colwise": -2,
}


def tensor_split(name, ndim, plan):
    """The split of a parameter by a plan, as ``apply_tensor_parallelism`` makes it."""
    generic = name.replace(".0.", ".*.")
    style = plan.get(generic) or plan.get(generic.rpartition(".")[0])
    style = "colwise" if style == "colwise_gather_output" else style
    if style not in STYLES or (name.endswith("bias") and style.startswith("rowwise")):
        return None
    dim = 0 if style == "embedding_rowwise" else max(0, STYLES[style] + ndim) if ndim > 1 else 0
    return Split(dim, 2 if style == "packed_colwise" else 1)


@functools.cache
def parameters(model_name):
    """Shape and tensor parallel split of the distinct parameters of a layer, an embedding and a head."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(LARGE[model_name])
    return {
        (tuple(p.shape), tensor_split(name, p.ndim, model.tp_plan)) for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("world_size", [3, 8, 64, 1024])
@pytest.mark.parametrize("model_name", LARGE)
def test_every_element_has_one_owner_in_zero3_and_fsdp(model_name, world_size):
    for shape, _ in parameters(model_name):
        assert_partition(flat_layout(math.prod(shape), world_size=world_size))
        assert_partition(Layout(shape, (world_size,), (Split(0),)))


@pytest.mark.parametrize("world_size", [2, 8, 16])
@pytest.mark.parametrize("model_name", LARGE)
def test_every_element_has_one_owner_in_tensor_parallelism(model_name, world_size):
    split = [(shape, split) for shape, split in parameters(model_name) if split is not None]
    assert len(split) > 4
    for shape, by in split:
        assert_partition(Layout(shape, (world_size,), (by,)))


@pytest.mark.parametrize("mesh", [(2, 4), (16, 8), (128, 8)])
@pytest.mark.parametrize("model_name", LARGE)
def test_every_element_has_one_owner_in_two_dimensional_meshes(model_name, mesh):
    """Replicas of FSDP shards, and FSDP shards of tensor parallel ones."""
    for shape, by in parameters(model_name):
        assert_partition(Layout(shape, mesh, (None, Split(0))))
        if by is not None and by.dim == 0:
            # FSDP2 shards what tensor parallelism left, on the same dimension: pieces first.
            assert_partition(Layout(shape, mesh, (Split(0, mesh[1]), Split(0))))
        elif by is not None and by.num_pieces == 1:
            assert_partition(Layout(shape, mesh, (Split(0), by)))
