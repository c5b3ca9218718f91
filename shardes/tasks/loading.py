"""Loading of tasks: the configuration's task sections become tasks with data."""

from pathlib import Path

from shardes.config.schema import Config, ProblemSetConfig, TaskConfig
from shardes.environments.adapters.registry import HARNESSES
from shardes.environments.base import EnvironmentSpec, EpisodeSettings, HarnessSpec
from shardes.errors import UserError
from shardes.tasks.base import ChatTemplate, PlacedRow, Row, Task, TaskDefinition
from shardes.tasks.data import read_rows, split_rows
from shardes.tasks.registry import REWARDS, definition_of
from shardes.tasks.rewards import components
from shardes.tasks.templates import check_prompt, make_prompts, prompt_column, prompt_maker

# Rewards of the user's own judge answers to the rows' own prompts, which are checked for every task.
_OWN = TaskDefinition("rewards", prompt_column, check_row=lambda row, where: None)


def load_tasks(config: Config) -> tuple[Task, dict[str, Task]]:
    """Load the task that a run trains on, and the further held-out sets by name.

    Raises:
        UserError: One of them cannot be used.
    """
    sets = {name: load_task(part, key=f"eval.sets.{name}") for name, part in config.eval.sets.items()}
    return load_task(config.task), sets


def load_task(config: ProblemSetConfig, *, key: str = "task") -> Task:
    """Read a task's data, check every row, and make every prompt once.

    The user's own rewards are not imported here.

    Args:
        config: The section; a ``TaskConfig`` may name held-out rows as well.
        key: The section's dotted key, for messages.

    Raises:
        UserError: A file or a row cannot be used, the template fails, or there is no such reward.
    """
    built_in = definition_of(config.name, label_words=config.label_words)
    definition = built_in or _OWN
    make_prompt = prompt_maker(
        definition.make_prompt,
        template=config.template,
        system=None if config.is_episodic else config.system,
        key=key,
    )

    def read(source: Path, name: str) -> list[Row]:
        rows = read_rows(source, key=f"{key}.{name}", columns=config.columns, check=definition.check_row)
        if config.is_episodic and config.template is None:
            return [*rows]  # environments make their own prompts
        prompts = make_prompts(make_prompt, rows, template=config.template, key=key)
        if config.is_episodic:
            return [
                PlacedRow({**row, "prompt": prompt}, row.where)
                for row, prompt in zip(rows, prompts, strict=True)
            ]
        for row, prompt in zip(rows, prompts, strict=True):
            check_prompt(prompt, row.where, may_be_empty=definition.choices is not None)
        return [*rows]

    train, heldout = read(config.data, "data"), []
    if isinstance(config, TaskConfig) and config.heldout_data is not None:
        heldout = read(config.heldout_data, "heldout_data")
    if isinstance(config, TaskConfig) and config.heldout_fraction is not None:
        train, heldout = split_rows(
            train, fraction=config.heldout_fraction, seed=config.split_seed, row_key=definition.row_key
        )
        if not train:
            raise UserError(
                f"{key}.heldout_fraction: got {config.heldout_fraction}, which leaves no problem of "
                f"{config.data} for training; give a smaller fraction or more problems"
            )
    return Task(
        name=config.name or config.environment or config.harness or config.reward or "rewards",
        train=train,
        heldout=heldout,
        make_prompt=make_prompt,
        rewards=components(config, built_in, known=REWARDS, key=key),
        choices=definition.choices,
        metric=config.metric or definition.metric,
        chat=ChatTemplate(config.chat_template, config.template_arguments),
        episodes=_episodes(config),
    )


def _episodes(config: ProblemSetConfig) -> EpisodeSettings | None:
    """Return what the problems of a section are episodes of; None if they are not."""
    if not config.is_episodic:
        return None
    return EpisodeSettings(
        program_of(config),
        max_turns=config.max_turns,
        episode_return=config.episode_return,
        system=config.system,
    )


def program_of(config: ProblemSetConfig) -> EnvironmentSpec | HarnessSpec:
    """Return what plays the episodes of a section."""
    arguments = config.environment_arguments
    if config.harness is not None:
        return HarnessSpec(config.harness, arguments)
    reference = config.environment or ""
    adapter, _, name = reference.partition(":")
    if adapter in HARNESSES:
        return HarnessSpec(HARNESSES[adapter], {"name": name, **arguments})
    return EnvironmentSpec(reference, arguments, tuple(config.tools))
