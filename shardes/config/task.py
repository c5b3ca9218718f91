"""The section ``task`` of a configuration, and those of further problem sets."""

import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, ValidationInfo, field_validator, model_validator

from shardes.config.section import NeedsConsent, Registered, Section
from shardes.environments.adapters.registry import HARNESSES


def is_hub_reference(source: Path) -> bool:
    """Return whether ``task.data`` means a data set of the Hugging Face hub, and no path."""
    return str(source).startswith("hf:")


def is_range(source: Path) -> bool:
    """Return whether ``task.data`` means rows that are numbers, and no path."""
    return str(source).startswith("range:")


def _is_foreign(reference: str | None) -> bool:
    """Return whether an environment is not one of those that shardes has."""
    module = str(reference).partition(":")[0]
    is_file = "/" in module or module.endswith(".py")
    return bool(reference) and (is_file or not module.startswith("shardes.environments.builtin."))


_IS_CODE = NeedsConsent("code, which runs")
_IS_ENVIRONMENT = NeedsConsent("code, which runs", _is_foreign)
_IS_FETCHED = NeedsConsent(
    "fetched over the network", lambda source: source is not None and is_hub_reference(source)
)


def _with_home(value: str | None) -> str | None:
    """Return the location of a function, ``~`` at its beginning replaced by the home directory."""
    return str(Path(value).expanduser()) if value is not None and value.startswith("~/") else value


class RewardConfig(Section):
    """One of several rewards."""

    name: str | None = None
    """The name of a built-in reward."""
    path: Annotated[str | None, _IS_CODE] = None
    """A function of your own instead, as in ``task.reward``."""
    weight: FiniteFloat = 1.0
    """Factor of its values in the sum."""
    label: str | None = None
    """Its name in metrics; null: ``name``, or the function's."""
    arguments: dict[str, Any] = {}
    """Values passed to the function by name, besides the columns."""

    _expand_path = field_validator("path")(_with_home)

    @model_validator(mode="after")
    def _one_function(self) -> Self:
        if (self.name is None) == (self.path is None):
            raise ValueError(
                "give each reward either name (a built-in reward) or path (a function), not both"
            )
        _check_reference(self.path, key="path")
        return self


def _task_names() -> Iterable[str]:
    from shardes.tasks.registry import TASKS

    return TASKS


# What rendering a chat is told besides the template's own variables.
_ARGUMENTS_OF_OURS = {
    *("conversation", "conversations", "messages", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
    "strftime_now",
}


class ProblemSetConfig(Section):
    """A set of problems, and the rewards of answers to them."""

    name: Annotated[str, Registered("task", _task_names)] | None = None
    """A built-in task (docs/tasks.md); null for your own reward."""
    data: Annotated[Path, _IS_FETCHED]
    """The problems: a ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file; ``DIRECTORY[@SPLIT]``,
    a data set saved to disk; ``hf:NAME[:SUBSET][@SPLIT]``, one of the Hugging Face hub; or
    ``range:START:STOP``, rows that have nothing but an ``index``, for environments that make their own
    problems. Own rewards need a ``prompt`` column (text, or a list of chat messages) or a ``template``."""
    columns: dict[str, str] = {}
    """Names for columns: from the name that the task or template uses to the one in the data."""
    template: str | None = None
    """The prompt as a Jinja template over the columns; null: the task's own, or the column ``prompt``."""
    system: str | None = None
    """A system message; makes the prompt a chat, for the tokenizer's chat template. An empty text: a chat
    without one. null: the prompt stays what it is."""
    chat_template: str | None = None
    """The template that chats go through: the name of one of the tokenizer's, if it has several, or a Jinja
    template itself. null: the tokenizer's only one, or the one that it calls ``default``."""
    template_arguments: dict[str, Any] = {}
    """Further variables of the chat template, such as ``{enable_thinking: false}``."""
    label_words: list[str] | None = None
    """One word for each class of ``classification``, ``sst2`` or ``boolq``; null: the task's own words."""
    reward: Annotated[str | None, _IS_CODE] = None
    """``package.module:function`` or ``path/to/file.py:function``, called as ``f(prompts, completions,
    **columns) -> list[float | None]``."""
    rewards: list[RewardConfig] | None = None
    """Several, which add up, each with a weight. With ``name``, they replace the built-in task's own."""
    metric: Literal["accuracy", "cross_entropy", "log_likelihood"] | None = None
    """Reward of a task that compares likelihoods; null: the task's own."""
    environment: Annotated[str | None, _IS_ENVIRONMENT] = None
    """What each problem is an episode of, over many turns (docs/environments.md): a class as
    ``package.module:Class`` or ``path/to/file.py:Class``, or ``ADAPTER:NAME``, one of another library
    (docs/adapters.md). Every column of a row reaches its ``reset``. Rewards, if there are any, judge the last
    answer, and are added to what the episode earns."""
    environment_arguments: dict[str, Any] = {}
    """Arguments of the environment's class, or of the adapter, by name."""
    tools: Annotated[list[str], _IS_CODE] = []
    """Functions that the model may call, as ``package.module:function`` or ``path/to/file.py:function``
    (docs/tools.md). The episode is over when an answer calls none; rewards judge that answer."""
    harness: Annotated[str | None, _IS_CODE] = None
    """An episode that asks by itself, over an endpoint that is like OpenAI's (docs/endpoint.md): an
    asynchronous function ``f(row, client) -> float``."""
    episode_return: Literal["sum", "last"] = "sum"
    """What a member earns by an episode: the sum of its rewards, or the last one."""
    max_turns: int = Field(default=10, gt=0)
    """Answers of an episode at most; one that is not over by then counts as truncated, with what it has
    earned."""

    @field_validator("template_arguments")
    @classmethod
    def _arguments_are_the_templates(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_ARGUMENTS_OF_OURS.intersection(value))
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be given: shardes decides it, by the prompt")
        return value

    _expand_reward = field_validator("reward", "environment", "harness")(_with_home)

    @property
    def has_harness(self) -> bool:
        """Return whether episodes ask the model by themselves, through the endpoint."""
        return self.harness is not None or (self.environment or "").partition(":")[0] in HARNESSES

    @property
    def is_episodic(self) -> bool:
        """Return whether problems are episodes of many turns."""
        return bool(self.environment or self.tools or self.harness)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        from shardes.tasks.registry import definition_of

        given = [value for value in (self.name, self.reward, self.rewards) if value]
        if (not given and not self.is_episodic) or (self.reward is not None and len(given) > 1):
            raise ValueError(
                "give either name (a built-in task), reward (a function of your own), rewards (several), or "
                "environment (episodes of many turns); only name and rewards may be given together"
            )
        _check_reference(self.reward, key="reward")
        self._check_episodes(earns=bool(given))
        # It refuses label words that the task does not take.
        definition_of(self.name, label_words=self.label_words)
        return self

    def _check_episodes(self, *, earns: bool) -> None:
        """Refuse keys of episodes that do not go together.

        Raises:
            ValueError: They do not.
        """
        if not self.is_episodic:
            for key in ("environment_arguments", "episode_return", "max_turns"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} is for episodes of many turns; give environment, or remove it")
            return
        if self.name is not None or self.metric is not None:
            key = "name" if self.name is not None else "metric"
            raise ValueError(
                f"{key} is {getattr(self, key)}, but environment, tools and harness make the problems; "
                "remove one of them"
            )
        if self.harness is not None and self.environment:
            raise ValueError("harness and environment both play the episodes; remove one of them")
        if self.has_harness and (self.tools or earns):
            key = "harness" if self.harness is not None else f"environment {self.environment}"
            raise ValueError(f"{key} earns by itself; remove tools, reward and rewards")
        if self.has_harness and self.system is not None:
            raise ValueError("system is for prompts and environments; a harness asks by itself; remove it")
        if self.has_harness and self.episode_return != "sum":
            raise ValueError("episode_return is for rewards of turns; a harness returns one; remove it")
        if self.tools and not self.environment and not earns:
            raise ValueError("tools earn nothing by themselves; give a reward, which judges the last answer")
        for tool in self.tools:
            _check_reference(tool, key="tools")
        _check_reference(self.environment, key="environment")
        _check_reference(self.harness, key="harness")


def _check_reference(value: str | None, *, key: str) -> None:
    if value is not None and ":" not in value:
        forms = "'module:function' or 'file.py:function'"
        if key == "environment":
            forms = "'module:Class', 'file.py:Class' or 'adapter:name'"
        raise ValueError(f"{key} must be {forms}; got {value!r}")


class ScreeningConfig(Section):
    """Screening of problems that do not tell members apart."""

    patience: int = Field(default=1, gt=0)
    """Times in a row that a problem must have been asked with all members, those of all these iterations,
    earning the same on it. From then on it is screened, until two members earn different rewards."""
    keep_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Part of the screened problems of an iteration that is asked all the same, drawn at random and rounded
    up."""
    importance_weights: bool = False
    """Let each of these count in members' rewards for those that are not asked, so that a member's reward is
    an unbiased estimate of its mean over all problems that were drawn. false: all that are asked count alike,
    and screened problems count less than others."""


class TaskConfig(ProblemSetConfig):
    """The problems, and the rewards of answers: a built-in task's, or your own."""

    heldout_data: Annotated[Path | None, _IS_FETCHED] = None
    """Held-out problems, never trained on; in any form that ``data`` may have."""
    heldout_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Instead of ``heldout_data``: the part of the problems of ``data`` that is held out. Which ones depends
    on their content and ``split_seed`` alone, not on their order or ``es.seed``."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the choice of held-out problems."""
    batch_size: int | None = Field(default=None, gt=0)
    """Problems per iteration; null: all of them, every time."""
    sampling: Literal["random", "epochs", "fixed"] = "random"
    """Choice of an iteration's problems, a function of ``es.seed`` and the iteration. ``random``: drawn anew.
    ``epochs``: all problems in random order, then all of them in another, and so on. ``fixed``: the same ones
    every time, drawn once."""
    screening: ScreeningConfig | None = None
    """Ask problems less often on which all members have earned the same: they take time and tell nothing. The
    others of the iteration are asked as they would be without, and no problem takes the place of one that is
    left out. ``{}`` is screening with the defaults; null: all are asked."""
    objective: str = "mean"
    """What a member earns by the ``rollout.samples_per_prompt`` answers to a problem. ``mean``: their mean.
    ``max``: the best. ``pass@K``: the expected best of K answers, estimated from all of them without bias;
    for rewards of 0 and 1 it is the usual pass@k. Held-out evaluations report it besides the mean."""
    on_reward_error: Literal["exclude", "worst"] | FiniteFloat = "exclude"
    """Value of an answer whose reward raised, hung, ended its process or was not a number. ``exclude``: it
    does not count. ``worst``: the least reward of all answers of the iteration (for the centre, of the
    evaluation). Or a number."""
    on_prompt_error: Literal["error", "exclude"] = "error"
    """What is done about a row whose prompt the model cannot be asked: too long, refused by the chat
    template, no valid text. Every row is tried before the model is loaded. ``error``: the job ends and names
    the row. ``exclude``: such rows are left out, of held-out sets as well, and named in the log; a run that
    has begun may change to this."""
    date: datetime.date | None = None
    """What chat templates are told is today's date. null: the day on which the run began, also when it is
    resumed on a later one."""
    reward_timeout_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds that the rewards of a micro-batch may take. Answers without one then count as failed."""
    reward_workers: int = Field(default=16, ge=0)
    """Largest number of processes in which rewards run on each rank. There is one at first, and more come
    while answers wait. 0: rewards run inside the training process, where nothing stops one that hangs."""
    reward_memory_bytes: int | None = Field(default=4 * 2**30, gt=0)
    """Address space of such a process, in bytes; null: no limit, as a reward with a model of its own may
    need."""
    reward_isolation: Literal["auto", "none"] = "auto"
    """``auto``: such a process sees no processes but those that it starts, where the kernel allows it (a PID
    namespace; docs/rewards.md); ``none``: it sees all, for a reward that uses ``sudo`` or rootless
    containers."""

    @field_validator("screening", mode="before")
    @classmethod
    def _screening_is_keys(cls, value: Any) -> Any:
        if value is None or isinstance(value, dict | ScreeningConfig):
            return value
        raise ValueError(
            f"got {value!r:.80}; wanted keys such as {{keep_fraction: 0.25}}, or {{}} for defaults"
        )

    @field_validator("objective")
    @classmethod
    def _objective_is_known(cls, value: str) -> str:
        is_pass_at_k = value != "pass@1" and re.fullmatch(r"pass@[1-9]\d{0,8}", value, re.ASCII)
        if value not in ("mean", "max") and not is_pass_at_k:
            raise ValueError(f"got {value!r}; wanted mean, max or pass@K with K of 2 or more, as in pass@4")
        return value

    @model_validator(mode="after")
    def _objective_is_of_answers(self) -> Self:
        from shardes.tasks.registry import definition_of

        definition = definition_of(self.name, label_words=self.label_words)
        if self.objective != "mean" and definition is not None and definition.choices is not None:
            raise ValueError(
                f"objective is {self.objective}, but {self.name} compares likelihoods and has no answers to "
                "choose from; set objective: mean"
            )
        return self

    @property
    def num_samples_needed(self) -> int:
        """Return the number of answers to a problem that the objective needs at least."""
        return {"mean": 1, "max": 2}.get(self.objective) or int(self.objective.removeprefix("pass@"))

    @field_validator("heldout_fraction")
    @classmethod
    def _one_heldout_source(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("heldout_data") is not None:
            raise ValueError(f"got {value}, but heldout_data is given as well; remove one of the two")
        return value
