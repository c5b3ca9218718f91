"""Ways in which model directories are broken, and words of the message that answers each."""

import json
import os

from safetensors.torch import load_file, save_file

from tests.helpers.safetensors_files import write_index, write_raw


def config_with(**keys):
    """Return a change of keys of config.json."""

    def change(directory):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return change


def text_in(name, text):
    def change(directory):
        (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def remove(name):
    return lambda directory: (directory / name).unlink()


def link_to_nothing(name):
    def change(directory):
        (directory / name).unlink()
        (directory / name).symlink_to("../../blobs/0123456789")

    return change


def pipe(name):
    def change(directory):
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return change


def without_a_tensor(directory):
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def cut_short(directory):
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


def index_of_a_missing_file(directory):
    write_index(directory, {"model.norm.weight": "model-00001-of-00002.safetensors"})
    (directory / "model.safetensors").unlink()


def header_of(entry):
    return lambda directory: write_raw(
        directory / "model.safetensors", {"model.norm.weight": entry}, bytes(8)
    )


DEEP = '{"model_type": ' + "[" * 200_000 + "]" * 200_000 + "}"
BROKEN = {
    "no config": (remove("config.json"), "config.json does not exist"),
    "empty config": (text_in("config.json", ""), "config.json is not valid JSON"),
    "config that is a list": (text_in("config.json", "[1]"), "holds a JSON list, but wanted is an object"),
    "binary config": (text_in("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "deep config": (text_in("config.json", DEEP), "its JSON is nested too deeply"),
    "config of half depth": (config_with(x=json.loads("[" * 900 + "]" * 900)), "config.json cannot be used"),
    "long number": (text_in("config.json", '{"x": ' + "9" * 9999 + "}"), "config.json is not valid JSON"),
    "config behind a broken link": (link_to_nothing("config.json"), "config.json is a link to ../../blobs"),
    "config that is a pipe": (pipe("config.json"), "config.json is a pipe, and not a file"),
    "unknown model": (config_with(model_type="nope"), "model type `nope`"),
    "model type of a number": (config_with(model_type=5), "model type `5`"),
    "text for a number": (config_with(hidden_size="64"), "hidden_size is '64'; wanted: a number"),
    "list for a number": (config_with(vocab_size=[37]), "'vocab_size'"),
    "null for a number": (config_with(num_hidden_layers=None), "'num_hidden_layers'"),
    "zero heads": (config_with(num_attention_heads=0), "num_attention_heads is 0; wanted: a positive number"),
    "negative size": (config_with(intermediate_size=-101), "negative dimension -101"),
    "other heads": (config_with(num_attention_heads=6), "has shape (66, 66); config.json asks for (132, 66)"),
    "billions of layers": (config_with(num_hidden_layers=4 * 10**9), "num_hidden_layers is 4000000000"),
    "ten thousand layers": (config_with(num_hidden_layers=9999), "it would have more than 1140 parameters"),
    "huge vocabulary": (config_with(vocab_size=10**15), "it takes too much memory"),
    "billions of labels": (config_with(num_labels=4 * 10**9), "num_labels is 4000000000"),
    "unknown activation": (
        config_with(hidden_act="nope"),
        "KeyError: 'nope'; this is the value of hidden_act",
    ),
    "unknown rope": (
        config_with(rope_parameters={"rope_type": "nope", "rope_theta": 10000.0}),
        "KeyError: 'nope'; this is the value of rope_parameters.rope_type",
    ),
    "quantised": (config_with(quantization_config={"quant_method": "awq"}), "quantised weights cannot be"),
    "kernel of a hub": (
        config_with(attn_implementation="someone/kernel"),
        "names the kernel 'someone/kernel', which is code that would be fetched",
    ),
    "end token of a text": (
        text_in("generation_config.json", '{"eos_token_id": "x"}'),
        "eos_token_id is 'x'; wanted the id of a token",
    ),
    "a million end tokens": (
        text_in("generation_config.json", json.dumps({"eos_token_id": list(range(10**6))})),
        "eos_token_id has 1000000 ids",
    ),
    "no weights": (
        remove("model.safetensors"),
        "has no *.safetensors files, so no weights",
    ),
    "weights cut short": (cut_short, "the file is cut short"),
    "header of a huge shape": (
        header_of({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}),
        "has 8 bytes, but its shape",
    ),
    "index of a missing file": (index_of_a_missing_file, "names files that are missing"),
    "missing tensor": (without_a_tensor, "missing from the files: model.norm.weight"),
    "no tokenizer": (
        lambda directory: [
            (directory / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")
        ],
        "its tokenizer cannot be loaded",
    ),
    "tokenizer without its vocabulary": (remove("tokenizer.json"), "its tokenizer has no vocabulary"),
    "tokenizer behind a broken link": (link_to_nothing("tokenizer.json"), "tokenizer.json is a link to"),
}
