"""The adapter of OpenEnv, with the package itself: a server on loopback, and a class in this process."""

import sys
import threading
import time
import types
from typing import Any

import pytest

pytest.importorskip("openenv")
uvicorn = pytest.importorskip("uvicorn")

from openenv.core.env_server import Action, Environment, Observation, State, create_app  # noqa: E402

from shardes.environments.adapters.openenv import make  # noqa: E402


class GuessAction(Action):
    guess: str


class GuessObservation(Observation):
    hint: str = ""
    num_guesses: int = 0


class GuessEnvironment(Environment):
    """Three guesses of a number that is the seed."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._number = self._num_guesses = 0

    def reset(self, seed: int | None = None, offset: int = 0, **_: Any) -> GuessObservation:
        self._number, self._num_guesses = (seed or 0) + offset, 0
        return GuessObservation(hint="Guess.", reward=None, done=False)

    def step(self, action: GuessAction, timeout_s: float | None = None, **_: Any) -> GuessObservation:
        if action.guess == "crash":
            raise RuntimeError("no such guess")
        self._num_guesses += 1
        is_right = action.guess.strip() == str(self._number)
        return GuessObservation(
            hint="right" if is_right else "wrong",
            num_guesses=self._num_guesses,
            reward=float(is_right),
            done=is_right or self._num_guesses == 3,
        )

    @property
    def state(self) -> State:
        return State(step_count=self._num_guesses)


@pytest.fixture(scope="module")
def url():
    app = create_app(GuessEnvironment, GuessAction, GuessObservation, max_concurrent_envs=4)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(params=["server", "class", "package"])
def name(request, monkeypatch):
    if request.param == "server":
        return request.getfixturevalue("url")
    if request.param == "class":
        return f"{__name__}:GuessEnvironment"
    modules = {
        name: types.ModuleType(name) for name in ("guess_env", "guess_env.server", "guess_env.server.app")
    }
    modules["guess_env"].__path__ = modules["guess_env.server"].__path__ = []
    modules["guess_env.server.app"].Environment = Environment
    modules["guess_env.server.app"].GuessEnvironment = GuessEnvironment
    for module, made in modules.items():
        monkeypatch.setitem(sys.modules, module, made)
    return "guess_env"


def test_episodes_are_played_side_by_side(name: str) -> None:
    factory = make(name, {"seed": 10, "offset": 1, "observation_field": "hint"})
    first, second = factory(), factory()
    assert first.reset(index=5) == "Guess."
    assert second.reset(index=6, offset=100, other="not an argument") == "Guess."
    assert first.step("7") == ("wrong", 0.0, False)
    assert second.step("17") == ("wrong", 0.0, False)
    assert second.step(" 116 ") == ("", 1.0, True)
    assert first.step("16") == ("", 1.0, True)
    first.close()
    first.close()
    assert second.reset(index=0) == "Guess."  # another episode of the same object
    assert [second.step("0")[2] for _ in range(3)] == [False, False, True]
    second.close()


def test_fields_are_chosen_or_shown_all(name: str) -> None:
    environment = make(name, {"observation_field": "num_guesses"})()
    assert environment.reset(index=1) == "0"
    with pytest.raises(RuntimeError, match="no such guess"):
        environment.step("crash")
    environment.close()
    environment = make(name, {"action_field": "guess"})()
    assert environment.reset(index=1) == "Guess."  # the only text
    environment.close()
    with pytest.raises(ValueError, match=r"action_field is 'gues'; .* has the fields guess"):
        make(name, {"action_field": "gues"})
    with pytest.raises(ValueError, match=r"observation_field is 'x'; .* has the fields hint, num_guesses"):
        make(name, {"observation_field": "x"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://127.0.0.1:1", r"No server of OpenEnv answers at http://127.0.0.1:1: .*refused"),
        ("no_such_env_here", r"No environment of OpenEnv is known as 'no_such_env_here'"),
        (f"{__name__}:Nothing", r"has 0 environments of OpenEnv named Nothing"),
        ("json", r"json has 0 environments of OpenEnv \(none\)"),
    ],
)
def test_what_is_not_there_is_told(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, {})
