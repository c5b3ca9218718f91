"""The numbers of metrics.jsonl, computed from the journal, so that they can be restored from it."""

from typing import Any

from shardes.es.fitness import mean_and_deviation
from shardes.runs.journal import History


def iteration_metrics(history: History, iteration: int) -> dict[str, Any]:
    """What an iteration's members earned, and the centre before them if it was evaluated."""
    members = history.members[iteration].values()
    rewards = [record["reward"] for record in members if record["reward"] is not None]
    mean, std = mean_and_deviation(rewards) if rewards else (None, None)
    update = history.updates[iteration]
    return {
        "iteration": iteration,
        "reward_mean": mean,
        "reward_std": std,
        "reward_min": min(rewards, default=None),
        "reward_max": max(rewards, default=None),
        **heldout_metrics(history, iteration),
        "num_members": len(members),
        "num_excluded_members": len(members) - len(rewards),
        "num_nonfinite_members": sum(not record["is_finite"] for record in members),
        "num_reward_failures": sum(record["num_failures"] for record in members),
        "num_tokens": sum(record["num_tokens"] for record in members),
        "sigma": update["sigma"],
        "alpha": update["alpha"],
        **({"weights_digest": digest} if (digest := history.digests.get(iteration + 1)) else {}),
    }


def heldout_metrics(history: History, iteration: int) -> dict[str, Any]:
    """What the centre earned on held-out problems after ``iteration`` updates; empty if not evaluated."""
    record = history.evaluations.get(iteration)
    if record is None:
        return {}
    return {"heldout_reward": record["reward"], "heldout_num_failures": record["num_failures"]}
