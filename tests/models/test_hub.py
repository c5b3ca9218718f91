"""Models of the hub, from a server that stands in for it: what is fetched, and what is told."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from shardes.config.schema import ModelConfig
from shardes.errors import UserError
from shardes.models.hub import check_model, fetch, find_commit
from shardes.runs.journal import read_journal
from tests.helpers.hub_server import hub_server, use_hub
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model, tree

NAME = "some-lab/tiny.model"
FIRST, SECOND = "a" * 40, "b" * 40
SMALL = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What two commits have: the second has other weights. Nobody writes to them."""
    root = tmp_path_factory.mktemp("repository")
    for commit, seed in ((FIRST, 0), (SECOND, 1)):
        tiny_model(root / commit, tied=True, seed=seed)
    return root


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    with hub_server() as hub:
        hub.add(NAME, files / FIRST, commit=FIRST, refs=["main", "v1"])
        use_hub(hub.url, tmp_path / "cache", set_value=monkeypatch.setattr)
        yield hub


def model(revision=None, name=NAME):
    return ModelConfig(path=name, revision=revision)


def fetched(hub):
    """The files that were fetched since the last call."""
    found = sorted(hub.fetched)
    hub.fetched.clear()
    return found


def neighbours(directory):
    """What repositories have besides, and nobody needs."""
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "picture.png", "README.md"):
        (directory / name).write_bytes(b"x" * 50)
    for name in ("onnx/model.onnx", "original/params.json"):
        (directory / name).parent.mkdir()
        (directory / name).write_text("{}")
    (directory / "pytorch_model.bin.index.json").write_text("{}")


def test_only_what_is_needed_is_fetched_and_once(hub, files, tmp_path):
    shutil.copytree(files / FIRST, tmp_path / "repository")
    neighbours(tmp_path / "repository")
    for name in ("LICENSE", "chat_template.jinja", "additional_chat_templates/tools.jinja"):
        (tmp_path / "repository" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "repository" / name).write_text(f"{{# {name} #}}")  # blobs are told apart by content
    hub.add(NAME, tmp_path / "repository", commit=SECOND)
    commit = find_commit(model())
    assert commit == SECOND
    directory = fetch(NAME, commit)
    wanted = {*SMALL, "LICENSE", "chat_template.jinja", "additional_chat_templates/tools.jinja"}
    assert fetched(hub) == sorted({*wanted, "model.safetensors"})
    # The cache is the client's own: links to blobs.
    assert directory == tmp_path / "cache" / "models--some-lab--tiny.model" / "snapshots" / SECOND
    assert (directory / "model.safetensors").is_symlink()
    assert (directory / "model.safetensors").read_bytes() == (
        files / FIRST / "model.safetensors"
    ).read_bytes()
    requests = hub.num_requests
    assert (find_commit(model(SECOND)), fetch(NAME, SECOND)) == (SECOND, directory)
    assert hub.num_requests == requests


@pytest.mark.parametrize("kind", ["sharded", "named"])
def test_the_weights_are_those_that_transformers_loads(hub, files, tmp_path, kind):
    directory = tmp_path / "repository"
    shutil.copytree(files / FIRST, directory)
    neighbours(directory)
    whole = load_file(directory / "model.safetensors")
    parts = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(whole)}
    if kind == "sharded":
        (directory / "model.safetensors").unlink()
        for file in set(parts.values()):
            save_file({n: t for n, t in whole.items() if parts[n] == file}, directory / file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
        wanted = {*parts.values(), "model.safetensors.index.json"}
    else:
        (directory / "model.safetensors").rename(directory / "best[1].safetensors")
        (directory / "best1.safetensors").write_bytes(b"not this")
        config = json.loads((directory / "config.json").read_text())
        config["transformers_weights"] = "best[1].safetensors"
        (directory / "config.json").write_text(json.dumps(config))
        wanted = {"best[1].safetensors"}
    hub.add(NAME, directory, commit=SECOND)
    find_commit(model())
    fetch(NAME, SECOND)
    assert fetched(hub) == sorted(SMALL | wanted)


def test_a_part_in_the_cache_is_made_whole(hub):
    """Another program may have fetched the weights alone; where no hub is, they are enough."""
    find_commit(model())
    fetch(NAME, FIRST)
    directory = fetch(NAME, FIRST)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    fetched(hub)
    fetch(NAME, FIRST)
    assert (directory / "tokenizer.json").is_file()
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    hub.broken_status = 503
    assert fetch(NAME, FIRST) == directory


def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gated(hub, monkeypatch):
    hub.repositories[NAME].is_gated = True


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def unreachable(hub, monkeypatch):
    url = f"http://127.0.0.1:{unused_port()}"
    use_hub(url, constants.HF_HUB_CACHE, set_value=monkeypatch.setattr)


def in_trouble(hub, monkeypatch):
    hub.broken_status = 500


def without(hub, *names, but=()):
    """The repository with some files fewer and others more."""
    repository = hub.repositories[NAME]
    directory = repository.commits[FIRST].parent.parent / "changed"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(repository.commits[FIRST], directory)
    for name in names:
        (directory / name).unlink()
    for name in but:
        (directory / name).write_bytes(b"{}")
    repository.commits[FIRST] = directory


@pytest.mark.parametrize(
    ("change", "asked", "message"),
    [
        (gated, model(), r"is gated: ask for access at http\S+/some-lab/tiny\.model, then log in"),
        (
            None,
            model(name="some-lab/none"),
            "is no directory here, and http.* has no such model, or a private",
        ),
        (None, model(name="nowhere"), "nowhere is no directory here, and http.* has no such model"),
        (None, model("v2"), r"model\.revision: some-lab/tiny\.model has no revision 'v2'; give a branch"),
        (None, model("c" * 40), r"model\.revision: .* has no revision 'c+'"),
        (offline, model(), "HF_HUB_OFFLINE is set, and .* is not wholly in the cache .*; unset it"),
        (unreachable, model(), r"cannot be reached.*not wholly in the cache .* Check the network"),
        (in_trouble, model(), r"cannot be reached \(.*500.*\).*not wholly in the cache"),
        (
            lambda hub, _: without(hub, "model.safetensors", but=["pytorch_model.bin"]),
            model(),
            r"has no model\.safetensors and no .*pytorch_model\.bin is a pickle.*refs/pr/N",
        ),
        (
            lambda hub, _: without(hub, "model.safetensors", but=["consolidated.safetensors"]),
            model(),
            "There is consolidated.safetensors, which transformers does not load",
        ),
        (
            lambda hub, _: without(hub, "model.safetensors", but=["model.gguf"]),
            model(),
            "model.gguf is not read",
        ),
        (
            lambda hub, _: without(hub, "config.json", but=["adapter_config.json"]),
            model(),
            "has no config.json; give a whole model, as an adapter is none",
        ),
    ],
)
def test_what_cannot_be_fetched_is_told(hub, monkeypatch, change, asked, message):
    if change is not None:
        change(hub, monkeypatch)
    with pytest.raises(UserError, match=message):
        fetch(asked.hub_id, find_commit(asked))


def test_a_cache_that_cannot_be_written_is_told(hub, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="some-lab"):
        find_commit(model())


def test_what_is_here_is_a_directory(tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    assert model(name="some-lab/m").hub_id == "some-lab/m"
    shutil.copytree(files / FIRST, tmp_path / "some-lab" / "m")
    assert model(name="some-lab/m").hub_id is None
    check_model(model(name="some-lab/m"))
    with pytest.raises(
        UserError, match=r"model\.revision: got 'v1', but model\.path some-lab/m is a directory"
    ):
        check_model(model("v1", name="some-lab/m"))
    for name in ("/some-lab/m2", "a/b/c", "../m", ".hidden/m"):
        assert model(name=name).hub_id is None, name


def write_config(tmp_path, **changes):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, model=NAME, run_dir=tmp_path / "run", **changes)))
    return path


def shown(result):
    return SimpleNamespace(status=result.returncode, text=result.stdout + result.stderr)


@pytest.fixture
def run(hub, tmp_path):
    """A run of one iteration, begun when main was the first commit."""
    path = write_config(tmp_path, es__iterations=1)
    result = call("train", "--config", path)
    assert result.returncode == 0, result.stderr
    return tmp_path / "run"


def test_a_run_is_of_a_commit(hub, run, files, tmp_path, monkeypatch):
    header = read_journal(run / "journal.jsonl")[0].header
    assert (header["config"]["model"]["path"], header["config"]["model"]["revision"]) == (NAME, FIRST)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["path"] == NAME
    assert f"{NAME}, commit {FIRST}" in call("shardes", "journal", run).stdout
    fetched(hub)
    # main moves on, and the run stays with what it had; so does one on a machine with another cache.
    hub.add(NAME, files / SECOND, commit=SECOND)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other-cache"))
    path = write_config(tmp_path, es__iterations=2)
    for revision in ("main", SECOND):
        refused = shown(call("train", "--config", path, f"model.revision={revision}"))
        assert refused.status == 2
        assert f"is the commit {SECOND}, but this run was begun with {FIRST}" in refused.text
    assert "model.safetensors" not in fetched(hub)
    result = call("train", "--config", path, "model.revision=v1")
    assert result.returncode == 0, result.stderr
    # What the run's own file names is fetched by the person's word alone.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "third-cache"))
    refused = shown(call("shardes", "verify", run))
    assert (refused.status, fetched(hub).count("model.safetensors")) == (2, 1)
    assert f"model.path: {NAME} (fetched over the network" in refused.text
    assert "--base" in refused.text
    assert shown(call("shardes", "verify", run, "--base", NAME)).status == 0
    assert "model.safetensors" in fetched(hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = hub.num_requests
    result = call("shardes", "export", run, tmp_path / "export")
    assert (result.returncode, hub.num_requests) == (0, requests), result.stderr
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"base_model: {NAME}\n" in card
    assert f"`{NAME}`, commit `{FIRST}`" in card
    # By content, a directory is as good.
    assert shown(call("shardes", "verify", run, "--base", files / FIRST)).status == 0
    refused = shown(call("shardes", "verify", run, "--base", files / SECOND))
    assert refused.status == 2
    assert "base_weights_digest of the run is" in refused.text


def test_models_are_evaluated_and_compared_by_name(hub, run, files, tmp_path):
    hub.add(NAME, files / SECOND, commit=SECOND)
    asked = ("--config", tmp_path / "train.yaml")
    rewards = {}
    for name in (NAME, f"{NAME}@v1", f"{NAME}@{SECOND}"):
        result = call("shardes", "evaluate", "--model", name, *asked)
        assert result.returncode == 0, result.stderr
        rewards[name] = json.dumps(json.loads(result.stdout)["sets"])
    assert rewards[NAME] == rewards[f"{NAME}@{SECOND}"] != rewards[f"{NAME}@v1"]
    report = tmp_path / "report.json"
    options = (*asked, "--num-samples", 0, "--json", report)
    result = call("shardes", "compare", f"{NAME}@v1", f"{run}@0", NAME, *options)
    assert result.returncode == 0, result.stderr
    assert [each["model"] for each in json.loads(report.read_text())["models"]] == [
        f"{NAME}@v1",
        f"{run}@0",
        NAME,
    ]


def test_a_plan_fetches_no_weights(hub, tmp_path, monkeypatch):
    path = write_config(tmp_path)
    result = call("shardes", "plan", "--config", path)
    assert result.returncode == 0, result.stderr
    assert "on the hub; all parameters are there, in the right shapes" in result.stdout
    assert fetched(hub) == sorted([*SMALL, "model.safetensors in part"])
    # The same page from the files themselves, but for that.
    there = result.stdout.replace(", on the hub", "")
    fetch(NAME, FIRST)
    requests = hub.num_requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    here = call("shardes", "plan", "--config", path).stdout
    assert hub.num_requests == requests
    assert [line for line in here.splitlines() if not line.startswith("files")] == [
        line for line in there.splitlines() if not line.startswith("files")
    ]
    assert here.count("all parameters are there, in the right shapes") == 1


def test_a_plan_finds_that_headers_and_configuration_do_not_go_together(hub, files, tmp_path):
    directory = tmp_path / "repository"
    shutil.copytree(files / FIRST, directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(3)}, directory / "model.safetensors")
    hub.add(NAME, directory, commit=SECOND)
    result = call("shardes", "plan", "--config", write_config(tmp_path))
    assert result.returncode == 2
    assert "model.norm.weight has shape (3,)" in result.stderr
