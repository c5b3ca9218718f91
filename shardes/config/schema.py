"""The schema of a configuration: pydantic models, which loading.py fills from YAML files and overrides.

docs/configuration.md is made of the docstrings of the keys. Nothing heavy is imported, so that a mistake is
answered at once.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, PrivateAttr, ValidationInfo, field_validator

from shardes.backends.registry import BACKENDS
from shardes.config.es import EsConfig
from shardes.config.log import LogConfig
from shardes.config.rollout import RolloutConfig
from shardes.config.section import NeedsConsent, Registered, Section
from shardes.config.task import ProblemSetConfig, TaskConfig
from shardes.rollout.engines.registry import DEFAULT_ENGINE

# ORGANISATION/MODEL, or MODEL alone, as some old ones have it.
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)


def _hub_id(path: Path) -> str | None:
    """Return the name on the hub that a path means if there is nothing here by that name, else None."""
    return str(path) if _HUB_ID.fullmatch(str(path)) and not os.path.lexists(path) else None


class ModelConfig(Section):
    """The base model."""

    path: Annotated[
        Path,
        NeedsConsent(
            "fetched over the network, as this machine's cache of the hub does not have it; your own --base "
            "NAME, model.path=NAME or hf download NAME is consent to that alone",
            lambda path: _hub_id(path) is not None,
        ),
    ]
    """A local directory in Hugging Face format, with safetensors weights and a tokenizer, or the name of a
    model on the hub, such as ``Qwen/Qwen2.5-1.5B-Instruct``, which is fetched into the hub's cache
    (docs/models.md)."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a model on the hub. null: its main branch; for a run that has begun, the
    commit with which it did."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """The dtype of the weights that generate, and of the exported model."""
    trust_remote_code: Annotated[bool, NeedsConsent("code in the model directory runs")] = False
    """Allow Python files inside the model directory to run. Where a file in a run directory says so, it takes
    ``--trust-remote-code`` on the command line as well."""

    # Where the files of a model of the hub are, once they are there.
    _fetched: Path | None = PrivateAttr(default=None)

    @property
    def hub_id(self) -> str | None:
        """Return the model's name on the hub; None for a directory."""
        return str(self.path) if self._fetched is not None else _hub_id(self.path)

    @property
    def directory(self) -> Path:
        """Return the directory of the model's files; one of the hub must have been fetched."""
        return self._fetched or self.path

    @property
    def is_here(self) -> bool:
        """Return whether nothing has to be fetched before the directory can be looked at."""
        return self._fetched is not None or self.hub_id is None

    def fetched(self, directory: Path, *, commit: str) -> Self:
        """Return a model of the hub whose files are in a directory, with its commit for the revision."""
        model = self.model_copy(update={"revision": commit})
        model._fetched = directory
        return model


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
    def _episodes_are_of_one_member(cls, value: TaskConfig, info: ValidationInfo) -> TaskConfig:
        rollout, log = info.data.get("rollout"), info.data.get("log")
        if value.is_episodic and rollout is not None and rollout.is_batched:
            raise ValueError(
                "episodes of members that share forwards are not supported: their contexts differ from the "
                "second turn on; set rollout.members_per_forward: 1"
            )
        if value.is_episodic and log is not None and log.kl_every:
            raise ValueError(
                "log.kl_every measures answers to prompts, and episodes have none before they are played; "
                "set log.kl_every: 0"
            )
        if rollout is not None and rollout.max_context is not None and not value.is_episodic:
            raise ValueError(
                "rollout.max_context is for episodes of many turns (environment, tools); remove it"
            )
        return value

    @field_validator("task")
    @classmethod
    def _objective_has_samples(cls, value: TaskConfig, info: ValidationInfo) -> TaskConfig:
        rollout, needed = info.data.get("rollout"), value.num_samples_needed
        if rollout is not None and rollout.samples_per_prompt < needed:
            raise ValueError(
                f"objective is {value.objective}, which takes {needed} answers to a problem or more, but "
                f"rollout.samples_per_prompt is {rollout.samples_per_prompt}; set that to {needed} or more "
                "(and rollout.temperature above 0), or task.objective: mean"
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

    @field_validator("task")
    @classmethod
    def _problems_of_a_race_are_whole(cls, value: TaskConfig, info: ValidationInfo) -> TaskConfig:
        es = info.data.get("es")
        if es is None or es.racing is None:
            return value
        if value.screening is not None:
            raise ValueError(
                "screening learns from what all members earned on a problem, but es.racing stops some of "
                "them before; remove one of the two"
            )
        if value.objective != "mean":
            raise ValueError(
                f"objective is {value.objective}, which takes all answers to a problem, but es.racing may "
                "stop a member between them; set task.objective: mean, or es.racing: null"
            )
        return value

    @field_validator("task")
    @classmethod
    def _step_rule_has_problems(cls, value: TaskConfig, info: ValidationInfo) -> TaskConfig:
        es = info.data.get("es")
        if es is not None and es.step_rule != "none" and value.batch_size == 1:
            raise ValueError(
                f"batch_size is 1, but es.step_rule: {es.step_rule} measures how members' rewards differ "
                "from problem to problem; give at least 2, or remove es.step_rule"
            )
        return value
