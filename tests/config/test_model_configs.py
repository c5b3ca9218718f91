"""The configurations of large models and of an own task: they fit as their heads say, and they train."""

import functools
import json
import re
import shlex
from pathlib import Path
from runpy import run_path

import pytest

from shardes.config.loading import load_config
from shardes.models.build import skeleton_of
from shardes.planning.machine import Machine
from shardes.planning.plan import Plan
from shardes.planning.workload import make_workload
from shardes.tasks.loading import load_task
from tests.helpers.inprocess import call
from tests.helpers.models import tiny_model
from tests.helpers.ranks import ROOT, run_ranks

CONFIGS = ROOT / "configs"
MODELS = {path.stem: path for path in sorted((CONFIGS / "models").glob("*.yaml"))}
ALL = MODELS | {"own_task": CONFIGS / "own_task" / "own_task.yaml"}
SKELETONS = Path(__file__).parents[1] / "data" / "models"
GIB = 2**30
# One of each backend; the others are repetitions.
USUAL = ("qwen2.5-32b-1-node", "qwen2.5-72b-2-nodes", "qwen2.5-72b-2-nodes-likelihood")


def commands_of(path):
    """The shell commands in the head of a file."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#     ")]
    return [shlex.split(line.removeprefix("#     ")) for line in lines]


def plan_command(path):
    (command,) = [command for command in commands_of(path) if command[:2] == ["shardes", "plan"]]
    return command


def option(command, name):
    return command[command.index(name) + 1]


@pytest.mark.parametrize("name", ALL)
def test_the_head_fetches_plans_and_starts_this_file(name):
    path, config = ALL[name], load_config(ALL[name], [])
    fetch, *_, start = commands_of(path)
    plan = plan_command(path)
    assert option(fetch, "--local-dir") == str(config.model.path)
    relative = str(path.relative_to(ROOT))
    assert option(plan, "--config") == option(start, "--config") == relative
    assert config.run.dir == Path("runs") / name
    num_nodes = int(option(start, "--nnodes")) if "--nnodes" in start else 1
    per_node = int(option(start, "--num_gpus" if start[0] == "deepspeed" else "--nproc-per-node"))
    assert int(option(plan, "--world-size")) == num_nodes * per_node
    # Every key is explained where it stands.
    keys = re.findall(r"^  +\w+: .*", path.read_text(), re.MULTILINE)
    uncommented = [key for key in keys if " # " not in key]
    assert all(re.search("data: ", key) for key in uncommented), uncommented


@pytest.fixture(scope="module")
def skeletons():
    """Models without weights, each made once."""

    @functools.cache
    def make(name):
        return skeleton_of(load_config(ALL["own_task"], []), source=SKELETONS / f"{name}.json")

    return make


@pytest.mark.parametrize("name", MODELS)
def test_what_the_head_plans_fits(name, skeletons):
    config = load_config(MODELS[name], [])
    plan = Plan(
        config,
        skeletons("qwen2.5-72b" if "72b" in name else "qwen2.5-32b"),
        workload=make_workload(config, prompt_tokens=250),
        machine=Machine(80 * GIB),
        world_size=int(option(plan_command(MODELS[name]), "--world-size")),
    )
    assert plan.chosen_gather is not None, plan.memory
    assert plan.num_replicas == plan.world_size // (config.parallel.shard_size or plan.world_size)
    if config.rollout.gather == "member":
        # Which only fits because the masters are elsewhere.
        assert plan.memory.is_on_host
        assert plan.memory.needed("member") + plan.memory.master > plan.usable_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "m", tied=True, num_heads=4, num_kv_heads=2)


def shortened(tmp_path, config, model):
    """What makes a run of a configuration small: a model that knows digits, and few problems."""
    rows = {
        "countdown": [{"numbers": [3, 5, 2], "target": n} for n in range(4)],
        "sst2": [{"sentence": str(n), "label": n % 2} for n in range(4)],
        None: [{"receipt": f"{n}+1", "total": n + 1} for n in range(8)],
    }[config.task.name]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = [
        f"model.path={model}",
        "model.dtype=float32",
        f"run.dir={tmp_path / 'run'}",
        "rollout.micro_batch_size=4",
        "es.iterations=1",
        "es.population=2",
        f"task.data={tmp_path / 'few.jsonl'}",
        "task.batch_size=4",
        "task.reward_workers=0",
    ]
    if config.task.heldout_data is not None:
        changes.append(f"task.heldout_data={tmp_path / 'few.jsonl'}")
    changes += {
        "countdown": ["task.template='{{ target }}='", "rollout.max_new_tokens=3"],
        "sst2": ["task.template='{{ sentence }}='", "task.label_words=['1', '2']"],
        None: ["task.system=null", "rollout.max_new_tokens=3"],
    }[config.task.name]
    return changes


def assert_trained(run_dir):
    first, last = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    assert first["reward_mean"] is not None
    assert first["num_reward_failures"] == 0
    assert last["heldout_reward"] is not None


def test_the_own_task_is_trained_on(tmp_path, model):
    path = ALL["own_task"]
    changes = shortened(tmp_path, load_config(path, []), model)
    result = call("train", "--config", path, *changes, "parallel.backend=single")
    assert result.returncode == 0, result.stderr
    assert_trained(tmp_path / "run")


def test_the_own_reward_judges_as_it_says():
    config = load_config(ALL["own_task"], [])
    task = load_task(config.task)
    assert (len(task.train) + len(task.heldout), task.train[0]["prompt"]) == (24, task.train[0]["receipt"])
    reward = run_path(str(CONFIGS / "own_task" / "reward.py"))["total_reward"]
    answers = ['{"total": 3.5}', '{"total": 4}', "3.5", '{"sum": 3.5}', [{"content": '{"total": 3.5}'}], "[]"]
    assert reward([""] * 6, answers, [3.5] * 6) == [1.1, 0.1, 0.0, 0.0, 1.1, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name in USUAL else pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS],
)
def test_the_settings_of_large_models_train_a_tiny_one(tmp_path, model, name):
    """On as many ranks as a replica of two takes, twice: replicas are formed as in the file."""
    pytest.importorskip("deepspeed")
    config = load_config(MODELS[name], [])
    changes = shortened(tmp_path, config, model)
    changes += ["parallel.timeout_seconds=60", "parallel.threads_per_rank=1"]
    has_replicas = config.parallel.shard_size is not None and (
        "2-nodes" in name or config.parallel.shard_size < 8
    )
    if config.parallel.shard_size is not None:
        changes.append(f"parallel.shard_size={1 if has_replicas else 2}")
    arguments = [ROOT / "launch" / "train.py", "--config", MODELS[name], *changes]
    output = run_ranks(arguments, world_size=2, log_dir=tmp_path / "logs")
    assert_trained(tmp_path / "run")
    backend = config.parallel.backend
    assert f"{backend} on 2 rank(s), {2 if has_replicas else 1} replica(s)" in output
