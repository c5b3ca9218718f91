"""The map of a model's own loaders: what they copy is found, and what is no copy of the files is refused."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shardes.backends.shard import Shard, ShardSpan
from shardes.backends.vllm.backend import VllmBackend, _check_derived, _check_unquantised
from shardes.backends.vllm.launch import _check_arguments, import_vllm
from shardes.backends.vllm.mapping import make_shards, mark_copies
from shardes.backends.vllm.recording import FileTensor, record_copies
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.models.build import skeleton_of
from tests.helpers.models import make_config, tiny_model

CPU = torch.device("cpu")


def weights_of(**shapes):
    return {name: nn.Parameter(torch.randn(*shape), requires_grad=False) for name, shape in shapes.items()}


def mapped(targets, load, **shapes):
    """The shards of parameters that are files of their own."""
    files = [FileTensor(name, shape, name, 0) for name, shape in shapes.items()]
    before = {name: target.clone() for name, target in targets.items()}
    copies = record_copies(load, targets, files, dtype=torch.float32)
    assert all(torch.equal(before[name], target) for name, target in targets.items()), "nothing is loaded"
    shards = make_shards(targets, copies, shapes=shapes, dtype=torch.float32, device=CPU)
    return {shard.name: shard for shard in shards}


def indices_of(shard):
    """Row-major indices of a shard's elements in the parameter, in the order of the shard."""
    found = torch.full(shard.local.shape, -1)
    for span in shard.spans:
        rows = span.global_start + torch.arange(span.rows)[:, None] * span.stride + torch.arange(span.length)
        span.of(found).copy_(rows.view(-1))
    return found.tolist()


def test_parts_of_matrices_are_found_where_they_are_merged():
    """The second of two ranks: rows of two matrices in one, columns of a third, the end of a vocabulary."""
    targets = weights_of(merged=(5, 4), columns=(3, 2), words=(4, 3))
    targets["words"].data[2:] = 0  # padding

    def load(tensors):
        for name, tensor in tensors:
            if name == "down":
                targets["columns"].data.copy_(tensor.narrow(1, 2, 2))
            elif name == "words":
                targets["words"].data[:2].copy_(tensor[4:])
                targets["words"].data[2:].fill_(0)
            else:
                first, count = (0, 3) if name == "gate" else (3, 2)
                targets["merged"].data.narrow(0, first, count).copy_(tensor.chunk(2)[1])

    shapes = {"gate": (6, 4), "up": (4, 4), "down": (3, 4), "words": (6, 3)}
    shards = mapped(targets, load, **shapes)
    assert list(shards) == sorted(shapes)
    assert indices_of(shards["gate"]) == list(range(12, 24))
    assert indices_of(shards["up"]) == list(range(8, 16))
    assert indices_of(shards["down"]) == [2, 3, 6, 7, 10, 11]
    assert len(shards["down"].spans) == 1, "rows a fixed stride apart are one span"
    assert indices_of(shards["words"]) == list(range(12, 18))
    assert shards["up"].local.data_ptr() == targets["merged"][3].data_ptr(), "shards are the weights"
    assert [shards[name].param_id for name in sorted(shapes)] == [0, 1, 2, 3]


def test_experts_lie_apart_and_a_rank_may_hold_nothing():
    targets = weights_of(experts=(2, 4, 3), padding=(1, 2))
    targets["padding"].data.zero_()

    def load(tensors):
        for name, tensor in tensors:
            if name == "words":
                targets["padding"].data[:0].copy_(tensor[9:])
            else:
                for expert in range(2):
                    targets["experts"].data[expert, :2].copy_(tensor[expert, 4:6])
                    targets["experts"].data[expert, 2:].copy_(tensor[expert, 0:2])

    shards = mapped(targets, load, experts=(2, 6, 3), words=(9, 2))
    wanted = [*range(12, 18), *range(6), *range(30, 36), *range(18, 24)]
    assert indices_of(shards["experts"]) == wanted
    assert (shards["words"].spans, shards["words"].local.numel()) == ((), 0)


def test_files_that_are_parts_of_one_parameter_are_joined():
    targets = weights_of(both=(4, 2))
    files = [FileTensor("b", (2, 2), "both", 4), FileTensor("a", (2, 2), "both", 0)]

    def load(tensors):
        for name, tensor in tensors:
            targets["both"].data["ab".index(name) * 2 :][:2].copy_(tensor)

    copies = record_copies(load, targets, files, dtype=torch.float32)
    (shard,) = make_shards(targets, copies, shapes={"both": (4, 2)}, dtype=torch.float32, device=CPU)
    assert shard.spans == (ShardSpan(0, 0, 8),)


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda target, tensor: target.copy_(tensor.t()), "keeps w transposed"),
        (lambda target, tensor: target.copy_(tensor * 2), "w is not held .* something it has computed"),
        (lambda target, tensor: target.copy_(torch.ones(2, 2)), "w is not held .* something it has computed"),
        (lambda target, tensor: target.mul_(2), "w is not held .* writes aten.mul_"),
        (lambda target, tensor: target.fill_(1), "w is not held .* writes aten.fill_"),
        (lambda target, tensor: target.fill_(tensor[0, 0].item()), "w is not held"),
        (lambda target, tensor: target[0].copy_(tensor[0]), "2 elements of w come from no tensor"),
        (lambda target, tensor: [target[i].copy_(tensor[i // 2]) for i in (0, 1)], None),
        (lambda target, tensor: [target.copy_(tensor), target[0].copy_(tensor[1])], "from several places"),
    ],
)
def test_what_is_no_copy_of_the_files_is_refused_by_name(put, message):
    targets = weights_of(w=(2, 2))

    def load(tensors):
        for _, tensor in tensors:
            put(targets["w"].data, tensor)

    if message is None:  # the first row twice, the second nowhere: as many elements as there should be
        shard = mapped(targets, load, w=(2, 2))["w"]
        with pytest.raises(UserError, match=r"some elements of w are held twice, .* by none of the 1 rank"):
            mark_copies([shard], Group(0, 1, CPU))
        return
    with pytest.raises(UserError, match=message) as caught:
        mapped(targets, load, w=(2, 2))
    assert "set parallel.backend: fsdp or zero3" in str(caught.value)


def test_a_replaced_weight_and_another_dtype_are_refused():
    targets = weights_of(w=(2, 2))

    def replace_it(tensors):
        for _, _ in tensors:
            targets["w"].data = torch.zeros(2, 2)

    with pytest.raises(UserError, match="its loader replaces it"):
        mapped(targets, replace_it, w=(2, 2))
    targets = {"w": nn.Parameter(torch.randn(2, 2, dtype=torch.float64))}

    def copy_it(tensors):
        for _, tensor in tensors:
            targets["w"].data.copy_(tensor)

    with pytest.raises(UserError, match=r"keeps w with the dtype torch.float64 instead of model.dtype"):
        mapped(targets, copy_it, w=(2, 2))


def test_a_weight_that_is_computed_when_loading_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].view_of_it = model[0].weight.data.t()
    model[0].kv_cache = torch.zeros(2, 2)
    _check_derived(model)
    model[0].absorbed = model[0].weight.data @ model[0].weight.data
    with pytest.raises(UserError, match=r"computes 0.absorbed, of shape \(2, 2\), from the weights"):
        _check_derived(model)


class Ranks(Group):
    """A group whose other ranks are made up."""

    def __new__(cls, *_):
        return object.__new__(cls)

    def __init__(self, rank, others):
        super().__init__(rank, len(others), CPU)
        object.__setattr__(self, "others", others)

    def gather_json(self, value):
        return self.others


def held(*spans):
    return [list(vars(span).values()) for span in spans]


def test_elements_that_several_ranks_hold_are_counted_once():
    low, high = held(ShardSpan(0, 0, 4)), held(ShardSpan(0, 4, 4))
    every = [{"kv": low}, {"kv": low}, {"kv": high}, {"kv": high}]
    for rank, is_copy in enumerate([False, True, False, True]):
        span = ShardSpan(*every[rank]["kv"][0])
        shard = Shard("kv", 0, (8,), torch.zeros(4), (span,))
        (marked,), spans = mark_copies([shard], Ranks(rank, every))
        assert marked.is_copy is is_copy
        assert spans["kv"][2] == (ShardSpan(0, 4, 4),)
    partly = [{"kv": low}, {"kv": held(ShardSpan(0, 2, 6))}]
    shard = Shard("kv", 0, (8,), torch.zeros(4), (ShardSpan(0, 0, 4),))
    with pytest.raises(UserError, match=r"some elements of kv are held twice, .* the 2 rank"):
        mark_copies([shard], Ranks(0, partly))


def test_vllm_missing_or_old_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        UserError, match=r"needs vLLM 0.32 or later, .* cannot be imported .*'shardes\[vllm\]'"
    ):
        import_vllm()
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.31.2"))
    with pytest.raises(UserError, match=r"needs vLLM 0.32 or later; this is 0.31.2"):
        import_vllm()
    for version in ("0.32.0", "0.33.0rc1", "1.0.0", "0.1.dev100+gabc"):
        module = SimpleNamespace(__version__=version)
        monkeypatch.setitem(sys.modules, "vllm", module)
        assert import_vllm() is module


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quantization", "quantised weights cannot be perturbed"),
        ("dtype", "set by model.dtype"),
        ("kv_cache_memory_bytes", "set by rollout.kv_cache_gib"),
        ("pipeline_parallel_size", "cannot be set"),
        ("worker_extension_cls", "; wanted: async_scheduling, "),
    ],
)
def test_arguments_that_shards_cannot_do_with_are_refused(name, message):
    _check_arguments({"max_num_seqs": 4})
    with pytest.raises(UserError, match=rf"rollout.vllm: (got )?{name}.*{message}"):
        _check_arguments({"max_num_seqs": 4, name: "x"})


def test_a_quantised_model_is_refused(tmp_path):
    model = tiny_model(tmp_path / "m", tied=True)
    config = make_config(tmp_path, model=model, run_dir=tmp_path / "run")
    skeleton = skeleton_of(config)
    _check_unquantised(config, skeleton)
    skeleton.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UserError, match=r"is quantised .* use the model's unquantised version"):
        _check_unquantised(config, skeleton)


def test_a_plan_needs_no_vllm(tmp_path):
    model = tiny_model(tmp_path / "m", tied=True, architecture="llama", num_heads=4, num_kv_heads=2)
    skeleton = skeleton_of(make_config(tmp_path, model=model, run_dir=tmp_path / "run"))
    sizes = {name: p.numel() for name, p in skeleton.named_parameters()}
    one = VllmBackend.footprint(skeleton, num_ranks=1).held
    embedding = "model.embed_tokens.weight"
    assert one == sizes | {embedding: 64 * 88}, "padded to 64 words"
    four = VllmBackend.footprint(skeleton, num_ranks=4).held
    layer = "model.layers.0.self_attn."
    assert four[embedding] == 16 * 88
    assert four[f"{layer}q_proj.weight"] == sizes[f"{layer}q_proj.weight"] // 4
    assert four[f"{layer}k_proj.weight"] == sizes[f"{layer}k_proj.weight"] // 2, "two ranks share a head"
    assert four["model.norm.weight"] == sizes["model.norm.weight"]
    with pytest.raises(UserError, match="4 attention heads, which 3 ranks cannot share"):
        VllmBackend.footprint(skeleton, num_ranks=3)
