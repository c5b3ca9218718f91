"""Train with shardes, and find the places that are measured."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claims.measuring import one_process
from claims.training import Clock, Place, Trained, current_bytes, due_steps, peak_bytes
from shardes.config.schema import Config
from shardes.errors import UserError


def completions_per_iteration(config: Config) -> int:
    """Return the answers that the first iteration of a configuration generates."""
    population = config.es.population
    members = population if isinstance(population, int) else population[0]
    return members * completions_per_member(config)


def completions_per_member(config: Config) -> int:
    """Return the answers that a member gives in an iteration."""
    from shardes.tasks.loading import load_tasks

    num_rows = len(load_tasks(config)[0].train)
    batch = min(config.task.batch_size or num_rows, num_rows)
    return (config.es.prompts_per_member or batch) * config.rollout.samples_per_prompt


def es_config(path: Path, overrides: Sequence[str], *, num_completions: int, answers: float = 1.0) -> Config:
    """Read a configuration, with as many iterations as generate a number of answers.

    Args:
        path: YAML file.
        overrides: Changes of keys, as ``KEY=VALUE``.
        num_completions: Answers, rounded down to whole iterations.
        answers: Answers that an iteration generates, as a share of those of all members to all problems.

    Raises:
        UserError: A key or value is wrong, or an iteration alone takes more.
    """
    each = completions_per_iteration(one_process(path, overrides)) * answers
    if each > num_completions:
        raise UserError(
            f"{num_completions} answers are wanted, but an iteration alone has {each:g}; give more"
        )
    return one_process(path, [*overrides, f"es.iterations={int(num_completions / each)}"])


def train_es(config: Config, *, num_evaluations: int) -> Trained:
    """Train a configuration.

    Args:
        config: Configuration; its run directory must be new.
        num_evaluations: Number of places that are measured.

    Raises:
        UserError: The configuration cannot be used.
    """
    from shardes import TrainConfig, Trainer
    from shardes.runs.journal import read_journal

    for name in ("shardes.session", "shardes.trainer", "shardes.rollout.preparing"):
        importlib.import_module(name)  # which training would do, and which is no part of its time
    imported = current_bytes()
    due = set(due_steps(config.es.iterations, num_evaluations))
    places: list[Place] = []
    counts = {"completions": 0, "tokens": 0}
    of_member, samples = completions_per_member(config), config.rollout.samples_per_prompt

    def count(line: dict[str, Any]) -> None:
        if "num_members" not in line:
            return  # of the final weights
        # Members that stop early, or problems that are left out, are answered less.
        all_answers = line["num_members"] * line.get("num_problems", of_member / samples) * samples
        counts["completions"] += round(line.get("num_answers", all_answers))
        counts["tokens"] += line["num_tokens"]
        step = line["iteration"] + 1
        if step in due:
            places.append(Place(step, counts["completions"], counts["tokens"], clock.seconds))

    clock = Clock()
    trainer = Trainer(TrainConfig(**config.model_dump(mode="json")), on_iteration=count)
    trainer.train()
    peak = peak_bytes()
    history, *_ = read_journal(config.run.dir / "journal.jsonl")
    num_done = 0

    def restore(session: Any, place: Place) -> None:
        nonlocal num_done
        if not num_done:
            session.follow(history.header, config.run.dir)
        session.replay(history.updates[num_done : place.step])
        num_done = place.step
        assert session.digest() == history.digests[place.step], "the journal gives the weights of the run"

    return Trained(places, restore, peak_bytes=peak, imported_bytes=imported)
