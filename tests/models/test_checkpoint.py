"""Reading safetensors: any range of any tensor, no byte more, and a clear word about what cannot be read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shardes.errors import UserError
from shardes.models import checkpoint as checkpoint_module
from shardes.models import headers
from shardes.models.checkpoint import Checkpoint
from shardes.noise import Region
from tests.helpers.safetensors_files import write_index, write_raw, write_sharded

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors_of(dtype, *, seed=0):
    """Values that use the whole precision of the dtype, subnormals and extremes included."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(7, 11, generator=generator, dtype=torch.float64).to(dtype)
    limits = torch.finfo(dtype)
    values.view(-1)[:4] = torch.tensor([limits.max, limits.tiny / 2, -0.0, 1 + limits.eps], dtype=dtype)
    return {
        "b.weight": values,
        "a.bias": values[0, ::2].clone(),
        "c": values.view(-1)[:60].view(3, 4, 5).clone(),
    }


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def read(checkpoint, name, start, length, dtype):
    out = torch.full((length,), 9.0, dtype=dtype)
    checkpoint.read(name, region=Region(0, 2**34, start, out.numel()), out=out)
    return out


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """For each dtype, tensors spread over three files, and their directory."""
    found = {}
    for dtype in DTYPES:
        tensors = tensors_of(dtype)
        parts = [{name: tensor} for name, tensor in tensors.items()]
        found[dtype] = tensors, write_sharded(tmp_path_factory.mktemp("stored"), parts)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_range_has_the_bits_of_the_tensor_and_reads_no_byte_more(stored, dtype, data):
    tensors, directory = stored[dtype]
    checkpoint = Checkpoint(directory)
    name = data.draw(st.sampled_from(sorted(tensors)))
    flat = tensors[name].view(-1)
    start = data.draw(st.integers(0, flat.numel()))
    length = data.draw(st.integers(0, flat.numel() - start))
    wanted = flat[start : start + length]
    assert same_bits(read(checkpoint, name, start, length, dtype), wanted)
    assert checkpoint.bytes_read == length * dtype.itemsize
    assert same_bits(read(checkpoint, name, start, length, torch.float32), wanted.to(torch.float32))
    assert checkpoint.bytes_read == 2 * length * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_dtypes_are_those_of_the_tensors(stored, dtype):
    tensors, directory = stored[dtype]
    checkpoint = Checkpoint(directory)
    assert {name: (t.dtype, t.shape, t.num_elements) for name, t in checkpoint.tensors.items()} == {
        name: (dtype, tuple(t.shape), t.numel()) for name, t in tensors.items()
    }
    assert checkpoint.bytes_read == 0


def test_a_long_read_is_cut_into_pieces(stored, monkeypatch):
    tensors, directory = stored[torch.float64]
    monkeypatch.setattr(checkpoint_module, "_READ_BYTES", 24)
    checkpoint = Checkpoint(directory)
    assert same_bits(read(checkpoint, "b.weight", 5, 50, torch.float64), tensors["b.weight"].view(-1)[5:55])
    assert checkpoint.bytes_read == 400


def test_only_the_files_that_an_index_names_are_read(tmp_path):
    tensors = tensors_of(torch.float32)
    save_file(tensors, tmp_path / "one.safetensors")
    (tmp_path / "other.safetensors").write_text("no weights at all")
    assert "There is one.safetensors, other.safetensors, which transformers does not load" in refusal(
        tmp_path
    )
    write_index(tmp_path, dict.fromkeys(tensors, "one.safetensors"))
    assert sorted(Checkpoint(tmp_path).tensors) == sorted(tensors)


def test_the_hash_of_headers_follows_names_shapes_and_dtypes_but_not_values(tmp_path):
    def hash_of(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return Checkpoint(tmp_path).header_sha256

    tensors = tensors_of(torch.float32)
    first = hash_of(tensors)
    assert hash_of(tensors_of(torch.float32, seed=1)) == first
    assert hash_of(tensors | {"c": tensors["c"].view(4, 3, 5)}) != first
    assert hash_of(tensors | {"c": tensors["c"].half()}) != first
    assert hash_of(tensors | {"d": tensors["c"].clone()}) != first


def refusal(directory):
    with pytest.raises(UserError) as caught:
        Checkpoint(directory)
    message = str(caught.value)
    assert message.startswith("model.path: ")
    assert str(directory) in message
    return message


def test_a_directory_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        assert "is not a directory" in refusal(path)


def test_a_directory_without_safetensors_is_refused_and_a_pickle_is_called_one(tmp_path):
    message = refusal(tmp_path)
    assert "has no *.safetensors files" in message
    assert "pickle" not in message
    torch.save(tensors_of(torch.float32), tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which is never loaded" in refusal(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors_of(torch.bfloat16), path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert "cut short" in refusal(tmp_path)
    path.write_bytes(data + b"!")
    assert "has 1 bytes that belong to no tensor" in refusal(tmp_path)
    path.write_bytes(data)
    assert len(Checkpoint(tmp_path).tensors) == 3


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"not JSON at all",
        b"\xff\xfe\x00\x80",
        b"",
        b'{"a": {"dtype": "F32"',
        b"[]",
        {"a": {}},
        {"a": 3},
        {"a": ENTRY | {"data_offsets": [0]}},
        {"a": ENTRY | {"shape": [3]}},
        {"a": ENTRY | {"data_offsets": [8, 0]}},
        {"a": ENTRY | {"data_offsets": [-8, 0]}},
        {"a": ENTRY | {"shape": [2**40, 2**40]}},
        {
            "a": ENTRY | {"shape": [0], "data_offsets": [0, 0]},
            "b": ENTRY | {"shape": [1], "data_offsets": [4, 8]},
        },
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a":' + b"[" * 100_000,
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_garbage_header_is_refused(tmp_path, header):
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    assert "model.safetensors" in refusal(tmp_path)


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert "is not a safetensors file, or is cut short" in refusal(tmp_path)


def test_the_plain_header_of_those_cases_is_accepted(tmp_path):
    write_raw(
        tmp_path / "model.safetensors", {"a": ENTRY, "__metadata__": {"x": "y"}}, b"\0\0\x80\x3f\0\0\0\xc0"
    )
    assert read(Checkpoint(tmp_path), "a", 0, 2, torch.float32).tolist() == [1.0, -2.0]


@pytest.mark.parametrize("dtype", ["I8", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4"])
def test_integers_and_quantised_weights_are_refused(tmp_path, dtype):
    num_bytes = 4 if dtype == "F4" else 4 * headers.ANY_DTYPES[dtype].itemsize
    entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, num_bytes]}
    write_raw(tmp_path / "model.safetensors", {"a.qweight": entry}, bytes(num_bytes))
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path).check_matches({"a.weight": (4,)}, aliases=set())
    assert f"a.qweight is stored as {dtype}; wanted one of ['BF16', 'F16', 'F32', 'F64']" in str(caught.value)
    assert "unquantised" in str(caught.value)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path):
    parts = [{name: tensor} for name, tensor in tensors_of(torch.float32).items()]
    directory = write_sharded(tmp_path, parts)
    (directory / "model-00002-of-00003.safetensors").unlink()
    message = refusal(directory)
    assert "names files that are missing: model-00002-of-00003.safetensors" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_garbage_index_is_refused(tmp_path, text):
    save_file(tensors_of(torch.float32), tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path)


@pytest.fixture
def small(tmp_path):
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros(4), "tied": torch.zeros(4)}, tmp_path / "model.safetensors"
    )
    return Checkpoint(tmp_path)


def mismatch(checkpoint, shapes, aliases=frozenset()):
    with pytest.raises(UserError) as caught:
        checkpoint.check_matches(shapes, aliases=set(aliases))
    assert str(caught.value).startswith(f"model.path: {checkpoint.directory}: ")
    return str(caught.value)


def test_the_models_parameters_are_accepted_with_and_without_stored_aliases(small):
    small.check_matches({"a": (2, 3), "b": (4,), "tied": (4,)}, aliases=set())
    small.check_matches({"a": (2, 3), "b": (4,)}, aliases={"tied"})
    small.check_matches({"a": (2, 3), "b": (4,)}, aliases={"tied", "an.alias.that.no.file.holds"})


def test_missing_and_left_over_tensors_are_named(small):
    message = mismatch(small, {"a": (2, 3), "c": (1,), "d": (1,)}, {"tied"})
    assert "missing from the files: c, d; unknown to the model: b" in message
    message = mismatch(small, {"a": (2, 3)}, {"b"})
    assert "unknown to the model: tied" in message
    assert "missing from" not in message
    many = {f"p{i:02d}": (1,) for i in range(12)}
    assert "p00, p01, p02, p03, p04 and 7 more" in mismatch(small, many)


@pytest.mark.parametrize("shape", [(3, 2), (6,), (2, 3, 1), (2, 4)])
def test_another_shape_is_refused_even_with_as_many_elements(small, shape):
    message = mismatch(small, {"a": shape, "b": (4,)}, {"tied"})
    assert f"a has shape (2, 3); config.json asks for {shape}" in message
