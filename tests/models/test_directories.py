"""Model directories as people have them: what is loaded is what transformers loads, or it is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, GPT2Config

from shardes.backends.build import make_backend
from shardes.distributed.group import Group
from shardes.errors import UserError
from shardes.export.writer import export_model
from shardes.models.checkpoint import Checkpoint
from shardes.models.files import check_model_directory
from shardes.session import open_session
from shardes.weights.master import Weights
from tests.helpers.broken_models import config_with, link_to_nothing, pipe
from tests.helpers.models import make_config, tiny_model
from tests.helpers.safetensors_files import write_index, write_raw

ALONE = Group(0, 1, torch.device("cpu"))
IDS = torch.arange(24).view(4, 6)
DEEPSEEK = DeepseekV3Config(
    vocab_size=37,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    max_position_embeddings=64,
)
GPT2 = GPT2Config(vocab_size=37, n_embd=48, n_layer=2, n_head=3, n_positions=64)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Directories of models by name, which are copied before they are changed."""
    root = tmp_path_factory.mktemp("originals")
    found = {
        "tied": tiny_model(root / "tied", tied=True),
        "untied": tiny_model(root / "untied", tied=False),
        "llama": tiny_model(root / "llama", tied=False, architecture="llama"),
        "neox": tiny_model(root / "neox", tied=False, architecture="gpt_neox"),
        "sharded": tiny_model(root / "sharded", tied=False, max_shard_size="40KB"),
    }
    for name, config in (("deepseek", DEEPSEEK), ("gpt2", GPT2)):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / name)
        found[name] = root / name
    return found


@pytest.fixture
def directory(originals, tmp_path, request):
    """A copy of the model that the case names first."""
    return shutil.copytree(originals[request.param], tmp_path / "model")


def change(directory, edit, *, to="model.safetensors", **config):
    """Rewrites the tensors of model.safetensors, and keys of config.json."""
    tensors = load_file(directory / "model.safetensors")
    tensors = edit(tensors) or tensors
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, directory / to, metadata={"format": "pt"}
    )
    config_with(**config)(directory)


def scaled(tensors):
    return {name: tensor * 1.5 for name, tensor in tensors.items()}


def add(**more):
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


def old_index(directory):
    change(directory, scaled, to="model-00001-of-00001.safetensors")
    write_index(
        directory,
        dict.fromkeys(load_file(directory / "model.safetensors"), "model-00001-of-00001.safetensors"),
    )


def neighbours(directory):
    for name in ("model_old", "consolidated", "adapter_model", "model.fp16", "optimizer", "a", "z"):
        change(directory, scaled, to=f"{name}.safetensors")
    torch.save({}, directory / "pytorch_model.bin")


def sharded_with_neighbours(directory):
    shards = sorted(directory.glob("model-*.safetensors"))
    save_file(scaled(load_file(shards[0])), directory / "model_old.safetensors", metadata={"format": "pt"})
    save_file(scaled(load_file(shards[0])), directory / "model-00099-of-00099.safetensors")


def whole_beside_an_adapter(directory):
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')


def named_in_config(directory):
    change(directory, scaled, to="best.safetensors", transformers_weights="best.safetensors")


def named_index(directory):
    change(directory, scaled, to="part.safetensors", transformers_weights="best.safetensors.index.json")
    write_index(directory, dict.fromkeys(load_file(directory / "part.safetensors"), "part.safetensors"))
    (directory / "model.safetensors.index.json").rename(directory / "best.safetensors.index.json")


def snapshot_of_links(directory):
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")


def index_behind_a_broken_link(directory):
    (directory / "model.safetensors").symlink_to("nowhere")


def shards_in_a_folder(directory):
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    (directory / "weights").mkdir()
    for file in directory.glob("model-*.safetensors"):
        file.rename(directory / "weights" / file.name)
    write_index(directory, {name: f"weights/{file}" for name, file in weight_map.items()})


def tensor_in_two_shards(directory):
    first, *_, last = sorted(directory.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor * 1.5}, last, metadata={"format": "pt"})


def another_head(directory):
    change(directory, add(lm_head__weight=torch.randn(37, 66, generator=torch.Generator().manual_seed(1))))


def the_same_head(directory):
    change(directory, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})


def a_head_that_rounds_to_the_same(directory):
    change(directory, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] * (1 + 1e-6)})


def only_the_head(directory):
    change(directory, lambda t: t | {"lm_head.weight": t.pop("model.embed_tokens.weight")})


def base_model(directory):
    change(directory, lambda t: {name.removeprefix("model."): tensor for name, tensor in t.items()})


def with_more(prefix, **buffers):
    def edit(directory):
        more = {
            f"{prefix}{i}.{name.replace('__', '.')}": t.clone() for i in (0, 1) for name, t in buffers.items()
        }
        change(directory, lambda tensors: tensors | more)

    return edit


def other_parts(directory):
    more = {"v_head.summary.weight": torch.ones(1, 66), "model.mtp.0.proj.weight": torch.ones(3, 3)}
    change(directory, lambda tensors: tensors | more)


def gpt2_as_published(directory):
    def edit(tensors):
        plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return plain | {f"h.{i}.attn.bias": MASK.clone() for i in (0, 1)}

    change(directory, edit)


def bias_of_experts(directory):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    change(directory, lambda tensors: tensors | {name: torch.tensor([0.5, -0.25, 0.125, 1.0])})


def keys_twice(directory):
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text('{"num_hidden_layers": 7,' + text.strip().removeprefix("{"))


MASK = torch.ones(1, 1, 64, 64).tril()
LIKE_TRANSFORMERS = {
    "dtype of a text": ("tied", config_with(dtype="auto")),
    "whole file beside an old index": ("untied", old_index),
    "whole file beside others": ("untied", neighbours),
    "whole model beside an adapter": ("untied", whole_beside_an_adapter),
    "shards beside others": ("sharded", sharded_with_neighbours),
    "shards in a folder": ("sharded", shards_in_a_folder),
    "tensor in two shards": ("sharded", tensor_in_two_shards),
    "index behind a broken link": ("sharded", index_behind_a_broken_link),
    "file named in config.json": ("untied", named_in_config),
    "index named in config.json": ("untied", named_index),
    "links of a snapshot": ("untied", snapshot_of_links),
    "keys given twice": ("untied", keys_twice),
    "tied, another head": ("tied", another_head),
    "tied, the same head": ("tied", the_same_head),
    "tied, a head that rounds to the same": ("tied", a_head_that_rounds_to_the_same),
    "tied, only the head": ("tied", only_the_head),
    "names of the base model": ("tied", base_model),
    "names of the base model, and a head": ("llama", base_model),
    "other parts": ("untied", other_parts),
    "frequencies": ("llama", with_more("model.layers.", self_attn__rotary_emb__inv_freq=torch.ones(11))),
    "positions": ("llama", with_more("model.layers.", position_ids=torch.arange(64)[None])),
    "masks of bytes": (
        "neox",
        with_more(
            "gpt_neox.layers.",
            attention__bias=MASK.byte(),
            attention__masked_bias=torch.tensor(-1e9),
            attention__rotary_emb__inv_freq=torch.ones(11),
        ),
    ),
    "masks of truth values": ("neox", with_more("gpt_neox.layers.", attention__bias=MASK.bool())),
    "masks without the prefix": (
        "gpt2",
        with_more("h.", attn__bias=MASK, attn__masked_bias=torch.tensor(-1e4)),
    ),
    "masks without the prefix, as its parameters": ("gpt2", gpt2_as_published),
    "buffers that count": ("deepseek", bias_of_experts),
}


def load(tmp_path, directory, dtype):
    config = make_config(tmp_path, model=directory, run_dir=tmp_path / "run", model__dtype=dtype)
    check_model_directory(directory)
    backend = make_backend(config, group=ALONE)
    weights = Weights(backend, seed=1)
    weights.load(Checkpoint(directory))
    return backend.sharded_model


@torch.no_grad()
@pytest.mark.parametrize(
    ("directory", "edit", "dtype"),
    [
        pytest.param(name, edit, dtype, id=f"{case}, {dtype}")
        for case, (name, edit) in LIKE_TRANSFORMERS.items()
        for dtype in ("float32", "bfloat16")
        if dtype == "float32" or name in ("tied", "deepseek")
    ],
    indirect=["directory"],
)
def test_the_model_is_the_one_that_transformers_loads(directory, edit, dtype, tmp_path):
    before = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    edit(directory)
    wanted = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    found = load(tmp_path, directory, dtype)
    shapes = {name: tensor.shape for name, tensor in wanted.named_parameters()}
    assert {name: tensor.shape for name, tensor in found.named_parameters()} == shapes
    for name, buffer in wanted.named_buffers():
        its = found.get_buffer(name)
        assert its.dtype == buffer.dtype and torch.equal(its, buffer), name
    logits = wanted(IDS).logits
    assert torch.equal(found(IDS).logits, logits)
    if edit in (named_in_config, named_index, tensor_in_two_shards, another_head, bias_of_experts):
        assert not torch.equal(before(IDS).logits, logits), "the case shows nothing"


@torch.no_grad()
@pytest.mark.parametrize(
    ("directory", "edit"),
    [("tied", another_head), ("tied", only_the_head), ("deepseek", bias_of_experts)],
    indirect=["directory"],
)
def test_an_export_has_heads_and_buffers_as_the_base_has_them(directory, edit, tmp_path):
    edit(directory)
    with open_session(make_config(tmp_path, model=directory, run_dir=tmp_path / "run")) as session:
        export_model(session, tmp_path / "out", iteration=0, settings={})
    base, made = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "out"))
    assert base.keys() == made.keys()
    assert all(torch.equal(base[name], made[name]) for name in base)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (edit is only_the_head)
    wanted, found = (
        AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()(IDS).logits
        for path in (directory, tmp_path / "out")
    )
    assert torch.equal(wanted, found)


def test_a_run_is_not_resumed_over_other_buffers(originals, tmp_path):
    directory = shutil.copytree(originals["deepseek"], tmp_path / "model")
    config = make_config(tmp_path, model=directory, run_dir=tmp_path / "run")
    with open_session(config) as session:
        header = json.loads(json.dumps(session.identity))
        session.follow(header, tmp_path)
    bias_of_experts(directory)
    with open_session(config) as session:
        with pytest.raises(UserError, match=r"base_buffers_sha256 of the run is .* give the run its base"):
            session.follow(header, tmp_path)
        with pytest.raises(UserError, match="base_buffers_sha256 of the run is None"):
            session.follow({k: v for k, v in header.items() if "buffers" not in k}, tmp_path)


def pickle_only(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def other_name(directory):
    (directory / "model.safetensors").rename(directory / "model.fp16.safetensors")


def in_a_folder(directory):
    (directory / "weights").mkdir()
    (directory / "model.safetensors").rename(directory / "weights" / "model.safetensors")


def broken_shard(directory):
    file = sorted(directory.glob("model-*.safetensors"))[1]
    file.unlink()
    file.symlink_to("../blobs/123")


def of_ranks(directory):
    (directory / "model.safetensors").rename(directory / "shard-00000-model-00001-of-00001.safetensors")


def adapter_alone(directory):
    (directory / "config.json").unlink()
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text("{}")


def one_of_a_training_run(directory):
    inner = directory / "checkpoint-100"
    inner.mkdir()
    (directory / "config.json").rename(inner / "config.json")


def root_of_a_cache(directory):
    inner = directory / "snapshots" / "abc"
    inner.mkdir(parents=True)
    (directory / "config.json").rename(inner / "config.json")


REFUSED = {
    "directory above": ("untied", one_of_a_training_run, "there is one in .*/checkpoint-100: give that"),
    "root of a cache": ("untied", root_of_a_cache, "there is one in .*/snapshots/abc: give that"),
    "pickle only": ("untied", pickle_only, "pytorch_model.bin is a pickle, which is never loaded"),
    "variant only": (
        "untied",
        other_name,
        "There is model.fp16.safetensors, which transformers does not load",
    ),
    "gguf only": (
        "untied",
        lambda d: (d / "model.safetensors").rename(d / "model.gguf"),
        r"model\.gguf is not read: load it with transformers",
    ),
    "folder": ("untied", in_a_folder, "weights/model.safetensors.* if they lie in a directory of their own"),
    "shards without index": (
        "sharded",
        lambda d: (d / "model.safetensors.index.json").unlink(),
        "has no model.safetensors and no model.safetensors.index.json.* write model.safetensors.index.json",
    ),
    "missing shard": (
        "sharded",
        lambda d: sorted(d.glob("model-*.safetensors"))[1].unlink(),
        "names files that are missing: model-00002-of-",
    ),
    "broken link": (
        "untied",
        link_to_nothing("model.safetensors"),
        r"model\.safetensors is a link to \.\./\.\./blobs/0123456789, which does not",
    ),
    "broken shard": ("sharded", broken_shard, "model-00002-of-.* is a link to"),
    "broken tokenizer": (
        "untied",
        link_to_nothing("tokenizer.json"),
        r"tokenizer\.json is a link to \.\./\.\./blobs/0123456789",
    ),
    "pipe as tokenizer": ("untied", pipe("tokenizer.json"), r"tokenizer\.json is a pipe, and not a file"),
    "pipe as weights": ("untied", pipe("model.safetensors"), r"model\.safetensors is a pipe, and not a file"),
    "parts of ranks": ("untied", of_ranks, "is a part of a distributed checkpoint"),
    "adapter alone": ("untied", adapter_alone, "holds an adapter, and no model: merge it"),
    "name outside": (
        "untied",
        config_with(transformers_weights="../model.safetensors"),
        r"transformers_weights is '\.\./model\.safetensors', which is not inside",
    ),
    "name of a pickle": (
        "untied",
        config_with(transformers_weights="pytorch_model.bin"),
        "transformers_weights is 'pytorch_model.bin'; wanted the name of a safetensors",
    ),
    "fewer layers": (
        "untied",
        config_with(num_hidden_layers=1, layer_types=None),
        "unknown to the model",
    ),
    "fewer layers of the base model": (
        "tied",
        lambda d: (base_model(d), config_with(num_hidden_layers=1, layer_types=None)(d)),
        r"unknown to the model: layers\.1\.",
    ),
    "biases": (
        "llama",
        config_with(attention_bias=False),
        r"unknown to the model: model\.layers\.0\.self_attn\.k_proj\.bias",
    ),
    "quantised": (
        "untied",
        with_more("model.layers.", self_attn__q_proj__qweight=torch.ones(3, 3, dtype=torch.int32)),
        "q_proj.qweight is stored as I32.* unquantised version",
    ),
    "quantisation in config.json": (
        "untied",
        config_with(quantization_config={"quant_method": "gptq", "bits": 4}),
        "has a quantization_config; quantised weights cannot be perturbed",
    ),
    "head that is missing": (
        "untied",
        lambda d: change(d, lambda tensors: {k: t for k, t in tensors.items() if k != "lm_head.weight"}),
        r"missing from the files: lm_head\.weight",
    ),
    "buffer of another shape": (
        "deepseek",
        lambda d: change(
            d, lambda t: t | {"model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(5)}
        ),
        r"the buffer .*e_score_correction_bias has shape \(5,\); config.json asks for \(4,\)",
    ),
}


@pytest.mark.parametrize(
    ("directory", "edit", "message"),
    [pytest.param(*case, id=name) for name, case in REFUSED.items()],
    indirect=["directory"],
)
def test_what_cannot_be_loaded_is_refused_with_its_reason(directory, edit, message, tmp_path):
    edit(directory)
    with pytest.raises(UserError, match=rf"(?s)^model\.path: .*{message}"):
        load(tmp_path, directory, "float32")


@pytest.mark.parametrize("heads", [2, 6])
def test_a_model_that_fits_its_files_and_cannot_compute_is_refused(originals, tmp_path, heads):
    # One matrix has queries, keys and values here, so that its shape does not depend on the number of heads.
    directory = shutil.copytree(originals["neox"], tmp_path / "model")
    config_with(num_attention_heads=heads)(directory)
    config = make_config(tmp_path, model=directory, run_dir=tmp_path / "run")
    with (
        pytest.raises(
            UserError, match=r"config\.json of .* describes a model that cannot compute: RuntimeError"
        ),
        open_session(config) as session,
    ):
        session.backend.sharded_model(IDS)


def test_other_failures_stay_what_they_are(originals, tmp_path):
    config = make_config(tmp_path, model=originals["neox"], run_dir=tmp_path / "run")
    with pytest.raises(RuntimeError, match="must match the size"), open_session(config):
        torch.ones(2) + torch.ones(3)


def test_an_adapter_that_transformers_would_apply_is_refused(originals, tmp_path, monkeypatch):
    directory = shutil.copytree(originals["untied"], tmp_path / "model")
    whole_beside_an_adapter(directory)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"holds an adapter .* which transformers would apply"):
        check_model_directory(directory)


def test_a_header_that_repeats_a_name_is_refused(tmp_path):
    entry = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    write_raw(tmp_path / "model.safetensors", b"{" + entry + b"," + entry + b"}", bytes(4))
    with pytest.raises(UserError, match="with different names"):
        Checkpoint(tmp_path)
