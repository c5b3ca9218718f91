"""Asking every question once before the model is loaded, so that no row ends a run in the middle."""

import datetime
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from shardes.config.schema import Config
from shardes.distributed.group import Group
from shardes.distributed.stop import Stop
from shardes.environments.base import EpisodeRunner
from shardes.environments.runners import Environments
from shardes.errors import UserError
from shardes.models.build import load_model_config, load_tokenizer, positions_of, vocabulary_size
from shardes.models.checkpoint import Checkpoint
from shardes.rollout.encoding import PromptEncoder, Question
from shardes.runs.journal import recorded_commit, recorded_setting
from shardes.session import job_with_model
from shardes.tasks.base import PlacedRow, Row, Task
from shardes.utils.limits import LimitError

logger = logging.getLogger(__name__)

# Rows that are left out and named one by one; more are counted.
_NUM_NAMED = 5


@dataclass(frozen=True)
class PreparedTasks:
    """Tasks all of whose rows can be asked.

    Attributes:
        encoder: Has the tokens of all their prompts.
        task: What is trained on.
        heldout_sets: Further tasks by name.
    """

    encoder: PromptEncoder
    task: Task
    heldout_sets: dict[str, Task]


@dataclass(frozen=True)
class PreparedJob:
    """What a run has before its session is opened.

    Attributes:
        config: Configuration for ``open_session``, with the directory of the model on this machine.
        world: Ranks of the job, if it was joined already.
        tasks: Tasks all of whose rows can be asked.
    """

    config: Config
    world: Group | None
    tasks: PreparedTasks


@contextmanager
def prepared_job(
    config: Config,
    task: Task,
    heldout_sets: Mapping[str, Task],
    *,
    environments: Environments,
    stop: Stop,
) -> Iterator[PreparedJob]:
    """Have the model of a run here and its prompts tokenised, as the run's journal says if it has begun.

    Args:
        config: Configuration of the run.
        task: What is trained on.
        heldout_sets: Further tasks by name.
        environments: Run episodes.
        stop: Flag by which this process can be asked to stop.

    Raises:
        UserError: The model cannot be fetched, the run began with another commit of it, or a row cannot be
            asked.
        StorageError: The cache of the hub cannot be written.
    """
    run_dir = config.run.dir
    recorded = recorded_commit(run_dir, config.model.hub_id)
    with job_with_model(config, stop=stop, recorded=recorded) as (config, world):
        date = recorded_setting(run_dir, "task.date")
        tasks = prepare_tasks(config, task, heldout_sets, environments=environments, date=date)
        yield PreparedJob(config, world, tasks)


def make_encoder(config: Config, *, date: str | None = None) -> PromptEncoder:
    """Return what makes tokens of a run's prompts; of the model, only its configuration is read.

    Args:
        config: Configuration of the run.
        date: The date that the run's journal has for its prompts; None: it has none.

    Raises:
        UserError: The model's configuration or tokenizer cannot be used.
    """
    path, trust = config.model.directory, config.model.trust_remote_code
    model_config = load_model_config(path, trust_remote_code=trust)
    recorded = None if date is None else datetime.date.fromisoformat(date)
    return PromptEncoder(
        load_tokenizer(path, trust_remote_code=trust),
        date=config.task.date or recorded,
        max_positions=positions_of(model_config),
        num_tokens=vocabulary_size(model_config),
    )


def prepare_tasks(
    config: Config,
    task: Task,
    heldout_sets: Mapping[str, Task] | None = None,
    *,
    environments: Environments | None = None,
    date: str | None = None,
    trains: bool = True,
) -> PreparedTasks:
    """Render and tokenise every row that a job asks; rows that cannot be asked are refused or left out.

    Args:
        config: Configuration of the run.
        task: What is trained on.
        heldout_sets: Further tasks by name, all of whose rows are asked.
        environments: Run their episodes, and know which tools the model may call.
        date: The date that the run's journal has for its prompts; None: it has none.
        trains: Whether the training rows are asked even if there are held-out ones.

    Raises:
        UserError: A row cannot be asked, which the message names; or there are too few for ``es.step_rule``.
    """
    Checkpoint(config.model.directory)  # says if there are no weights to ask
    encoder = make_encoder(config, date=date)
    for each in (task, *(heldout_sets or {}).values()):
        if each.episodes is not None:
            _try_template(each, encoder, None if environments is None else environments.of(each))
    task = _prepare_train(task, encoder, config, key="task") if trains or not task.heldout else task
    if trains and config.es.step_rule != "none" and len(task.train) < 2:
        raise UserError(
            f"es.step_rule: {config.es.step_rule} measures how members' rewards differ from problem to "
            "problem, but task.data has only one that can be asked; give more, or set es.step_rule: none"
        )
    heldout = _askable(task, task.heldout, encoder, config, key="task.heldout_data")
    task = replace(task, heldout=heldout)
    sets = {
        name: _prepare_train(other, encoder, config, key=f"eval.sets.{name}")
        for name, other in (heldout_sets or {}).items()
    }
    if config.task.date is not None and encoder.told_date is None:
        raise UserError(f"task.date: got {config.task.date}, but no prompt has a date in it; remove it")
    return PreparedTasks(encoder, task, sets)


def _prepare_train(task: Task, encoder: PromptEncoder, config: Config, *, key: str) -> Task:
    found = _askable(task, task.train, encoder, config, key=f"{key}.data")
    return task if len(found) == len(task.train) else replace(task, train=found, all_train=task.train)


def _askable(
    task: Task, rows: Sequence[Row], encoder: PromptEncoder, config: Config, *, key: str
) -> list[Row]:
    """Return the rows that can be asked.

    Raises:
        UserError: One cannot, and such rows are not to be left out; or none can.
    """
    if task.episodes is not None:
        return list(rows)
    questions = [Question.of(task, row) for row in rows]
    encoder.chats.check_arguments(
        task.chat, has_chats=any(not isinstance(each.prompt, str) for each in questions)
    )
    found: list[Row] = []
    problems: list[str] = []
    try:
        for row, error in zip(rows, encoder.encode_ahead(questions), strict=True):
            if error is None:
                found.append(row)
                continue
            problems.append(f"{_place(row, key)}: {error}")
            if config.task.on_prompt_error == "error":
                raise UserError(f"{problems[0]}. Or have such rows left out: task.on_prompt_error=exclude")
    except LimitError as error:
        raise UserError(
            f"{_place(rows[error.index], key)}: the chat template or the tokenizer of "
            f"{config.model.directory} {error} for this prompt; mend it, or give another template "
            "(task.chat_template)"
        ) from None
    if rows and not found:
        raise UserError(f"{key}: no row can be asked; the first one: {problems[0]}")
    if problems:
        named = "".join(f"\n  {problem}" for problem in problems[:_NUM_NAMED])
        logger.warning(
            "%s: %d of %d rows are left out (task.on_prompt_error: exclude):%s%s",
            key,
            len(problems),
            len(rows),
            named,
            "\n  ..." if len(problems) > _NUM_NAMED else "",
        )
    return found


def _try_template(task: Task, encoder: PromptEncoder, runner: EpisodeRunner | None) -> None:
    """Render a chat as episodes may begin, whose prompts are not known yet.

    So it is known whether the template asks for the date, which a run keeps.

    Raises:
        UserError: The episodes are chats for certain, and the template is not there, fails, or has no tools.
    """
    assert task.episodes is not None
    system = task.episodes.system
    messages: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    encoder.chats.check_arguments(task.chat, has_chats=True)
    if runner is not None and runner.tools:
        encoder.chats.check_tools(task.chat, runner.tools)
    try:
        encoder.chats.text(messages, task.chat)
    except UserError:
        if system is not None:
            raise


def _place(row: Row, key: str) -> str:
    return row.where if isinstance(row, PlacedRow) else key
