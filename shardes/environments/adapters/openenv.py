"""Adapter of OpenEnv: a running server by its URL, or an environment of an installed package.

Of a package, the environment's own class is used in the worker's process, without a server.
"""

import importlib
import inspect
import json
import typing
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from shardes.environments.adapters.common import check_index, load_package, override, take_seed
from shardes.environments.base import Observation

_URLS = ("http://", "https://", "ws://", "wss://")
_CONNECT_SECONDS = 10.0

# Fields of every action and observation that are no part of what is said.
_COMMON = {"metadata", "reward", "done"}


def make(name: str, arguments: Mapping[str, Any]) -> "partial[OpenEnvEnvironment]":
    """Return what makes an environment of a server or a package.

    Args:
        name: URL of a server, name of a package as ``openenv init`` lays it out, or ``module:Class``.
        arguments: Arguments of the environment's reset, and ``action_field``, the field of its action that
            gets the completion; ``observation_field``, the field of its observation that the model is shown;
            ``seed`` (0).

    Raises:
        ValueError: The package is missing, no server answers, there is no environment of this name, or which
            fields are meant has to be said.
    """
    load_package("openenv", adapter="openenv", extra="openenv")
    options = dict(arguments)
    seed = take_seed(options)
    action_field = options.pop("action_field", None)
    observation_field = options.pop("observation_field", None)
    connect: Callable[[], _Session]
    if name.startswith(_URLS):
        action_schema, observation_schema = _schemas(name)
        connect = partial(_ServerSession, name)
    else:
        environment, action = _find_class(name)
        action_schema = action.model_json_schema()
        returned: Any = _hints(environment.reset).get("return")
        observation_schema = returned.model_json_schema() if hasattr(returned, "model_json_schema") else {}
        connect = partial(_LocalSession, environment, action)
    action_field = _choose(action_schema, action_field, argument="action_field", name=name)
    if observation_field is not None and observation_schema:
        _choose(observation_schema, observation_field, argument="observation_field", name=name)
    return partial(OpenEnvEnvironment, connect, options, action_field, observation_field, seed=seed)


class _Session(Protocol):
    """Connection to the environment of one episode."""

    def reset(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], float | None, bool]:
        """Begin; return the observation, the reward and whether the episode is over."""

    def step(self, action: Mapping[str, Any]) -> tuple[dict[str, Any], float | None, bool]:
        """Do an action; return the same."""

    def close(self) -> None:
        """End the session."""


class OpenEnvEnvironment:
    """One episode of an environment of OpenEnv.

    Args:
        connect: Begins a session.
        options: Arguments of the environment's reset.
        action_field: Field of the action that gets the completion.
        observation_field: Field of the observation that is shown; None: its only field of text, or all
            fields as JSON.
        seed: The seed that the environment is reset with is this and the row's index.
    """

    def __init__(
        self,
        connect: Callable[[], _Session],
        options: Mapping[str, Any],
        action_field: str,
        observation_field: str | None,
        *,
        seed: int,
    ) -> None:
        self._connect = connect
        self._options = options
        self._action_field = action_field
        self._observation_field = observation_field
        self._seed = seed
        self._session: _Session | None = None

    def reset(self, index: int, **row: Any) -> Observation:
        """Begin the episode of an index; columns with the name of a given argument replace it."""
        self.close()
        self._session = self._connect()
        seed = self._seed + check_index(index)
        observation, _, _ = self._session.reset({"seed": seed, **override(self._options, row)})
        return self._show(observation)

    def step(self, completion: str) -> tuple[Observation, float, bool]:
        """Send the completion as an action; an environment without a reward gives 0."""
        assert self._session is not None
        observation, reward, is_done = self._session.step({self._action_field: completion})
        return "" if is_done else self._show(observation), float(reward or 0.0), bool(is_done)

    def close(self) -> None:
        """End the session."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _show(self, observation: dict[str, Any]) -> str:
        said = {field: value for field, value in observation.items() if field not in _COMMON}
        if self._observation_field is not None:
            if self._observation_field not in said:
                raise ValueError(
                    f"The observation has no field {self._observation_field!r} (observation_field), but "
                    f"{', '.join(said)}"
                )
            value = said[self._observation_field]
            return value if isinstance(value, str) else json.dumps(value)
        texts = [value for value in said.values() if isinstance(value, str)]
        return texts[0] if len(texts) == 1 else json.dumps(said)


class _ServerSession:
    """Session with a server.

    Args:
        url: URL of the server.
    """

    def __init__(self, url: str) -> None:
        from openenv.core.generic_client import GenericEnvClient

        # How long a step may take is the limit of the worker that waits for it.
        client = GenericEnvClient(base_url=url, connect_timeout_s=_CONNECT_SECONDS, message_timeout_s=1e6)
        self._client: Any = client.sync().connect()

    def reset(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], float | None, bool]:
        result = self._client.reset(**arguments)
        return result.observation, result.reward, result.done

    def step(self, action: Mapping[str, Any]) -> tuple[dict[str, Any], float | None, bool]:
        result = self._client.step(dict(action))
        return result.observation, result.reward, result.done

    def close(self) -> None:
        self._client.close()


class _LocalSession:
    """Session with an environment's object in this process, which gets what a server would give it.

    Args:
        environment: Class of the environment.
        action: Class of its actions.
    """

    def __init__(self, environment: Any, action: Any) -> None:
        self._environment = environment()
        self._action = action

    def reset(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], float | None, bool]:
        parameters = inspect.signature(self._environment.reset).parameters
        takes_all = any(each.kind == each.VAR_KEYWORD for each in parameters.values())
        taken = {name: value for name, value in arguments.items() if takes_all or name in parameters}
        return _parts(self._environment.reset(**taken))

    def step(self, action: Mapping[str, Any]) -> tuple[dict[str, Any], float | None, bool]:
        return _parts(self._environment.step(self._action.model_validate(action)))

    def close(self) -> None:
        self._environment.close()


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of a function; none if they name what does not exist."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _parts(observation: Any) -> tuple[dict[str, Any], float | None, bool]:
    return observation.model_dump(exclude=_COMMON), observation.reward, bool(observation.done)


def _schemas(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the JSON schemas of a server's actions and observations.

    Raises:
        ValueError: No server of OpenEnv answers there.
    """
    base = url.replace("ws", "http", 1) if url.startswith("ws") else url
    try:
        is_here = urllib.parse.urlsplit(base).hostname in ("localhost", "127.0.0.1", "::1")
        opener = urllib.request.build_opener(*[urllib.request.ProxyHandler({})] if is_here else [])
        with opener.open(f"{base.rstrip('/')}/schema", timeout=_CONNECT_SECONDS) as response:
            schemas = json.load(response)
        return schemas["action"], schemas["observation"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"No server of OpenEnv answers at {url}: {error}") from error


def _find_class(name: str) -> tuple[Any, Any]:
    """Return an environment's class in an installed package, and the class of its actions.

    Raises:
        ValueError: There is no such module, or not one environment in it.
    """
    base = load_package("openenv.core.env_server", adapter="openenv", extra="openenv")
    module_name, _, class_name = name.partition(":")
    module: Any = None
    for candidate in [module_name] if class_name else [f"{module_name}.server.app", module_name]:
        try:
            module = importlib.import_module(candidate)
            break
        except ModuleNotFoundError as error:
            if error.name is None or not f"{candidate}.".startswith(f"{error.name}."):
                raise ValueError(f"The environment {name} of OpenEnv cannot be imported: {error}") from error
        except Exception as error:
            raise ValueError(f"The environment {name} of OpenEnv cannot be imported: {error}") from error
    if module is None:
        raise ValueError(
            f"No environment of OpenEnv is known as {name!r}: it is neither the URL of a server (http://...) "
            "nor an installed package, nor module:Class"
        )
    classes = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base.Environment) and value is not base.Environment
    }
    if class_name:
        classes = {key: value for key, value in classes.items() if key == class_name}
    if len(set(classes.values())) != 1:
        raise ValueError(
            f"{module.__name__} has {len(classes)} environments of OpenEnv"
            + (f" named {class_name}" if class_name else "")
            + f" ({', '.join(classes) or 'none'}): name one as module:Class"
        )
    environment: Any = next(iter(classes.values()))
    action = _hints(environment.step).get("action")
    if not hasattr(action, "model_validate"):
        raise ValueError(f"{name}: the argument action of step has no class of actions as its type hint")
    return environment, action


def _choose(schema: Mapping[str, Any], chosen: Any, *, argument: str, name: str) -> str:
    """Return the field that is meant: the chosen one, or the only one of text that has to be given.

    Raises:
        ValueError: It does not exist, or it is not clear.
    """
    properties = {key: value for key, value in schema.get("properties", {}).items() if key not in _COMMON}
    if chosen is not None:
        if chosen not in properties:
            raise ValueError(
                f"The environment's argument {argument} is {chosen!r}; {name} has the fields "
                f"{', '.join(properties) or 'none'}"
            )
        return str(chosen)
    texts = [key for key, value in properties.items() if value.get("type") == "string"]
    required = [key for key in texts if key in schema.get("required", [])]
    candidates = required or texts
    if len(candidates) != 1:
        raise ValueError(
            f"{name} has the fields {', '.join(properties) or 'none'}: say which gets the completion, "
            f"in task.environment_arguments, as {argument}"
        )
    return candidates[0]
