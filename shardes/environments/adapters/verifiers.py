"""Environments of the package verifiers, played unchanged: their taskset, their harness, their rewards."""

import itertools
import os
import socket
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from shardes.environments import harness_worker

try:  # before processes are forked, which then have it at once
    import verifiers.v1 as vf
    from verifiers.v1.utils import loaders
except ImportError:
    vf = None

_known: dict[str, tuple[Any, list[Any] | None]] = {}


def serve(connection: socket.socket) -> None:
    """Serve a pool; see ``harness_worker``."""
    harness_worker.serve(connection)


async def play(row: Mapping[str, Any], client: object, *, name: str, **arguments: Any) -> float:
    """Play an episode of the task whose number is the row's ``index``.

    Args:
        row: The row.
        client: Not used: verifiers makes its own of the same endpoint.
        name: Name of the taskset, as for ``vf-eval``: an installed package.
        arguments: Their section ``env`` besides the taskset's id. Programs run on this machine
            (``runtime: {type: subprocess}``) unless it says otherwise.

    Returns:
        The sum of the rewards of the agents that are trained.

    Raises:
        ValueError: The taskset has no such task.
        RuntimeError: The episode has failed, by what verifiers says.
    """
    environment, tasks = _environment(name, arguments)
    task = _task(environment, tasks, row["index"], name)
    endpoint = vf.EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
    context = vf.ModelContext(model=os.environ["OPENAI_MODEL"], client=endpoint)
    async with environment.serving():
        episode = await environment.run_episode(task, context)
    if not episode.ok:
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        raise RuntimeError(
            f"verifiers: {errors[-1].type}: {errors[-1].message}" if errors else "verifiers: failed"
        )
    return float(sum(trace.reward for trace in episode.traces if trace.agent.trainable))


def check(*, name: str, **arguments: Any) -> None:
    """Refuse what cannot be played, before anything is.

    Raises:
        ValueError: The package is missing, there is no such taskset, or it does not take the arguments.
    """
    if vf is None:
        raise ValueError("verifiers is not installed: pip install 'shardes[verifiers]'")
    try:
        _environment(name, arguments)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"verifiers:{name}: {where}: {first['msg']} (task.environment_arguments)") from None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"verifiers:{name}: {error}") from None


play.check = check  # type: ignore[attr-defined]


def _environment(name: str, arguments: Mapping[str, Any]) -> tuple[Any, list[Any] | None]:
    """Return an environment, made once in each process, and its tasks if they end."""
    if name not in _known:
        wanted = {**arguments, "taskset": {**arguments.get("taskset", {}), "id": name}}
        config_type = loaders.env_config_type(name, wanted.get("id", ""))
        for role, field in config_type.model_fields.items():
            if isinstance(field.default, vf.AgentConfig):
                wanted[role] = {"runtime": {"type": "subprocess"}, **wanted.get(role, {})}
        environment = loaders.load_environment(loaders.resolve_env_config(wanted))
        taskset = environment.taskset
        _known[name] = environment, list(taskset) if taskset.bounded else None
    return _known[name]


def _task(environment: Any, tasks: list[Any] | None, index: int, name: str) -> Any:
    if tasks is None:
        return next(itertools.islice(environment.taskset, index, None))
    if not 0 <= index < len(tasks):
        raise ValueError(
            f"verifiers:{name} has {len(tasks)} tasks, but none with the index {index} (task.data)"
        )
    return tasks[index]
