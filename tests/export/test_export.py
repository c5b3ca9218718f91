"""Exports: what transformers loads is the session's model, bit for bit, for the last and past iterations."""

import base64
import functools
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from shardes.cli import cli
from shardes.errors import UserError
from shardes.es.update import Perturbation
from shardes.export import writer
from shardes.export.model_card import model_card
from shardes.export.writer import check_destination, export_model
from shardes.models.checkpoint import Checkpoint
from shardes.noise import Region
from shardes.runs.journal import History
from shardes.session import open_session
from shardes.tasks.loading import load_task
from shardes.trainer import make_training_loop
from shardes.weights.snapshot_view import owned_tensors
from tests.helpers.models import make_config, tiny_model

PROMPTS = ["3+7=", "1+2+3=", "77-5="]
CASES = [
    ("qwen2", True, "float32"),
    ("qwen2", True, "bfloat16"),
    ("llama", False, "float32"),
    ("llama", False, "bfloat16"),
]

SETTINGS = {"es.sigma": 0.05}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        (name, tied): tiny_model(root / f"{name}-{tied}", tied=tied, architecture=name)
        for name, tied in (("qwen2", True), ("llama", False))
    }


def trained(config):
    """A session whose weights are those of a finished run."""
    with open_session(config) as session:
        make_training_loop(session, load_task(config.task)).train()
    return session  # one process, plain tensors: there is no job to leave


@pytest.fixture(scope="module")
def runs(model_dirs, tmp_path_factory):
    found = {}
    for name, tied, dtype in CASES:
        root = tmp_path_factory.mktemp("run")
        config = make_config(root, model=model_dirs[name, tied], run_dir=root / "run", model__dtype=dtype)
        found[name, tied, dtype] = trained(config)
    return found


@pytest.fixture
def run(runs):
    return runs["qwen2", True, "float32"]


@pytest.fixture
def invoke(monkeypatch):
    """The command line in this process, without its logging."""
    monkeypatch.setattr("shardes.utils.logs.configure_logging", lambda: None)

    def call(*arguments):
        return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)

    return call


def fingerprint(directory):
    """Hashes of all files but the model card, which says how many iterations were configured."""
    files = sorted(path for path in directory.iterdir() if path.name != "README.md")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored_tensors(directory):
    """Every tensor of every file, with its file; a name in two files fails."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                assert name not in found
                found[name] = (path.name, file.get_tensor(name))
    return found


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@torch.no_grad()
def logits_of(model, tokenizer):
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformers_loads_the_very_model(runs, model_dirs, case, tmp_path):
    session, (name, tied, dtype) = runs[case], case
    out = tmp_path / "export"
    export_model(session, out, settings=SETTINGS, iteration=3)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert model.dtype == getattr(torch, dtype)
    written = json.loads((out / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == (dtype, dtype)
    logits = logits_of(model, tokenizer)
    assert same_bits(logits, logits_of(session.backend.gathered(), tokenizer))
    base = AutoModelForCausalLM.from_pretrained(model_dirs[name, tied], dtype=dtype).eval()
    assert not torch.equal(logits, logits_of(base, tokenizer))
    base_tokenizer = AutoTokenizer.from_pretrained(model_dirs[name, tied])
    assert tokenizer(PROMPTS)["input_ids"] == base_tokenizer(PROMPTS)["input_ids"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert ("lm_head.weight" in stored_tensors(out)) is not tied
    assert model.generation_config.eos_token_id == base.generation_config.eos_token_id


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_the_rounded_master_and_every_one_has_moved(runs, model_dirs, case, tmp_path):
    session, (name, tied, dtype) = runs[case], case
    export_model(session, tmp_path / "export", settings=SETTINGS, iteration=3)
    stored = {key: tensor for key, (_, tensor) in stored_tensors(tmp_path / "export").items()}
    parameters = dict(session.backend.gathered().named_parameters())
    assert set(stored) == set(parameters)
    base = Checkpoint(model_dirs[name, tied])
    for key, tensor in stored.items():
        assert same_bits(tensor, parameters[key].detach())
        before = torch.empty(tensor.numel(), dtype=getattr(torch, dtype))
        base.read(key, region=Region(0, before.numel(), 0, before.numel()), out=before)
        assert (tensor.view(-1) != before).float().mean() > 0.5


@pytest.mark.parametrize("max_file_bytes", [1, 10_000, 60_000, 10**9])
def test_files_keep_their_size_and_the_index_names_each_tensor_once(runs, tmp_path, max_file_bytes):
    run = runs["qwen2", True, "bfloat16"]
    out = tmp_path / "export"
    export_model(run, out, settings=SETTINGS, iteration=3, max_file_bytes=max_file_bytes)
    stored = stored_tensors(out)
    path = out / "model.safetensors.index.json"
    assert path.exists() is (max_file_bytes < 10**9)
    if path.exists():
        index = json.loads(path.read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in stored.items()}
        sizes = [tensor.numel() * tensor.element_size() for _, tensor in stored.values()]
        assert index["metadata"]["total_size"] == sum(sizes)
    files = {}
    for file, tensor in stored.values():
        files.setdefault(file, []).append(tensor.numel() * tensor.element_size())
    assert all(sum(sizes) <= max_file_bytes or len(sizes) == 1 for sizes in files.values())
    if max_file_bytes == 1:
        assert len(files) == len(stored)
    elif max_file_bytes == 10**9:
        assert list(files) == ["model.safetensors"]
    else:
        assert 1 < len(files) < len(stored)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert same_bits(logits_of(model, tokenizer), logits_of(run.backend.gathered(), tokenizer))


def test_an_export_trains_on_as_a_base_model(run, tmp_path):
    export_model(run, tmp_path / "export", settings=SETTINGS, iteration=3)
    config = make_config(tmp_path, model=tmp_path / "export", run_dir=tmp_path / "again")
    with open_session(config) as session:
        assert session.digest() == run.digest()


def test_exporting_changes_nothing_and_is_repeatable(run, tmp_path):
    before = run.digest()
    export_model(run, tmp_path / "a", settings=SETTINGS, iteration=3)
    run.weights.perturb(Perturbation(0, 0, 1.0))  # the centre is exported, whatever the model is
    export_model(run, tmp_path / "b", settings=SETTINGS, iteration=3)
    run.weights.centre()
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert (tmp_path / "a" / "README.md").read_text() == (tmp_path / "b" / "README.md").read_text()
    assert run.digest() == before


def test_only_what_belongs_to_a_model_is_copied(run, model_dirs, tmp_path):
    model = shutil.copytree(model_dirs["qwen2", True], tmp_path / "model")
    wanted = {
        "chat_template.jinja": "t",
        "special_tokens_map.json": "{}",
        "merges.txt": "m",
        "modeling_x.py": "1",
        "qwen.tiktoken": "q",
        "tekken.json": "{}",
        "vocab.bpe": "b",
        "LICENSE": "l",
        "additional_chat_templates/tool_use.jinja": "u",
    }
    left_out = [
        *(
            "optimizer.pt",
            "pytorch_model.bin",
            "train.log",
            "adapter_config.json",
            "adapter_model.safetensors",
        ),
        *(
            "model.safetensors.index.json",
            ".gitattributes",
            "original/params.json",
            "tokenizer/tokenizer.json",
        ),
        *("model.gguf", "trainer_state.json", "additional_chat_templates/notes.txt"),
    ]
    for name, text in (wanted | dict.fromkeys(left_out, "{}")).items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    with open_session(make_config(tmp_path, model=model, run_dir=tmp_path / "run")) as session:
        export_model(session, tmp_path / "export", settings=SETTINGS, iteration=0)
    out = tmp_path / "export"
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert all((out / name).read_text() == text for name, text in wanted.items())
    assert names == set(wanted) | {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert f"digest of the master `{session.digest()}`" in (tmp_path / "export/README.md").read_text()


def test_a_place_that_is_taken_is_refused(run, tmp_path, invoke):
    check_destination(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_destination(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "full", tmp_path / "file"):
        with pytest.raises(UserError, match="exists already"):
            check_destination(out)
        result = invoke("export", run.config.run.dir, out)
        assert isinstance(result.exception, UserError)
        assert str(out) in str(result.exception)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_an_export_is_complete_or_absent(run, tmp_path, monkeypatch):
    out = tmp_path / "export"
    out.mkdir()  # empty: allowed
    gather, calls = writer.gather_centre, []

    def failing(weights, shard, **keywords):
        calls.append(shard)
        if len(calls) == 4:
            raise OSError("no space left")
        return gather(weights, shard, **keywords)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(writer, "gather_centre", failing)
        export_model(run, out, settings=SETTINGS, iteration=3, max_file_bytes=1)
    assert not any(out.iterdir())
    export_model(run, out, settings=SETTINGS, iteration=3)  # over what the dead one left
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert len(list(out.glob("*.safetensors"))) == 1
    export_model(run, tmp_path / "other", settings=SETTINGS, iteration=3)
    assert fingerprint(out) == fingerprint(tmp_path / "other")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("iteration", [0, 1, 2, 3])
def test_a_past_iteration_is_a_run_of_that_length(runs, model_dirs, tmp_path, invoke, dtype, iteration):
    long = runs["qwen2", True, dtype]
    result = invoke("export", long.config.run.dir, tmp_path / "past", "--iteration", iteration)
    assert result.exit_code == 0, result.output
    model = model_dirs["qwen2", True]
    config = make_config(
        tmp_path, model=model, run_dir=tmp_path / "run", model__dtype=dtype, es__iterations=max(iteration, 1)
    )
    if iteration:
        short = trained(config)
    else:
        with open_session(config) as short:
            pass
    export_model(short, tmp_path / "short", settings=SETTINGS, iteration=iteration)
    assert fingerprint(tmp_path / "past") == fingerprint(tmp_path / "short")


def test_without_an_iteration_the_last_weights_are_exported(run, tmp_path, invoke):
    assert invoke("export", run.config.run.dir, tmp_path / "last").exit_code == 0
    export_model(run, tmp_path / "trained", settings=SETTINGS, iteration=3)
    assert fingerprint(tmp_path / "last") == fingerprint(tmp_path / "trained")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "trained"]


def test_an_iteration_that_the_run_does_not_have_is_refused(run, tmp_path, invoke):
    result = invoke("export", run.config.run.dir, tmp_path / "out", "--iteration", 4)
    assert isinstance(result.exception, UserError)
    assert "--iteration 4: the run has 3 iterations" in str(result.exception)
    assert "has 3 iterations" in str(result.exception)
    assert not (tmp_path / "out").exists()


def own_run(run, tmp_path):
    """The run with a base model and data of its own, to be damaged."""
    model = shutil.copytree(run.config.model.path, tmp_path / "model")
    directory = shutil.copytree(run.config.run.dir, tmp_path / "run")
    data = shutil.copyfile(run.config.task.data, tmp_path / "data.jsonl")
    text = (directory / "config.yaml").read_text()
    for old, new in ((run.config.model.path, model), (run.config.task.data, data)):
        text = text.replace(str(old), str(new))
    (directory / "config.yaml").write_text(text)
    return directory, model, data


def test_another_base_model_is_refused(run, tmp_path, invoke):
    directory, model, _ = own_run(run, tmp_path)
    assert invoke("export", directory, tmp_path / "good").exit_code == 0
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    result = invoke("export", directory, tmp_path / "out")
    assert isinstance(result.exception, UserError)
    assert "base_weights_digest" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_data_are_not_needed_to_export(run, tmp_path, invoke):
    directory, _, data = own_run(run, tmp_path)
    data.unlink()
    assert invoke("export", directory, tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_that_of_the_files_and_comes_from_the_master(runs, tmp_path, invoke, dtype):
    session = runs["qwen2", True, "bfloat16"]
    result = invoke("export", session.config.run.dir, tmp_path / "out", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert result.output.endswith(f"3 iterations, {dtype}\n")
    stored = {name: tensor for name, (_, tensor) in stored_tensors(tmp_path / "out").items()}
    wanted = getattr(torch, dtype)
    masters = {shard.name: master.view(shard.shape) for _, shard, master in owned_tensors(session.weights)}
    assert stored.keys() == masters.keys()
    for name, master in masters.items():
        assert same_bits(stored[name], master.to(wanted))
        assert not torch.equal(master, master.to(torch.bfloat16).float())  # there was something to lose
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted
    assert f"dtype {dtype}" in (tmp_path / "out" / "README.md").read_text()


def test_the_size_of_files_is_given_as_people_write_it(run, tmp_path, invoke):
    for size, wanted in (("100KB", 3), ("0.15MiB", 2), ("1000000", 1)):
        result = invoke("export", run.config.run.dir, tmp_path / size, "--max-shard-size", size)
        assert result.exit_code == 0, result.output
        assert len(list((tmp_path / size).glob("*.safetensors"))) == wanted, size
    for size in ("many", "0", "5 bananas", "-1GB"):
        result = invoke("export", run.config.run.dir, tmp_path / "no", "--max-shard-size", size)
        assert result.exit_code == 2
        assert "wanted a number of bytes, or one with a unit" in result.output


def test_the_card_tells_what_the_weights_earned(run, tmp_path, invoke):
    lines = (run.config.run.dir / "metrics.jsonl").read_text().splitlines()
    rewards = {m["iteration"]: m["heldout_reward"] for m in map(json.loads, lines) if "heldout_reward" in m}
    assert list(rewards) == [0, 2, 3]
    invoke("export", run.config.run.dir, tmp_path / "out", "--iteration", 2)
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert "base_model" not in metadata  # nobody knows what the hub calls it
    assert "# qwen2-True, fine-tuned" in card
    assert {"evolution-strategies", "shardes"} <= set(metadata["tags"])
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows == ["| iteration | reward | of it |"] + [f"| {i} | {rewards[i]:.4f} |  |" for i in (0, 2)]
    assert '"es.sigma": 0.05' in card
    assert "after 2 iterations on the task `tests/helpers/rewards.py:spread`" in card


def test_long_curves_are_thinned_and_the_best_stays():
    history = History()
    for i in range(100):
        reward = 2.0 if i == 37 else i / 100
        history.evaluations[i] = {"reward": reward, "components": {"a": 0.5, "b": None}}
    history.evaluations[99]["sets"] = {"other": {"reward": 0.25}}
    card = model_card(
        base=Path("/cache/models--Some-Lab--Model-7B.v2/snapshots/0123abc"),
        base_digest="0",
        task="t",
        iteration=99,
        dtype="float32",
        digest="1",
        settings={},
        history=history,
    )
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert [row[0] for row in rows] == [f"| {i}" for i in (0, 10, 20, 30, 37, 40, 50, 59, 69, 79, 89, 99)]
    assert rows[0][2] == "a 0.5000, b none |"
    assert "| other | 0.2500 |" in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "Some-Lab/Model-7B.v2"
    assert "base model: `Some-Lab/Model-7B.v2`" in card


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to who makes a repository and uploads to it, and what it was sent."""

    def log_message(self, *_):
        pass

    def answer(self, content, status=200):
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def do_GET(self):
        self.answer({"id": "me/tuned", "sha": "0" * 40, "siblings": [], "name": "me"})

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server, url = self.server, f"http://127.0.0.1:{self.server.server_port}/me/tuned"
        if self.headers.get("Authorization") != "Bearer secret":
            self.answer({"error": "Invalid username or password."}, status=401)
        elif self.path == "/api/repos/create":
            server.repositories.append(json.loads(data))
            self.answer({"url": url, "id": "me/tuned", "name": "me/tuned"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(data)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for operation in map(json.loads, data.splitlines()):
                if operation["key"] == "file":
                    value = operation["value"]
                    server.files[value["path"]] = base64.b64decode(value["content"])
                else:
                    server.summaries.append(operation["value"]["summary"])
            commit = {"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            self.answer(commit)
        else:
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.repositories, server.summaries = {}, [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    import huggingface_hub

    endpoint = f"http://127.0.0.1:{server.server_port}"
    api = functools.partial(huggingface_hub.HfApi, endpoint=endpoint, token="secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_export_goes_to_the_hub(run, tmp_path, invoke, hub):
    result = invoke("export", run.config.run.dir, tmp_path / "out", "--push-to-hub", "tuned")
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.output.splitlines()[1] == f"http://127.0.0.1:{hub.server_port}/me/tuned: uploaded"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (made,) = hub.repositories
    assert (made["name"], made.get("private"), made.get("visibility", "private")) in [
        ("tuned", True, "private"),
        ("tuned", None, "private"),
    ]
    assert hub.summaries == ["The weights after 3 iterations, float32"]


def test_what_the_hub_refuses_is_told_before_anything_is_exported(run, tmp_path, invoke, hub, monkeypatch):
    import huggingface_hub

    endpoint = f"http://127.0.0.1:{hub.server_port}"
    real = huggingface_hub.HfApi.func
    monkeypatch.setattr(huggingface_hub, "HfApi", functools.partial(real, endpoint=endpoint, token="wrong"))
    result = invoke("export", run.config.run.dir, tmp_path / "out", "--push-to-hub", "me/tuned")
    assert isinstance(result.exception, UserError)
    assert "--push-to-hub me/tuned: " in str(result.exception)
    assert "hf auth login" in str(result.exception)
    assert not (tmp_path / "out").exists()
    result = invoke("export", run.config.run.dir, tmp_path / "out", "--public")
    assert "--public: it is for --push-to-hub" in str(result.exception)
