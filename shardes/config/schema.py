"""The schema of a configuration: pydantic models, which loading.py fills from YAML files and overrides.

docs/configuration.md is made of the docstrings of the keys. Nothing heavy is imported, so that a mistake is
answered at once.
"""

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, ValidationInfo, field_validator, model_validator

from shardes.backends.registry import BACKENDS
from shardes.config.es import EsConfig
from shardes.config.log import LogConfig
from shardes.config.rollout import RolloutConfig
from shardes.config.section import NeedsConsent, Registered, Section
from shardes.rollout.engines.registry import DEFAULT_ENGINE


def is_hub_reference(source: Path) -> bool:
    """Return whether ``task.data`` means a data set of the Hugging Face hub, and no path."""
    return str(source).startswith("hf:")


_IS_CODE = NeedsConsent("code, which runs")
_IS_FETCHED = NeedsConsent(
    "fetched over the network", lambda source: source is not None and is_hub_reference(source)
)


class ModelConfig(Section):
    """The base model."""

    path: Path
    """A local directory in Hugging Face format, with safetensors weights and a tokenizer (docs/models.md)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """The dtype of the weights that generate, and of the exported model."""
    trust_remote_code: Annotated[bool, NeedsConsent("code in the model directory runs")] = False
    """Allow Python files inside the model directory to run. Where a file in a run directory says so, it takes
    ``--trust-remote-code`` on the command line as well."""


class RunConfig(Section):
    """The run directory: resuming, stopping, checks and snapshots."""

    dir: Path
    """The run directory; created if it does not exist."""
    resume: Literal["auto", "never"] = "auto"
    """``auto``: go on where the run stopped. ``never``: refuse a directory that already holds a run."""
    resume_engine: Literal["same", "any"] = "same"
    """``same``: refuse to go on with another engine than the run has had, or with another version, dtype or
    number of ranks of an engine whose answers depend on them, since rewards would be compared that are not of
    one kind. ``any``: go on all the same; the journal says from where on."""
    stop_seconds: int = Field(default=20, ge=0)
    """Seconds that members in flight may go on after the job is asked to stop (SIGTERM or SIGUSR1 to any
    rank). Those not finished by then are abandoned, and evaluated again by the next job. Launchers and
    schedulers commonly kill 30 seconds after SIGTERM."""
    check_every: int = Field(default=1, gt=0)
    """Iterations between comparisons of the replicas' weights digests."""
    snapshot_every: int = Field(default=0, ge=0)
    """Iterations between snapshots of the weights; 0: none. The journal alone is enough to go on from; with
    snapshots, only what came after the newest one is replayed. They take 4 bytes a parameter each, or the
    model's dtype with ``weights.master: model``, and every rank must see ``run.dir``."""
    keep_snapshots: int = Field(default=2, ge=2)
    """Number of snapshots that are kept, the newest ones. The one before it is used if a snapshot turns out
    damaged."""


class ParallelConfig(Section):
    """Distribution of the model over ranks. No key changes a result."""

    backend: Annotated[str, Registered("backend", lambda: BACKENDS)] = "zero3"
    """``zero3``: DeepSpeed ZeRO-3 shards. ``fsdp``: PyTorch FSDP2 shards. ``tensor_parallel``: matrices are
    split by the model's own plan, shards stay where they are and activations are reduced; every rank works on
    the same prompts, and results agree with the other backends to rounding. ``vllm``: the shards are the
    parameters of a vLLM engine, which answers; every rank is one of its tensor parallel workers
    (docs/vllm.md). ``single``: every rank holds the whole model."""
    shard_size: int | None = Field(default=None, gt=0)
    """Ranks that hold one replica of the model together; it must divide the number of ranks. Replicas
    evaluate different members at the same time, and weights cross between the ranks of one replica only.
    null: all ranks, or 1 for the backend ``single``, where it is the number of ranks that share a member's
    prompts."""
    deepspeed: Annotated[Path | None, NeedsConsent("DeepSpeed may write files that it names")] = None
    """A DeepSpeed JSON file for zero3; ``auto`` values are filled, unusable keys are refused."""
    timeout_seconds: int = Field(default=1800, gt=0)
    """Seconds that a rank waits for another before the job ends, and for signs of life of a process that is
    frozen (at least 10). At the end of an iteration it may have to wait for as long as one member takes."""
    threads_per_rank: int | None = Field(default=None, gt=0)
    """CPU threads of each rank; null: what the launcher and torch decide. Results are compared bit for bit
    only between runs with the same number of threads."""

    @field_validator("deepspeed")
    @classmethod
    def _backend_takes_deepspeed_file(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        backend = info.data.get("backend")
        if value is not None and backend is not None and not BACKENDS[backend].uses_deepspeed_file:
            users = " or ".join(name for name, spec in BACKENDS.items() if spec.uses_deepspeed_file)
            raise ValueError(f"{value} is for parallel.backend: {users}; got {backend}; remove one")
        return value


class WeightsConfig(Section):
    """The master weights, which only updates write."""

    master: Literal["float32", "model"] = "float32"
    """``float32``: 4 more bytes a parameter, no update is lost. ``model``: the model's dtype, rounded
    stochastically at every update, so that small steps survive on average."""
    master_device: Literal["device", "cpu"] = "device"
    """Memory that holds the master. ``cpu``: pinned host memory, from which it passes through the accelerator
    in chunks whenever it is read or updated; saves the master's bytes on the accelerator."""


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
    a data set saved to disk; or ``hf:NAME[:SUBSET][@SPLIT]``, one of the Hugging Face hub. Own rewards need a
    ``prompt`` column (text, or a list of chat messages) or a ``template``."""
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

    @field_validator("template_arguments")
    @classmethod
    def _arguments_are_the_templates(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_ARGUMENTS_OF_OURS.intersection(value))
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be given: shardes decides it, by the prompt")
        return value

    _expand_reward = field_validator("reward")(_with_home)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        from shardes.tasks.registry import definition_of

        given = [value for value in (self.name, self.reward, self.rewards) if value]
        if not given or (self.reward is not None and len(given) > 1):
            raise ValueError(
                "give either name (a built-in task), reward (a function of your own) or rewards (several); "
                "only name and rewards may be given together"
            )
        _check_reference(self.reward, key="reward")
        # It refuses label words that the task does not take.
        definition_of(self.name, label_words=self.label_words)
        return self


def _check_reference(value: str | None, *, key: str) -> None:
    if value is not None and ":" not in value:
        raise ValueError(f"{key} must be 'module:function' or 'file.py:function'; got {value!r}")


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

    @field_validator("heldout_fraction")
    @classmethod
    def _one_heldout_source(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("heldout_data") is not None:
            raise ValueError(f"got {value}, but heldout_data is given as well; remove one of the two")
        return value


class EvalConfig(Section):
    """Held-out evaluation of the centre."""

    every: int = Field(default=10, ge=0)
    """Iterations between evaluations, the last weights included; 0 means never."""
    sets: dict[str, ProblemSetConfig] = {}
    """Further held-out sets by a name of your choice, also of other tasks, to see what is forgotten."""
    save_best: bool = False
    """Keep the weights with the highest held-out reward so far as a Hugging Face directory, ``best`` in the
    run directory. Weights of any iteration can be exported later without it."""
    pass_reward: FiniteFloat = 1.0
    """Least reward of an answer that passes, for pass@k of ``shardes evaluate``."""


class Config(Section):
    """Configuration of a run."""

    model: ModelConfig
    run: RunConfig
    parallel: ParallelConfig = ParallelConfig()
    rollout: RolloutConfig
    weights: WeightsConfig = WeightsConfig()
    es: EsConfig
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    task: TaskConfig

    def on_device(self, device_type: str) -> Self:
        """Return the configuration with what null stands for on a type of device, ``cuda`` or ``cpu``."""
        return self.model_copy(update={"rollout": self.rollout.on_device(device_type)})

    @field_validator("rollout")
    @classmethod
    def _engine_goes_with_backend(cls, value: RolloutConfig, info: ValidationInfo) -> RolloutConfig:
        """Put the engine's name for ``auto``, and refuse one that cannot answer with the backend."""
        parallel = info.data.get("parallel")
        if parallel is None:
            return value
        own = BACKENDS[parallel.backend].own_engine
        if value.engine == "auto":
            value = value.model_copy(update={"engine": own or DEFAULT_ENGINE})
        owners = [name for name, spec in BACKENDS.items() if spec.own_engine == value.engine]
        if value.engine != own and (own is not None or owners):
            fitting = f"rollout.engine: {own or DEFAULT_ENGINE}"
            other = f", or parallel.backend: {owners[0]}" if owners else ""
            raise ValueError(
                f"engine is {value.engine}, which cannot answer with parallel.backend: "
                f"{parallel.backend}; set {fitting}{other}"
            )
        for key in ("kv_cache_gib", "batch_invariant", "vllm"):
            if value.engine != "vllm" and getattr(value, key) != type(value).model_fields[key].default:
                raise ValueError(
                    f"{key} is {getattr(value, key)}, which only rollout.engine: vllm has a use for; the "
                    f"engine is {value.engine}"
                )
        return value

    @field_validator("rollout")
    @classmethod
    def _backend_supports_gather(cls, value: RolloutConfig, info: ValidationInfo) -> RolloutConfig:
        parallel = info.data.get("parallel")
        if parallel is None:
            return value
        gathers = BACKENDS[parallel.backend].gathers
        if value.gather not in ("auto", *gathers):
            others = [name for name, spec in BACKENDS.items() if value.gather in spec.gathers]
            raise ValueError(
                f"gather is {value.gather}, but parallel.backend: {parallel.backend} supports only "
                f"{' or '.join(gathers)}; set rollout.gather: {' or '.join(gathers)}, or parallel.backend: "
                f"{' or '.join(others)}"
            )
        return value

    @field_validator("es")
    @classmethod
    def _batches_are_of_low_rank(cls, value: EsConfig, info: ValidationInfo) -> EsConfig:
        rollout = info.data.get("rollout")
        if rollout is None or not rollout.is_batched:
            return value
        if value.noise != "low_rank":
            raise ValueError(
                f"noise is {value.noise}, but rollout.members_per_forward: {rollout.members_per_forward} "
                "needs es.noise: low_rank; set that, or rollout.members_per_forward: 1"
            )
        if value.prompts_per_member is not None:
            raise ValueError(
                f"prompts_per_member is {value.prompts_per_member}, but the members of a forward answer the "
                "same prompts; set it to null, or rollout.members_per_forward: 1"
            )
        return value

    @field_validator("task")
    @classmethod
    def _failed_rewards_have_a_prompt(cls, value: TaskConfig, info: ValidationInfo) -> TaskConfig:
        es = info.data.get("es")
        if es is not None and es.shaping == "per_prompt" and value.on_reward_error == "worst":
            raise ValueError(
                "on_reward_error is worst, which is a rule for members, but es.shaping: per_prompt compares "
                "answers to one prompt; set task.on_reward_error to exclude or to a number"
            )
        return value
