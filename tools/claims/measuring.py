"""Measure places of a training by shardes's own evaluation, the same for every method."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from claims.training import Place, Trained
from shardes.config.loading import load_config
from shardes.config.schema import Config


def one_process(path: Path, overrides: Iterable[str]) -> Config:
    """Read a configuration for one process that evaluates nothing while it trains.

    Raises:
        UserError: A key or value is wrong.
    """
    always = ["parallel.backend=single", "parallel.shard_size=null", "parallel.threads_per_rank=1"]
    always += ["task.reward_workers=0", "eval.every=0", "log.samples_every=0", "log.instruments_every=0"]
    return load_config(path, [*always, *overrides])


def measure(config: Config, trained: Trained, *, kl_prompts: int) -> list[dict[str, Any]]:
    """Measure the base model and all places of a training on the held-out problems.

    Args:
        config: Configuration, which says what is asked.
        trained: The training.
        kl_prompts: Number of held-out problems on whose answers the divergence is estimated; 0: none.

    Returns:
        A point for each place, the base model first: the fields of ``Place``; ``reward`` of the answers that
        ``shardes evaluate`` asks for (None where logits are not finite); ``sampled_reward`` and ``length``,
        in tokens, of answers drawn at temperature 1; ``kl``, an estimate of KL(model || base) in nats per
        token from these; ``kl_of_base``, one of KL(base || model) from the base model's; and ``seconds``,
        the core-seconds of the measurement.
    """
    from shardes.evaluation.kl import AnswerLikelihoods
    from shardes.models.checkpoint import Checkpoint
    from shardes.rewards.pool import InProcessRewards
    from shardes.rollout.build import make_evaluator, make_scheduler
    from shardes.rollout.preparing import prepare_tasks
    from shardes.session import open_session
    from shardes.tasks.base import all_rewards
    from shardes.tasks.loading import load_tasks

    task, _ = load_tasks(config)
    prepared = prepare_tasks(config, task, trains=False)
    task = prepared.task
    points: list[dict[str, Any]] = []
    with open_session(config) as session:
        evaluator, scorer, _ = make_evaluator(
            session, task, rewards=InProcessRewards(all_rewards([task])), encoder=prepared.encoder
        )
        scheduler = make_scheduler(session, evaluator)
        heldout = evaluator.prepare(task.heldout, iteration=0)
        sampled = evaluator.sampled()
        probe = task.heldout[:kl_prompts]
        likelihoods = AnswerLikelihoods(evaluator, scheduler, task=task, rows=probe, world=session.mesh.world)
        base_pairs: list[list[list[int]]] = []
        base_scores: list[float] = []
        drawn: list[tuple[list[list[list[int]]], list[float]]] = []
        for place in [Place(0, 0, 0, 0.0), *trained.places]:
            start = time.process_time()
            if place.step:
                trained.restore(session, place)
            found = scheduler.evaluate_centre(heldout)
            point = {**asdict(place), "reward": _mean(found, config)}
            if probe:
                asked = sampled.prepare(probe, iteration=0, scorer=scorer)
                answers = scheduler.evaluate_centre(asked, evaluator=sampled, keeps_samples=True)
                point["sampled_reward"] = _mean(answers, config)
                point["length"] = sum(answers.lengths) / len(probe)
                pairs = _pairs(prepared.encoder, task, probe, answers)
                scores = likelihoods.log_likelihoods(likelihoods.prepare(pairs)) if pairs else []
                drawn.append((pairs, scores))
                if not place.step:
                    base_pairs, base_scores = pairs, scores
                elif base_pairs:
                    now = likelihoods.log_likelihoods(likelihoods.prepare(base_pairs))
                    point["kl_of_base"] = divergence(base_pairs, base_scores, now)
            point["seconds"] = time.process_time() - start
            points.append(point)
        session.weights.load(Checkpoint(config.model.path))
        for point, (pairs, scores) in zip(points, drawn, strict=False):
            if pairs:
                of_base = likelihoods.log_likelihoods(likelihoods.prepare(pairs))
                point["kl"] = divergence(pairs, scores, of_base)
    return points


def divergence(
    pairs: Sequence[Sequence[Sequence[int]]], own: Sequence[float], other: Sequence[float]
) -> float | None:
    """Return an estimate of a divergence from answers of a model, in nats per token.

    Args:
        pairs: Tokens of each prompt and of the model's answer to it.
        own: Each answer's mean log-likelihood per token under the model itself.
        other: The same under the other model.

    Returns:
        How much less likely the answers are under the other model; None where logits are not finite.
    """
    lengths = [len(answer) for _, answer in pairs]
    total = sum(
        length * (mine - theirs) for length, mine, theirs in zip(lengths, own, other, strict=True)
    ) / sum(lengths)
    return total if math.isfinite(total) else None


def _mean(found: Any, config: Config) -> float | None:
    from shardes.es.member import apply_reward_error_policy, mean_reward

    on_error = config.task.on_reward_error
    rewards = apply_reward_error_policy(found.rewards, found.has_failed, on_error=on_error)
    return mean_reward(rewards) if found.is_finite else None


def _pairs(encoder: Any, task: Any, rows: Sequence[Any], answers: Any) -> list[list[list[int]]]:
    """Return the tokens of prompts and of their answers, without empty answers."""
    from shardes.rollout.encoding import Question

    return [
        [list(encoder.encode(Question.of(task, rows[index])).prompts[0]), sample.token_ids]
        for index, sample in sorted(answers.samples.items())
        if sample.token_ids
    ]
