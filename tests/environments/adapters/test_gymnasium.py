"""The adapter of Gymnasium, with the package itself."""

import random
import sys
import types

import pytest

pytest.importorskip("gymnasium")

from shardes.environments.adapters.gymnasium import make

_FROZEN = {"actions": {"left": 0, "down": 1, "right": 2, "up": 3}, "is_slippery": False}


def test_a_frozen_lake_is_crossed_in_words() -> None:
    environment = make("FrozenLake-v1", _FROZEN)()
    said = environment.reset(index=0)
    assert said == (
        "Answer with one of these actions: left, down, right, up.\n\n<red>S</red>FFF\nFHFH\nFFFH\nHFFG"
    )
    path = ["I go Down.", "not up but down", "right", "DOWN", "right"]
    results = [environment.step(completion) for completion in path]
    assert results[0] == ("  (Down)\nSFFF\n<red>F</red>HFH\nFFFH\nHFFG", 0.0, False)
    assert environment.step("I should turn upright.") == (
        "There is no action in this answer. Answer with one of these actions: left, down, right, up.",
        0.0,
        False,
    )
    assert environment.step("right") == ("", 1.0, True)
    assert environment.numbers == {"invalid_actions": 1.0}
    environment.close()
    environment.close()


def test_a_taxi_is_driven_by_numbers_and_takes_the_same_steps_as_without_an_adapter() -> None:
    import gymnasium

    environment = make("Taxi-v4", {"seed": 3, "prompt": "Drive."})()
    said = environment.reset(index=4)
    theirs = gymnasium.make("Taxi-v4", render_mode="ansi")
    theirs.reset(seed=7)
    assert said.startswith("Drive.\n\n+---------+") and "<blue>" in said and "\x1b" not in said
    chooser = random.Random(0)
    for _ in range(200):
        action = chooser.randrange(6)
        _, reward, is_terminated, is_truncated, _ = theirs.step(action)
        said, earned, is_done = environment.step(f"After 7 or 1.5, I choose {action}.")
        assert (earned, is_done) == (reward, is_terminated or is_truncated)
        assert is_done == (said == "")
        if is_done:
            break
    assert is_truncated  # at the 200 steps of its registration
    for completion in ("", "6", "-1", "1.5", "x2", "99999999999999999999"):
        assert "from 0 to 5" in environment.step(completion)[0]


class _Words:
    """Registers an environment of text, and one of vectors, in a module of their own."""

    def __init__(self) -> None:
        import gymnasium
        import numpy as np

        class Echo(gymnasium.Env):
            observation_space = gymnasium.spaces.Text(100)
            action_space = gymnasium.spaces.Text(100)

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                return "say something", {}

            def step(self, action):
                return (
                    action,
                    0.5,
                    action == "end",
                    False,
                    {"is_success": True},
                )

        class Vectors(gymnasium.Env):
            observation_space = gymnasium.spaces.Dict({"at": gymnasium.spaces.Box(-9, 9, (2,), np.int64)})
            action_space = gymnasium.spaces.Box(-1, 1, (2,), np.int64)

            def __init__(self, start=0):
                self.at = np.full(2, start)

            def reset(self, *, seed=None, options=None):
                return {"at": self.at}, {}

            def step(self, action):
                self.at = self.at + action
                return {"at": self.at}, float(self.at.sum()), False, False, {}

        gymnasium.register("Echo-v0", Echo)
        gymnasium.register("Vectors-v0", Vectors)


@pytest.fixture
def registered(monkeypatch):
    import gymnasium

    monkeypatch.setitem(sys.modules, "some_words", types.ModuleType("some_words"))
    _Words()
    yield
    for name in ("Echo-v0", "Vectors-v0"):
        del gymnasium.registry[name]


def test_text_is_passed_on(registered) -> None:
    environment = make("some_words:Echo-v0", {})()
    assert environment.reset(index=1) == "say something"
    assert environment.step(" yes ") == ("yes", 0.5, False)
    assert environment.step("end") == ("", 0.5, True)
    assert environment.numbers == {"invalid_actions": 0.0, "success": 1.0}


def test_other_observations_are_json_and_other_actions_are_named(registered) -> None:
    environment = make("Vectors-v0", {"start": 0, "actions": {"go": [1, 0], "go back": [-1, 0]}})()
    assert environment.reset(index=0, start=2).endswith('\n\n{"at": [2, 2]}')
    assert environment.step("go") == ('{"at": [3, 2]}', 5.0, False)
    assert environment.step("Go back!") == ('{"at": [2, 2]}', 4.0, False)
    with pytest.raises(ValueError, match=r"Box.* neither text nor discrete: name those"):
        make("Vectors-v0", {})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("FrozenLake", {}, r"Unknown environment of gymnasium: 'FrozenLake'; nearest: FrozenLake-v1"),
        ("Taxy-v4", {}, r"nearest: Taxi-v4"),
        ("no_such_module_here:Taxi-v4", {}, r"cannot import no_such_module_here, .*No module named"),
        ("FrozenLake-v1", {"slippery": True}, r"cannot make FrozenLake-v1 .*slippery"),
        ("FrozenLake-v1", {"actions": {"jump": 4}}, r"4 \(jump\) is no action of FrozenLake-v1"),
        ("FrozenLake-v1", {"actions": ["left"]}, r"it maps words to actions"),
        ("FrozenLake-v1", {"seed": True}, r"seed is True"),
    ],
)
def test_bad_names_and_arguments_are_told(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, arguments)
