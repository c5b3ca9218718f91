"""Compare racing with asking all members fewer problems, in a model of rewards: no language model, a minute.

A member's reward for a problem is its signal, plus the problem's difficulty, plus noise. What counts is how
well the update follows the gradient: the mean of ``sum Z s / (|Z| sqrt(N))`` over populations, squared: the
share of the members that would do as well if their signals were known. Signals are normal, as where rewards
change linearly with weights; or few members have one ("rare": 15%), as where most change no answer.

    python tools/bench/racing.py
"""

import itertools
import math

import click
import numpy as np

from shardes.config.es import RacingConfig
from shardes.es.racing import Round, advance, begin, relative_error
from shardes.es.shaping import shape


def race(answers: np.ndarray, settings: RacingConfig) -> tuple[list[float], int, float]:
    """Return the rewards that a race gives, the answers that it asks, and the error that it expects.

    Args:
        answers: Rewards, float64 of shape [members, problems].
        settings: Section ``es.racing``.
    """
    num_members, num_problems = answers.shape
    bounds = [round(num_problems * i / settings.rounds) for i in range(settings.rounds + 1)]
    standing, num_asked = begin(num_members), 0
    for before, after in itertools.pairwise(bounds):
        rows = {member: answers[member, :after].tolist() for member in standing.racing}
        num_asked += len(rows) * (after - before)
        found = Round(
            earned={member: math.fsum(row) / after for member, row in rows.items()},
            by_problem=[row + [None] * (num_problems - after) for row in rows.values()],
            broken=[],
            asked_before=before / num_problems,
            asked=after / num_problems,
        )
        standing = advance(standing, found, settings=settings, antithetic=False)
    rewards = [reward for reward in standing.rewards if reward is not None]
    return rewards, num_asked, relative_error(standing, antithetic=False) or 0.0


@click.command(help=__doc__)
@click.option("--rounds", default=3)
@click.option("--keep", default=0.5)
@click.option("--tolerance", type=float)
@click.option("--members", default=32)
@click.option("--problems", default=60)
@click.option("--populations", default=400)
def main(
    rounds: int, keep: float, tolerance: float | None, members: int, problems: int, populations: int
) -> None:
    settings = RacingConfig(rounds=rounds, keep=keep, tolerance=tolerance)
    draws = np.random.default_rng(0)
    click.echo("| signals | noise of an answer | shaping | asked | all | racing | fewer problems | error |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for kind, noise in itertools.product(("normal", "rare"), (2.0, 4.0, 8.0, 16.0)):
        arms: dict[tuple[str, str], list[float]] = {}
        asked, errors = [], []
        for _ in range(populations):
            signal = draws.standard_normal(members)
            if kind == "rare":
                signal *= (draws.random(members) < 0.15) / math.sqrt(0.15)
            answers = signal[:, None] + 2 * draws.standard_normal((1, problems))
            answers = answers + noise * draws.standard_normal((members, problems))
            raced, num_asked, error = race(answers, settings)
            asked.append(num_asked / answers.size)
            errors.append(error)
            fewer = answers[:, : round(num_asked / members)].mean(1)
            found = {"all": answers.mean(1), "racing": raced, "fewer": fewer}
            for how in ("zscore", "centered_rank"):
                for arm, rewards in found.items():
                    shaped = np.array(shape([float(r) for r in rewards], how=how))
                    length = math.sqrt(members * float(shaped @ shaped)) or 1.0
                    arms.setdefault((how, arm), []).append(float(shaped @ signal) / length)
        for how in ("zscore", "centered_rank"):
            cells = " | ".join(f"{np.mean(arms[how, arm]) ** 2:.3f}" for arm in ("all", "racing", "fewer"))
            click.echo(
                f"| {kind} | {noise:g} | {how} | {np.mean(asked):.0%} | {cells} | {np.mean(errors):.2f} |"
            )


if __name__ == "__main__":
    main()
