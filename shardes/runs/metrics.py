"""The numbers of metrics.jsonl, computed from the journal, so that they can be restored from it."""

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from shardes.es.member import MemberResult, mean_and_deviation, mean_reward, member_rewards
from shardes.runs.journal import History


def iteration_metrics(history: History, iteration: int) -> dict[str, Any]:
    """Return the metrics of an iteration's members, and of the centre before them if it was evaluated."""
    members = [MemberResult.of_record(record) for record in history.members.get(iteration, {}).values()]
    assert history.header is not None, "updates follow a header"
    on_error = history.header["settings"].get("task.on_reward_error", "exclude")
    rewards = [reward for reward in member_rewards(members, on_error=on_error) if reward is not None]
    mean, std = mean_and_deviation(rewards) if rewards else (None, None)
    update = history.updates[iteration]
    return {
        "iteration": iteration,
        "reward_mean": mean,
        "reward_std": std,
        "reward_min": min(rewards, default=None),
        "reward_max": max(rewards, default=None),
        "components": {
            name: mean_reward([member.components.get(name) for member in members])
            for name in (members[0].components if members else ())
        },
        **heldout_metrics(history, iteration),
        "num_members": len(members),
        "num_excluded_members": len(members) - len(rewards),
        "num_nonfinite_members": sum(not member.is_finite for member in members),
        "num_reward_failures": sum(member.num_failures for member in members),
        "num_tokens": sum(member.num_tokens for member in members),
        **_tokens_by_turn(members),
        **_screened(update),
        "sigma": update["sigma"],
        "alpha": update["alpha"],
        "perturbation_norm": update["sigma"] * math.sqrt(num_trained(history.header)),
        **update.get("instruments", {}),
        **history.instruments.get(iteration + 1, {}),
        **({"weights_digest": digest} if (digest := history.digests.get(iteration + 1)) else {}),
    }


def _screened(update: Mapping[str, Any]) -> dict[str, int]:
    """Return how many problems were asked and how many left out; nothing without screening."""
    found = update.get("screening")
    return {} if found is None else {key: found[key] for key in ("num_problems", "num_left_out")}


def _tokens_by_turn(members: Sequence[MemberResult]) -> dict[str, list[int]]:
    """Return the tokens that all members generated in each turn of episodes; nothing if there are none."""
    turns = zip_longest(*(member.turn_tokens for member in members), fillvalue=0)
    sums = [sum(turn) for turn in turns]
    return {"tokens_by_turn": sums} if sums else {}


def num_trained(header: dict[str, Any]) -> int:
    """Return the number of weights that a run trains."""
    return sum(math.prod(shape) for *_, shape in header["parameters"])


def heldout_metrics(history: History, iteration: int) -> dict[str, Any]:
    """Return held-out rewards and KL of the centre after ``iteration`` updates, if measured."""
    metrics: dict[str, Any] = {}
    if iteration in history.kls:
        metrics["kl_to_base"] = history.kls[iteration]
    record = history.evaluations.get(iteration, {})
    if "reward" in record:
        metrics |= {
            "heldout_reward": record["reward"],
            "heldout_num_failures": record.get("num_failures", 0),
            "heldout_components": record.get("components", {}),
        }
    if "objective" in record:
        metrics["heldout_objective"] = record["objective"]
    if "sets" in record:
        metrics["heldout_sets"] = record["sets"]
    return metrics
