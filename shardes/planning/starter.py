"""The command ``shardes init``: a configuration, a reward and problems to start from, in a directory."""

import json
import re
from pathlib import Path
from typing import Any

import click

from shardes.backends.registry import BACKENDS
from shardes.config.loading import load_config
from shardes.config.schema import ModelConfig
from shardes.errors import StorageError, UserError
from shardes.models.files import read_model_config
from shardes.models.hub import check_model
from shardes.tasks.registry import TASKS
from shardes.utils.files import jsonl_text, write_atomically

_PATH = click.Path(path_type=Path)
_NUM_PROBLEMS = 200
_MAX_NEW_TOKENS = 128
# How models that answer chats are called.
_CHATS = re.compile(r"instruct|chat|[-_]it\b", re.IGNORECASE)

HOW_TO_BEGIN = """\
--config: give the YAML file of a run. To write one, with a reward to begin from:
    shardes init my-task --model Qwen/Qwen2.5-1.5B-Instruct
    shardes plan --config my-task/train.yaml
    torchrun --nproc-per-node 8 -m shardes train --config my-task/train.yaml
MODEL is a directory or a name on the hub; shardes init --help has more, docs/configuration.md every key"""

_CONFIG = """\
# {what}.
#
#     shardes plan --config {config}                    memory, and what a run takes
#     shardes train --config {config} --dry-run         try one member on two problems
#     shardes train --config {config}                   one process
#     torchrun --nproc-per-node 8 -m shardes train --config {config}
#     shardes watch {run_dir}
#     shardes export {run_dir} {directory}/model --iteration best
#
# docs/configuration.md explains every key. Any of them can be changed on the command line: es.sigma=0.002.
# Paths are relative to where the command is started.
model:
  path: {model} # a directory, or a name on the hub
  # revision: main # branch, tag or commit, of a name on the hub
  dtype: bfloat16 # of the weights that answer, and of the exported model
run:
  dir: {quoted_run_dir} # journal, metrics and samples; the same command resumes
parallel:
  backend: {backend} # how several ranks share the model: fsdp | zero3 (deepspeed) | tensor_parallel | vllm
rollout:
  max_new_tokens: {max_new_tokens} # of an answer; time and memory grow with it
es:
  iterations: 100 # updates of the weights
  population: 30 # members that each iteration evaluates
  sigma: 0.001 # scale of the noise; small models want more: 0.01 for some millions of parameters
  # alpha: 0.0005 # step size; by default half of sigma
eval:
  every: 10 # iterations between evaluations on the held-out problems
task:
{task}
  batch_size: 16 # problems of an iteration; null: all of them
"""

_REWARD_OF_SUMS = '''\
"""The reward of CONFIG: replace it by your own."""

import re


def reward(prompts, completions, answer, **columns):
    """Return one number for each answer: 1 if its last number is the right one, else 0.1 if it has a number.

    Answers to chats come as TRL passes them, each a list of one message; others are texts. Each column of the
    problems comes as a list by its name. None: no reward can be given. Rewards run in processes of their own,
    with a time limit (docs/rewards.md).
    """
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    values = []
    for text, right in zip(texts, answer, strict=True):
        numbers = re.findall(r"-?\\d+", text)
        values.append(0.0 if not numbers else 1.0 if int(numbers[-1]) == int(right) else 0.1)
    return values
'''

_REWARD_OF_LENGTH = '''\
"""The reward of CONFIG: replace it by your own."""


def reward(prompts, completions, **columns):
    """Return one number for each answer: minus its length, so that short ones are learned.

    Answers to chats come as TRL passes them, each a list of one message; others are texts. Each column of the
    problems comes as a list by its name. None: no reward can be given. Rewards run in processes of their own,
    with a time limit (docs/rewards.md).
    """
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [-len(text) / 100 for text in texts]
'''


@click.command()
@click.argument("directory", type=_PATH)
@click.option("--model", required=True, help="A model directory, or a name on the hub (ORGANISATION/MODEL).")
@click.option(
    "--task", type=click.Choice(sorted(TASKS)), help="A built-in task; default: a reward of your own."
)
@click.option("--data", type=_PATH, help="Your problems; default: problems that are made, if they can be.")
@click.option(
    "--backend",
    type=click.Choice([name for name in BACKENDS if name != "single"]),
    default="fsdp",
    show_default=True,
    help="How several ranks share the model.",
)
def init(directory: Path, model: str, task: str | None, data: Path | None, backend: str) -> None:
    """Write a configuration to DIRECTORY, with a reward and problems to begin from.

    Nothing is asked, nothing is fetched, and nothing that is there is overwritten. With --data and a reward
    of your own, problems have a column prompt, and the reward gets all others by their names.
    """
    config = directory / "train.yaml"
    check_model(ModelConfig(path=Path(model)))
    files: dict[Path, str] = {}
    if data is None:
        data = directory / "problems.jsonl"
        files[data] = jsonl_text(_problems(task))
    if task is None:
        reward = _REWARD_OF_SUMS if data in files else _REWARD_OF_LENGTH
        files[directory / "reward.py"] = reward.replace("CONFIG", str(config))
    run_dir = directory / "run"
    files[config] = _CONFIG.format(
        what=f"The task {task} (docs/tasks.md)" if task else "A task of your own, rewarded by reward.py",
        config=config,
        directory=directory,
        run_dir=run_dir,
        quoted_run_dir=json.dumps(str(run_dir)),
        max_new_tokens=_max_new_tokens(Path(model)),
        model=json.dumps(model),
        backend=backend,
        task="\n".join(f"  {line}" for line in _task(task, data, directory, is_chat=_answers_chats(model))),
    )
    taken = [str(path) for path in files if path.exists()]
    if taken:
        raise UserError(f"{', '.join(taken)}: there already; give another directory, or move it away")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            write_atomically(path, text)
    except OSError as error:
        raise StorageError(f"{error.filename or directory}: cannot be written: {error.strerror}") from None
    load_config(config, [])  # what was written can be read
    click.echo("\n".join(f"{path}: written" for path in files))
    click.echo(f"the next steps are at the top of {config}; the first one:")
    click.echo(f"    shardes plan --config {config}")


def _problems(task: str | None) -> list[dict[str, Any]]:
    """Return problems of a task, or of sums if it is None.

    Raises:
        UserError: The task makes none.
    """
    if task is None:
        pairs = [(7 * i % 90 + 10, 11 * i % 80 + 10) for i in range(_NUM_PROBLEMS)]
        return [{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in pairs]
    generate = TASKS[task].generate
    if generate is None:
        made = sorted(name for name, known in TASKS.items() if known.generate is not None)
        raise UserError(
            f"--data: problems of {task} are not made here; give a file of them, or hf:NAME of the hub "
            f"(docs/tasks.md has the columns). Made are those of {', '.join(made)}"
        )
    return generate(_NUM_PROBLEMS, seed=0)


def _task(task: str | None, data: Path, directory: Path, *, is_chat: bool) -> list[str]:
    """Return the lines of the section ``task``; ``is_chat``: whether the model is made for chats."""
    lines = (
        [f"name: {task} # which prompts it makes, and how it judges answers: docs/tasks.md"] if task else []
    )
    lines += [
        f"data: {json.dumps(str(data))} # a problem a line; .csv, .parquet and hf:NAME are read, too",
        "heldout_fraction: 0.25 # of the problems: never trained on",
    ]
    if task is None:
        lines.append(f"reward: {json.dumps(f'{directory}/reward.py:reward')} # file.py:function")
    system = 'system: "" # a chat without a system message, by the model\'s chat template; or give one'
    is_chat = is_chat and (task is None or TASKS[task].choices is None)
    return [*lines, system if is_chat else f"# {system}"]


def _max_new_tokens(model: Path) -> int:
    """Return the usual length of answers, or less for a model of few positions, if it is here."""
    file = model / "config.json"
    positions = read_model_config(file).get("max_position_embeddings") if file.is_file() else None
    return min(_MAX_NEW_TOKENS, positions // 2) if isinstance(positions, int) else _MAX_NEW_TOKENS


def _answers_chats(model: str) -> bool:
    """Return whether a model is made for chats, as its directory or its name says."""
    directory = Path(model)
    if not directory.is_dir():
        return _CHATS.search(model) is not None
    return any(directory.glob("chat_template*")) or '"chat_template"' in _text(
        directory / "tokenizer_config.json"
    )


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""
