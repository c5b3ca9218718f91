"""Checks of what environments return, and the form in which a worker passes it on."""

import json
from collections.abc import Mapping
from typing import Any

from shardes.environments.base import Observation, StepResult
from shardes.rewards.worker import MAX_REWARD, number, shown
from shardes.utils.nesting import MAX_DEPTH, is_deep

Answer = dict[str, Any]
"""The fields of a ``StepResult`` as JSON has them, and ``lacks_memory``: whether memory ran out."""


def answer_to_reset(returned: Any) -> Answer:
    """Check what ``reset`` returned.

    Raises:
        TypeError: It is no observation.
    """
    return {"observation": _observation(returned, "reset")}


def answer_to_step(returned: Any) -> Answer:
    """Check what ``step`` returned.

    Raises:
        TypeError: It is not an observation, a reward and whether the episode is over.
        ValueError: The reward is no usable number.
    """
    if not isinstance(returned, tuple | list) or len(returned) != 3:
        raise TypeError(f"step returned {shown(returned)}; wanted (observation, reward, done)")
    observation, given, done = returned
    is_done = done.item() if hasattr(done, "item") else done
    if not isinstance(is_done, bool) and is_done not in (0, 1):
        raise TypeError(f"step returned {shown(done)} as done; wanted True or False")
    return {
        "observation": "" if is_done else _observation(observation, "step"),
        "reward": _reward(given, "step"),
        "is_done": bool(is_done),
    }


def answer_to_finish(returned: Any) -> Answer:
    """Check what ``finish`` returned, the last reward.

    Raises:
        ValueError: The reward is no usable number.
    """
    return {"reward": _reward(returned, "finish"), "is_done": True}


def checked_numbers(given: Any) -> dict[str, float]:
    """Check the further numbers that an environment reports.

    Raises:
        TypeError: They are no numbers by name.
    """
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        values = {name: number(value) for name, value in given.items()}
        found = {name: value for name, value in values.items() if value is not None}
        if len(found) == len(values):
            return found
    raise TypeError(f"numbers is {shown(given)}; wanted a number for each name")


def read_answer(answer: Mapping[str, Any]) -> StepResult:
    """Check a worker's answer, which an environment may have forged, and return what it says.

    Raises:
        ValueError, TypeError, KeyError: It is not what a worker sends.
    """
    reward, failure = answer.get("reward", 0.0), answer.get("failure")
    seconds, numbers = answer["seconds"], answer.get("numbers", {})
    if not all(isinstance(value, float) and abs(value) < MAX_REWARD for value in (reward, seconds)):
        raise ValueError("a reply that is not made of numbers")
    if not isinstance(failure, str | None):
        raise TypeError("a reply whose message is no text")
    return StepResult(
        observation=_observation(answer.get("observation", ""), "a reply"),
        reward=reward,
        is_done=bool(answer.get("is_done", False)),
        numbers=checked_numbers(numbers),
        failure=failure,
        seconds=seconds,
    )


def _reward(given: Any, method: str) -> float:
    value = number(given)
    if value is None:
        raise ValueError(f"{method} returned {shown(given)} as reward, which is no usable number")
    return value


def _observation(given: Any, method: str) -> Observation:
    """Return an observation of plain text, lists and dicts."""
    if isinstance(given, str):
        return str(given)
    if isinstance(given, list | tuple) and given and all(map(_is_message, given)):
        try:
            messages: Observation = json.loads(json.dumps([dict(message) for message in given]))
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(f"{method} returned a message that cannot be sent on ({error})") from None
        if is_deep(messages):
            raise TypeError(f"{method} returned a message of more than {MAX_DEPTH} levels in each other")
        return messages
    raise TypeError(
        f"{method} returned {shown(given)} as observation; wanted text, or a list of messages with role and "
        "content"
    )


def _is_message(given: Any) -> bool:
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        return False
    content = given.get("content")
    return isinstance(content, str | list) or (content is None and "tool_calls" in given)
