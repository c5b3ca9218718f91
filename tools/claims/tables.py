"""Tables of the study, as Markdown."""

import math
import statistics
from collections.abc import Iterable, Sequence

from claims.arms import ARMS, num_completions
from claims.figures import Results
from claims.means import Mean, mean_of

# Quantile of the ratio of two variances with four degrees of freedom each: F(4, 4), two-sided 95%.
VARIANCE_RATIO = 9.6
SPENT = {"num_completions": "answers", "num_tokens": "tokens", "core_seconds": "core-seconds"}
_MEBIBYTE = 2**20


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, and an empty one; nothing if there are no rows."""
    body = [f"| {' | '.join(row)} |" for row in rows]
    if not body:
        return []
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body, ""]


def page(results: Results, pictures: Sequence[str]) -> str:
    """Return the part of the page that is made from the lines.

    Args:
        results: Lines of the study.
        pictures: Names of the pictures beside the page.
    """
    lines: list[str] = []
    for title, part in {
        "Claims": claims,
        "Held-out reward": rewards,
        "What it takes": costs,
        "Step sizes": steps,
        "Delayed reward": delays,
        "Reward and divergence from the base model": divergences,
    }.items():
        found = part(results)
        if found:
            lines += [f"## {title}", "", *found]
    lines += [line for name in pictures for line in (f"![{name.removesuffix('.png')}]({name})", "")]
    return "\n".join(lines)


def rewards(results: Results) -> list[str]:
    """Return the final rewards of all arms, and how they differ from those of plain ES."""
    lines = []
    for task in results.tasks():
        arms = results.arms(task)
        if not arms:
            continue
        whole = [arm for arm in arms if ARMS[arm].budget == 1]
        least = {key: results.smallest_total(task, whole, key=key) for key in ("num_tokens", "core_seconds")}
        rows = []
        for arm in arms:
            best, tried = results.best(task, arm), results.sweep(task, arm)
            edge = " (edge)" if tried and best in (min(tried), max(tried)) else ""
            against = results.difference(task, arm, "es") if arm != "es" else None
            at_half = results.difference_at_half(task, arm, "es")
            at_equal = [
                mean_of(results.reward_at(task, arm, key=key, value=value)).text()
                for key, value in least.items()
            ]
            final = list(results.final(task, arm).values())
            rows.append(
                [
                    arm,
                    f"{best:g}{edge}",
                    str(num_completions(task, arm)),
                    mean_of(final).text(),
                    f"{statistics.stdev(final):.3f}" if len(final) > 1 else "",
                    against.text(sign="+") if against else "",
                    at_half.text(sign="+") if at_half else "",
                    _mean_text(results.last(task, arm, "sampled_reward")),
                    *at_equal,
                    str(len(final)),
                ]
            )
        head = ["arm", "step size", "answers", "reward", "spread over seeds", "against es, same seeds"]
        head += ["after half of es's tokens, against its end"]
        head += ["drawn at temperature 1", f"after {least['num_tokens']:.0f} tokens"]
        head += [f"after {least['core_seconds']:.0f} core-seconds", "seeds"]
        base = results.base_reward(task)
        lines += [f"**{task}**; the base model has {base:.3f}.", "", *table(head, rows)]
    return lines


def costs(results: Results) -> list[str]:
    """Return answers, tokens, time and memory of all arms."""
    lines = []
    for task in results.tasks():
        arms = results.arms(task)
        if not arms:
            continue
        target = results.target(task, arms)
        rows = []
        for arm in arms:
            lines_of_runs = results.runs(task, arm).values()
            peak = statistics.fmean(line["peak_bytes"] for line in lines_of_runs)
            own = statistics.fmean(line["peak_bytes"] - line["imported_bytes"] for line in lines_of_runs)
            rows.append(
                [
                    arm,
                    *(_until(results, task, arm, target, key) for key in SPENT),
                    f"{statistics.fmean(results.last(task, arm, 'num_tokens')):.0f}",
                    f"{statistics.fmean(results.last(task, arm, 'core_seconds')):.1f}",
                    f"{peak / _MEBIBYTE:.0f} MiB",
                    f"{own / _MEBIBYTE:.0f} MiB",
                ]
            )
        head = ["arm", *(f"{name} until {target:.3f}" for name in SPENT.values()), "tokens in all"]
        head += ["core-seconds in all", "peak memory", "of it after imports"]
        lines += [f"**{task}**", "", *table(head, rows)]
    return lines


def steps(results: Results) -> list[str]:
    """Return the rewards of the sweeps."""
    lines = []
    for task in results.tasks():
        arms = [arm for arm in results.arms(task) if results.sweep(task, arm)]
        rows = []
        for arm in arms:
            good, tried = results.good_steps(task, arm)
            best = results.best(task, arm)
            shown = [
                f"**{size:g}: {reward:.3f}**" if size == best else f"{size:g}: {reward:.3f}"
                for size, reward in results.sweep(task, arm).items()
            ]
            rows.append([arm, ", ".join(shown), f"{good} of {tried}"])
        head = ["arm", "step size: held-out reward", "within 90% of the best gain"]
        found = table(head, rows)
        lines += [f"**{task}**", "", *found] if found else []
    return lines


def delays(results: Results) -> list[str]:
    """Return the final rewards where a reward comes at the end of several answers."""
    lines = []
    for task in results.tasks():
        delayed = results.arms(task, evidence=["delay"])
        if not delayed:
            continue
        rows = []
        for arm in ["es", "grpo", *delayed]:
            if final := list(results.final(task, arm).values()):
                against = results.difference(task, arm, "grpo") if arm in delayed else None
                rows.append([arm, mean_of(final).text(), against.text(sign="+") if against else ""])
        lines += [f"**{task}**", "", *table(["arm", "held-out reward", "against grpo, same seeds"], rows)]
    return lines


def divergences(results: Results) -> list[str]:
    """Return how far the final models are from the base model, and how long their answers are."""
    rows = []
    for task in results.tasks():
        for arm in results.arms(task):
            if not results.last(task, arm, "kl"):
                continue
            final = list(results.final(task, arm).values())
            rows.append(
                [
                    task,
                    arm,
                    mean_of(final).text(),
                    _mean_text(results.last(task, arm, "kl")),
                    _mean_text(results.last(task, arm, "kl_of_base")),
                    f"{statistics.fmean(results.last(task, arm, 'length')):.1f}",
                ]
            )
    head = ["task", "arm", "held-out reward", "KL(model, base)", "KL(base, model)", "tokens of an answer"]
    return table(head, rows)


def claims(results: Results) -> list[str]:
    """Return the paper's claims with what was measured of each, on each task."""
    rows = []
    for task in results.tasks():
        if not {"es", "grpo"} <= set(results.arms(task)):
            continue
        paired = results.on_shared_seeds(task, ["es", "grpo"])
        difference = paired.difference(task, "es", "grpo")
        if difference is None:
            continue
        found = [
            ["ES earns more at equal answers", task, difference.text(sign="+"), verdict(difference.sign)],
            *(compare(paired, task) for compare in (_time, _spread, _robust, _memory, _hacking)),
        ]
        rows += [row for row in found if row]
    return table(["claim", "task", "es against grpo", "here"], rows)


def verdict(sign: int) -> str:
    """Return what a difference says of a claim: 1 for it, -1 against it, 0 neither."""
    return {1: "confirmed", -1: "the opposite", 0: "not told apart"}[sign]


def _time(results: Results, task: str) -> list[str]:
    least = results.smallest_total(task, ["es", "grpo"], key="core_seconds")
    of_es, of_grpo = (results.reward_at(task, arm, key="core_seconds", value=least) for arm in ("es", "grpo"))
    found = mean_of([one - two for one, two in zip(of_es, of_grpo, strict=True)])
    return [
        f"ES earns more in equal time ({least:.0f} core-seconds)",
        task,
        found.text(sign="+"),
        verdict(found.sign),
    ]


def _spread(results: Results, task: str) -> list[str] | None:
    finals = [list(results.final(task, arm).values()) for arm in ("es", "grpo")]
    if min(map(len, finals)) < 3:
        return None
    one, two = (statistics.stdev(final) for final in finals)
    ratio = (one / two) ** 2 if two else math.inf
    sign = -1 if ratio > VARIANCE_RATIO else (1 if ratio < 1 / VARIANCE_RATIO else 0)
    return ["Runs of ES differ less", task, f"spread {one:.3f} against {two:.3f}", verdict(sign)]


def _robust(results: Results, task: str) -> list[str]:
    one, two = (results.good_steps(task, arm)[0] for arm in ("es", "grpo"))
    return [
        "More step sizes are good for ES",
        task,
        f"{one} against {two}, half a decade apart",
        verdict((one > two) - (one < two)),
    ]


def _memory(results: Results, task: str) -> list[str]:
    one, two = (
        statistics.fmean(
            line["peak_bytes"] - line["imported_bytes"] for line in results.runs(task, arm).values()
        )
        for arm in ("es", "grpo")
    )
    shown = f"{one / _MEBIBYTE:.0f} against {two / _MEBIBYTE:.0f} MiB"
    return ["ES takes less memory", task, shown, verdict((one < two) - (one > two))]


def _hacking(results: Results, task: str) -> list[str] | None:
    one, two = (results.last(task, arm, "kl") for arm in ("es", "grpo"))
    if not one or not two:
        return None
    found: Mean = mean_of([a - b for a, b in zip(one, two, strict=True)])
    return ["ES stays nearer to the base model", task, f"KL {found.text(sign='+')}", verdict(-found.sign)]


def _until(results: Results, task: str, arm: str, target: float, key: str) -> str:
    """Return the median of what runs had spent until a reward, and how many of them had it."""
    spent = results.until(task, arm, reward=target, key=key)
    known = [each for each in spent if each is not None]
    if not known:
        return "never"
    return f"{statistics.median(known):.0f}" + (
        "" if len(known) == len(spent) else f" ({len(known)} of {len(spent)})"
    )


def _mean_text(values: Sequence[float]) -> str:
    return mean_of(values).text() if values else ""
