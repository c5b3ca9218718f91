"""Measure the seconds of the Countdown reward for 10,000 responses of about 2,000 characters, on one core."""

import time

import click

from shardes.tasks.builtin.countdown import CHAT, generate_problems

SIGNS = "+-*/"


def responses(rows: list[dict[str, list[int]]]) -> list[str]:
    """Make a response for each row: some thoughts, then an expression that uses all its numbers."""
    made = []
    for index, row in enumerate(rows):
        first, *rest = row["numbers"]
        tried = [f"{first} {SIGNS[k % 4]} {rest[k % len(rest)]} = {k}, which is not it." for k in range(70)]
        signs = (SIGNS[(index + k) % 4] for k in range(len(rest)))
        expression = "".join(f" {sign} {number}" for sign, number in zip(signs, rest, strict=True))
        made.append(f"<think>{' '.join(tried)}</think>\n<answer>{first}{expression}</answer>")
    return made


@click.command(help=__doc__)
@click.option("--num-responses", default=10_000, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(num_responses: int, repeats: int) -> None:
    problems = generate_problems(200, seed=0)
    rows = [problems[index % len(problems)] for index in range(num_responses)]
    completions = responses(rows)
    columns = {key: [row[key] for row in rows] for key in ("numbers", "target")}
    mean_length = sum(map(len, completions)) / len(completions)
    click.echo(f"{num_responses} responses of {mean_length:.0f} characters")
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for component in CHAT.rewards:
            assert not isinstance(component.function, str)
            component.function([""] * num_responses, completions, **columns)
        best = min(best, time.perf_counter() - start)
    click.echo(f"answer and format together: {best:.2f} s, best of {repeats}")


if __name__ == "__main__":
    main()
