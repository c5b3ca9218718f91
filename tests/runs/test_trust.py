"""Somebody else's run directory: what it asks for besides being read takes the word of the person."""

import json
import shutil

import pytest
import yaml

from shardes.api import TrainConfig
from shardes.config import task as task_section
from shardes.config.consent import load_trusted
from shardes.config.loading import load_run_config
from shardes.config.schema import Config
from shardes.config.section import NeedsConsent
from shardes.errors import UserError
from shardes.evaluation.model_ref import resolve_model
from shardes.runs.directory import RunDirectory, read_run
from shardes.runs.journal import read_journal
from tests.helpers.inprocess import call
from tests.helpers.models import QUICKSTART
from tests.helpers.old_runs import install
from tests.runs.test_journal import HEADER

CODE = """
import os, pathlib
from transformers import {name}Config, {name}ForCausalLM
pathlib.Path(os.environ["PAYLOAD"]).touch()
class Config({name}Config):
    pass
class Model({name}ForCausalLM):
    config_class = Config
"""


@pytest.fixture
def run_dir(tmp_path):
    """A run of the quickstart's model, whose model directory is its own."""
    directory = install("plain", tmp_path)
    shutil.copytree(QUICKSTART / "model", tmp_path / "model")
    change(directory, "model.path", str(tmp_path / "model"))
    return directory


@pytest.fixture
def payload(tmp_path, monkeypatch):
    """A file that exists once the code in the model directory has run."""
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "payload"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "payload"


def change(run_dir, key, value):
    path = run_dir / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    place, (*sections, last) = tree, key.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    path.write_text(yaml.safe_dump(tree))


def add_code(run_dir):
    """Gives the model directory code, as models of the hub have it; the run says that it may run."""
    model = run_dir.parent / "model"
    config = json.loads((model / "config.json").read_text())
    kind = config["architectures"][0].removesuffix("ForCausalLM")
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config["model_type"] = "own"
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(CODE.format(name=kind))
    change(run_dir, "model.trust_remote_code", True)


def commands(run_dir):
    return {
        "verify": ("verify", run_dir),
        "export": ("export", run_dir, run_dir.parent / "out"),
        "evaluate": ("evaluate", "--model", run_dir, "parallel.backend=single"),
        "plan": ("plan", "--config", run_dir / "config.yaml"),
        "train": ("train", "--config", run_dir / "config.yaml", f"run.dir={run_dir}"),
    }


@pytest.mark.parametrize("command", ["verify", "export", "evaluate", "plan", "train"])
def test_code_of_a_model_directory_does_not_run_because_the_run_says_so(command, run_dir, payload):
    add_code(run_dir)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    result = call("shardes", *commands(run_dir)[command])
    assert result.returncode == 2, result.stderr
    assert "model.trust_remote_code: True (code in the model directory runs)" in result.stderr
    assert "--trust-remote-code" in result.stderr
    assert not payload.exists()
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_saying_no_is_no_consent_to_what_the_run_says(run_dir, payload, tmp_path):
    """Another file is asked about: what is changed is that file, and the run's own setting stays."""
    (tmp_path / "mine.yaml").write_text((run_dir / "config.yaml").read_text())
    add_code(run_dir)
    asked = ("evaluate", "--model", run_dir, "--config", tmp_path / "mine.yaml", "parallel.backend=single")
    result = call("shardes", *asked)
    assert result.returncode == 2
    assert "model.trust_remote_code: True (code in the model directory runs)" in result.stderr
    result = call("shardes", *asked, "model.trust_remote_code=false")
    assert result.returncode == 2
    assert not payload.exists()


def test_code_runs_if_the_person_says_so(run_dir, payload):
    add_code(run_dir)
    result = call("shardes", *commands(run_dir)["verify"], "--trust-remote-code")
    assert payload.exists(), result.stderr


def test_code_does_not_run_if_nobody_says_so(run_dir, payload):
    add_code(run_dir)
    change(run_dir, "model.trust_remote_code", False)
    result = call("shardes", *commands(run_dir)["verify"])
    assert result.returncode == 2
    assert not payload.exists()


def test_a_run_that_trusts_a_model_without_code_needs_no_consent(run_dir):
    change(run_dir, "model.trust_remote_code", True)
    config, *_ = read_run(run_dir, base=None, backend="single")
    assert config.model.trust_remote_code is False
    config, *_ = read_run(run_dir, base=None, backend="single", is_trusted=True)
    assert config.model.trust_remote_code is True


@pytest.mark.parametrize("value", ["someone/kernel", {"": "someone/kernel"}], ids=str)
def test_a_kernel_of_a_hub_takes_consent(run_dir, value):
    path = run_dir.parent / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": value}))
    result = call("shardes", *commands(run_dir)["verify"])
    assert result.returncode == 2
    assert "names the kernel 'someone/kernel'" in result.stderr
    change(run_dir, "model.trust_remote_code", True)
    result = call("shardes", *commands(run_dir)["verify"])
    assert "model.trust_remote_code: True (code in the model directory runs)" in result.stderr
    result = call("shardes", *commands(run_dir)["verify"], "--trust-remote-code")
    assert "names the kernel" not in result.stderr


ASKED = {
    "task.reward": "rewards.py:f",
    "task.rewards": [{"path": "os:system"}],
    "eval.sets": {"more": {"data": "d.jsonl", "reward": "rewards.py:f"}},
    "task.data": "hf:somebody/something",
    "task.heldout_data": "hf:somebody/something",
    "parallel.deepspeed": "ds.json",
}


def ask(run_dir, key):
    if key in ("task.reward", "task.rewards"):
        change(run_dir, "task.name", None)
        change(run_dir, "task.rewards", None)
    change(run_dir, key, ASKED[key])


@pytest.mark.parametrize("key", ASKED)
def test_what_an_evaluation_would_make_happen_takes_consent(run_dir, key):
    ask(run_dir, key)
    with pytest.raises(UserError, match=rf"  {key}.*(code, which runs|over the network|may write files)"):
        resolve_model(str(run_dir), config_path=None, overrides=[])
    assert resolve_model(str(run_dir), config_path=None, overrides=[], is_trusted=True).history
    # What the person says is the person's own.
    own = f"{key}={json.dumps(ASKED[key])}"
    assert resolve_model(str(run_dir), config_path=None, overrides=[own]).history
    # So is a file elsewhere; one in a run directory, or a link to it, is not.
    (run_dir.parent / "mine.yaml").write_text((run_dir / "config.yaml").read_text())
    assert resolve_model(str(run_dir), config_path=run_dir.parent / "mine.yaml", overrides=[]).history
    (run_dir.parent / "link.yaml").symlink_to(run_dir / "config.yaml")
    for name in (run_dir / "config.yaml", run_dir.parent / "link.yaml"):
        with pytest.raises(UserError, match="takes your consent"):
            resolve_model(str(run_dir), config_path=name, overrides=[])


@pytest.mark.parametrize(
    ("key", "value"),
    [*ASKED.items(), ("log.to", ["wandb"]), ("run.dir", "/somewhere/else")],
)
def test_training_with_the_file_of_a_run_takes_consent(run_dir, key, value, tmp_path):
    change(run_dir, "run.dir", str(run_dir))
    path = run_dir / "config.yaml"
    assert load_trusted(path, [], is_trusted=False)
    assert TrainConfig.load(path)
    ask(run_dir, key) if key in ASKED else change(run_dir, key, value)
    with pytest.raises(UserError, match=f"  {key.replace('log.to', 'log.report_to')}"):
        load_trusted(path, [], is_trusted=False)
    assert load_trusted(path, [], is_trusted=True)
    if key != "parallel.deepspeed":  # which one process has no use for
        with pytest.raises(UserError, match=f"  {key.replace('log.to', 'log.report_to')}"):
            TrainConfig.load(path)
    assert TrainConfig.load(path, trust_remote_code=True)


@pytest.mark.parametrize(
    "reference", ["x/own.py:C", "x.py:C", "py:C", "x:C"], ids=["in a folder", "beside it", "short", "package"]
)
def test_a_file_whose_name_is_like_a_package_takes_consent(run_dir, reference):
    """Paths are relative to where the command is started, which may be the run directory."""
    change(run_dir, "task.name", None)
    change(run_dir, "log.kl_every", 0)
    change(run_dir, "task.environment", f"shardes.environments.builtin.{reference}")
    if reference == "x:C":
        assert resolve_model(str(run_dir), config_path=None, overrides=[]).history
        return
    with pytest.raises(UserError, match=r"  task\.environment.*code, which runs"):
        resolve_model(str(run_dir), config_path=None, overrides=[])


def test_a_reward_of_a_run_is_not_imported(run_dir, payload):
    ask(run_dir, "task.reward")
    (run_dir.parent / "rewards.py").write_text(
        'import os, pathlib; pathlib.Path(os.environ["PAYLOAD"]).touch()'
    )
    change(run_dir, "task.reward", f"{run_dir.parent / 'rewards.py'}:f")
    change(run_dir, "task.template", "a prompt")
    assert call("shardes", *commands(run_dir)["evaluate"]).returncode == 2
    assert not payload.exists()
    result = call("shardes", *commands(run_dir)["evaluate"], "--trust-remote-code")
    assert payload.exists(), f"the test shows nothing: {result.stderr}"


MARKED = """model.path model.trust_remote_code parallel.deepspeed rewards.path task.reward task.data
    task.heldout_data task.environment task.tools task.harness log.report_to"""
HARMLESS = """model.revision run.dir task.template task.system task.label_words task.columns task.name
    task.template_arguments task.chat_template task.environment_arguments rollout.vllm
    task.objective rewards.name rewards.label rewards.arguments rollout.stop rollout.engine parallel.backend
    es.trainable"""


def test_every_key_that_names_code_or_leads_elsewhere_takes_consent():
    """A key is a place, a name or a number; a new one of text must be thought about, and listed here."""
    found = {}

    def look(section, name):
        for key, field in section.model_fields.items():
            annotation = str(field.annotation)
            if any(isinstance(each, NeedsConsent) for each in field.metadata):
                found[f"{name}.{key}"] = True
            elif "Path" in annotation or "str" in annotation:
                found.setdefault(f"{name}.{key}", False)
            for part in ("RewardConfig", "ProblemSetConfig"):
                if part in annotation:
                    look(getattr(task_section, part), "rewards" if part == "RewardConfig" else "task")
                    found.pop(f"{name}.{key}", None)

    for name, field in Config.model_fields.items():
        look(field.annotation, name)
    unmarked = {key for key, is_marked in found.items() if not is_marked}
    assert unmarked <= {*HARMLESS.split()}, (
        "decide whether a run's own configuration may say it without consent"
    )
    assert {key for key, is_marked in found.items() if is_marked} == {*MARKED.split()}


@pytest.mark.parametrize(
    "name", [".lock", "journal.jsonl", "config.yaml.tmp", "metrics.jsonl", "samples.jsonl.tmp"]
)
def test_a_resumed_run_writes_to_no_file_that_it_links_to(name, tmp_path, run_dir):
    header = read_journal(run_dir / "journal.jsonl")[0].header
    victim, text = tmp_path / "victim", "keep me"
    victim.write_text(text)
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(victim)
    config = load_run_config(run_dir, {"run.dir": str(run_dir)})
    try:
        RunDirectory(config, header=header).close()
    except UserError as error:
        assert name in (".lock", "journal.jsonl")
        assert name in str(error)
    assert victim.read_text() == text


def test_names_in_a_run_do_nothing_to_a_terminal(run_dir):
    for name in ("journal.jsonl", "metrics.jsonl"):
        (run_dir / name).unlink(missing_ok=True)
    config = load_run_config(run_dir, {"run.dir": str(run_dir)})
    header = HEADER | {"config": {"model": {"path": "m\x1b]0;owned\x07"}, "es": {"population": 2}}}
    RunDirectory(config, header=header).close()
    for command in (("journal", run_dir), ("watch", run_dir, "--once")):
        shown = call("shardes", *command).stdout
        assert "owned" in shown
        assert not {"\x1b", "\x07"} & {*shown}


def test_files_beside_a_run_are_not_imported(run_dir, payload, monkeypatch):
    for name in ("sitecustomize.py", "conftest.py", "torch.py", "rewards.py", "__init__.py"):
        (run_dir / name).write_text(f"open({str(payload)!r}, 'w')")
    (run_dir / "evil.pth").write_text(f"import os; open({str(payload)!r}, 'w')")
    monkeypatch.chdir(run_dir)
    call("shardes", "journal", run_dir)
    assert call("shardes", "export", run_dir, run_dir.parent / "out", "--iteration", 0).returncode == 0
    assert not payload.exists()
    assert (run_dir.parent / "out" / "config.json").exists()


def test_a_template_of_a_run_does_not_reach_python(run_dir):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    result = call("shardes", *commands(run_dir)["evaluate"], f"task.template={json.dumps(escape)}")
    assert result.returncode == 2
    assert "task.template" in result.stderr
    change(run_dir, "task.template", escape)
    assert call("shardes", *commands(run_dir)["evaluate"]).returncode == 2
