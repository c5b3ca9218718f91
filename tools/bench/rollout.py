"""Measure generation: tokens per second of shardes' decode loop and of transformers' ``generate``.

Both answer the same prompts with the same model, alternately, in one process. The model is a Llama of random
parameters, so that answers never end by themselves; where each ends is drawn beforehand, from a geometric
distribution with a mean of a third of the longest answer ("spread") or all at the longest ("equal"), and both
sides are told alike. Prompts are of different lengths, and in a second set all begin with the same 48 tokens.

    python tools/bench/rollout.py --json benchmarks/rollout-cpu.json

The last rows are an iteration of the quickstart, 32 members of 64 prompts, perturbed and rewarded, once with
the loop and once with ``generate`` in its place, by the number of prompts that are answered together.

With ``--config FILE [KEY=VALUE]...`` iterations of a run in one process are measured instead: against its
engine's generating alone, for the same members and prompts, and against the matrix products of that, computed
by themselves with the same weights and shapes. Seconds are of the processor, the least of some iterations,
between which the others take their turns.

    python tools/bench/rollout.py --config configs/own_task/own_task.yaml --json benchmarks/iteration-cpu.json
        model.path=models/smollm2-135m-instruct model.dtype=bfloat16 es.population=2
        task.reward=tools/bench/common.py:by_letters rollout.micro_batch_size=32 (in one line)
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from common import ROOT, Row, machine_facts, num_parameters, random_model, show, write_report
from products import Products

from shardes.utils.device import synchronize

PREFIX_LENGTH = 48


def random_prompts(num_prompts: int, *, prefix_length: int) -> list[list[int]]:
    """Make prompts of 8 to 40 tokens after a shared prefix."""
    generator = torch.Generator().manual_seed(1)

    def some(count: int) -> list[int]:
        return torch.randint(2, 8192, (count,), generator=generator).tolist()

    prefix = some(prefix_length)
    return [prefix + some(8 + (7 * i) % 33) for i in range(num_prompts)]


def answer_lengths(num_prompts: int, *, longest: int, spread: bool) -> list[int]:
    """Return the tokens of each answer: all ``longest``, or geometric with a third of it as the mean."""
    if not spread:
        return [longest] * num_prompts
    generator = torch.Generator().manual_seed(2)
    uniform = torch.rand(num_prompts, generator=generator, dtype=torch.float64)
    lengths = 1 + torch.log1p(-uniform) / math.log(1 - 3 / longest)
    return lengths.long().clamp(1, longest).tolist()


def best_seconds(
    sides: dict[str, Callable[[], Any]], device: torch.device, *, num_turns: int
) -> dict[str, float]:
    """Return the least seconds of each side; the sides take turns."""
    seconds = dict.fromkeys(sides, math.inf)
    for _ in range(num_turns):
        for name, run in sides.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def compare(
    model: Any,
    *,
    num_prompts: int,
    longest: int,
    micro_batch_size: int,
    spread: bool,
    shared: bool,
    num_turns: int,
) -> Row:
    """Measure both sides on one set of prompts."""
    from transformers.generation import StoppingCriteria, StoppingCriteriaList

    from shardes.rollout.batching import compose, shared_prefix
    from shardes.rollout.engines.transformers.attention import choose_attention
    from shardes.rollout.engines.transformers.decoder import Decoder

    choose_attention(uses_cudnn=False)  # for both sides, as runs do by default
    device = model.device
    prompts = random_prompts(num_prompts, prefix_length=PREFIX_LENGTH if shared else 0)
    lengths = answer_lengths(num_prompts, longest=longest, spread=spread)
    batches = []
    for batch in compose(prompts, micro_batch_size=micro_batch_size, pad_id=0, max_new_tokens=longest):
        budgets = torch.tensor([lengths[row] for row in batch.rows])
        batches.append((replace(batch, budgets=budgets).to(device), budgets))
    prefix = shared_prefix(prompts)
    prefix_ids = torch.tensor([prefix], device=device) if prefix else None
    decoder = Decoder(eos_ids=[], pad_id=0, max_new_tokens=longest)
    answers: dict[str, list[list[int]]] = {}

    class Ends(StoppingCriteria):
        def __init__(self, width: int, budgets: torch.Tensor) -> None:
            self._end = width + budgets.to(device)

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return self._end <= input_ids.shape[1]

    def loop() -> None:
        decoder.begin(model, prefix_ids)
        answers["loop"] = [row for batch, _ in batches for row in decoder.decode(model, batch).tokens]

    def generate() -> None:
        answers["generate"] = []
        for batch, budgets in batches:
            width = batch.input_ids.shape[1]
            with torch.no_grad():
                output = model.generate(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    do_sample=False,
                    max_new_tokens=int(budgets.max()),
                    pad_token_id=0,
                    stopping_criteria=StoppingCriteriaList([Ends(width, budgets)]),
                )
            rows = zip(output[:, width:].tolist(), budgets.tolist(), strict=True)
            answers["generate"] += [row[:length] for row, length in rows]

    seconds = best_seconds({"generate": generate, "loop": loop}, device, num_turns=num_turns)
    pairs = list(zip(answers["generate"], answers["loop"], strict=True))
    num_tokens = sum(lengths)
    return {
        "lengths": "spread" if spread else "equal",
        "prefix": PREFIX_LENGTH if shared else 0,
        "num_tokens": num_tokens,
        "tokens_per_second": {name: num_tokens / value for name, value in seconds.items()},
        "ratio": seconds["generate"] / seconds["loop"],
        "equal_answers": sum(one == other for one, other in pairs) / len(pairs),
    }


def compare_on_the_quickstart(micro_batch_size: int) -> Row:
    """Measure an iteration of the quickstart, with the loop and with ``generate`` in its place."""
    from shardes.config.loading import load_config
    from shardes.es.strategy import Strategy
    from shardes.rollout.build import make_evaluator, make_scheduler
    from shardes.rollout.engines.transformers.decoder import Completions, Decoder
    from shardes.rollout.iteration import IterationSpec
    from shardes.session import open_session
    from shardes.tasks.loading import load_task

    overrides = [
        "parallel.backend=single",
        "run.dir=unused",
        f"rollout.micro_batch_size={micro_batch_size}",
    ]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    rewards: dict[str, list[Any]] = {}

    def generated(self: Decoder, model: Any, batch: Any, **_: Any) -> Completions:
        with torch.no_grad():
            output = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                do_sample=False,
                max_new_tokens=self._max_new_tokens,
            )
        answers = [self._cut(row) for row in output[:, batch.input_ids.shape[1] :].tolist()]
        return Completions(answers, [True] * len(answers))

    with open_session(config) as session:
        task = load_task(config.task)
        rollout, *_ = make_evaluator(session, task)
        population = make_scheduler(session, rollout)
        spec = IterationSpec(
            0, task.train[: config.task.batch_size], rollout, Strategy(config.es, num_elements=0)
        )

        def iteration(name: str) -> None:
            found = population.evaluate_members(spec.members, spec=spec, on_result=lambda _: None)
            rewards[name] = [result.reward for _, result in sorted(found.items())]

        def generate() -> None:
            with mock.patch.object(Decoder, "decode", generated):
                iteration("generate")

        seconds = best_seconds(
            {"generate": generate, "loop": lambda: iteration("loop")}, torch.device("cpu"), num_turns=5
        )
    pairs = list(zip(rewards["generate"], rewards["loop"], strict=True))
    return {
        "quickstart": True,
        "micro_batch_size": micro_batch_size,
        "seconds_per_iteration": seconds,
        "ratio": seconds["generate"] / seconds["loop"],
        "equal_rewards": sum(one == other for one, other in pairs) / len(pairs),
    }


def compare_iterations(path: Path, overrides: list[str], *, num_turns: int, threads: int) -> Row:
    """Measure iterations of a run, generating alone, and matrix products alone; the sides take turns."""
    from shardes.config.loading import load_config
    from shardes.rollout.batching import MicroBatch
    from shardes.runs.reporting import Callbacks
    from shardes.session import open_session
    from shardes.tasks.loading import load_task
    from shardes.trainer import make_training_loop

    seconds = dict.fromkeys(("iteration", "generate", "linear", "attention"), math.inf)
    facts: Row = {}
    with tempfile.TemporaryDirectory(prefix="shardes-bench-") as folder:
        # No update moves the weights by more than rounding, so all members can be loaded again after it.
        keys = [f"run.dir={folder}/run", f"es.iterations={num_turns + 1}", "es.alpha=1e-30", "eval.every=0"]
        keys += ["parallel.backend=single", f"parallel.threads_per_rank={threads}", "task.reward_workers=0"]
        keys += ["log.instruments_every=0"]
        config = load_config(path, [*keys, *overrides])
        with open_session(config) as session:
            begun = 0.0

            def take_turns(line: dict[str, Any]) -> None:
                nonlocal begun
                elapsed, iteration = time.process_time() - begun, line["iteration"]
                if iteration == config.es.iterations:
                    return
                if iteration > 0:  # the first warms up
                    seconds["iteration"] = min(seconds["iteration"], elapsed)
                evaluator = loop._rollout.evaluator
                engine, spec = evaluator.engine, loop._rollout.spec(iteration)
                prompts = spec.prompts
                batches = [batch for batch in prompts.micro_batches if isinstance(batch, MicroBatch)]
                engine.begin(0)
                took, products, num_tokens = 0.0, Products(), 0
                for member in spec.members:
                    engine.load([spec.perturbation(member)])
                    start = time.process_time()
                    answers = [engine.generate(batch, prompts=prompts) for batch in batches]
                    took += time.process_time() - start
                    num_tokens += sum(len(row) for answer in answers for row in answer.tokens)
                    engine.load([spec.perturbation(member)])
                    with products:
                        for batch in batches:
                            engine.generate(batch, prompts=prompts)
                assert num_tokens == line["num_tokens"], "both sides have the same answers"
                seconds["generate"] = min(seconds["generate"], took)
                for name in ("linear", "attention"):
                    start = time.process_time()
                    getattr(products, f"compute_{name}")()
                    seconds[name] = min(seconds[name], time.process_time() - start)
                facts.update(num_tokens=num_tokens, flops=products.flops, parameters=sum_of(session))
                begun = time.process_time()

            def sum_of(session: Any) -> int:
                return sum(shard.num_elements for shard in session.backend.shards)

            task = load_task(config.task)
            loop = make_training_loop(session, task, callbacks=Callbacks(on_iteration=[take_turns]))
            loop.train()
    products = seconds["linear"] + seconds["attention"]
    return facts | {
        "dtype": config.model.dtype,
        "population": config.es.population,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seconds": seconds,
        "iteration_to_generate": seconds["iteration"] / seconds["generate"],
        "generate_to_products": seconds["generate"] / products,
        "iteration_to_products": seconds["iteration"] / products,
        "generate_to_linear": seconds["generate"] / seconds["linear"],
    }


@click.command()
@click.option("--config", "config_path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--layers", type=click.IntRange(min=1), default=14, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--prompts", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--micro-batch", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=4), default=128, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=2, show_default=True, help="Of which the best.")
@click.option("--quickstart/--no-quickstart", default=True, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def main(
    *,
    config_path: Path | None,
    overrides: tuple[str, ...],
    layers: int,
    dtype: str,
    device: str,
    prompts: int,
    micro_batch: int,
    new_tokens: int,
    threads: int,
    turns: int,
    quickstart: bool,
    json_path: Path | None,
) -> None:
    """Measure the decode loop against transformers' generate."""
    torch.set_num_threads(threads)
    if config_path is not None:
        row = compare_iterations(config_path, list(overrides), num_turns=turns, threads=threads)
        facts = {"threads": threads, "turns": turns, **machine_facts("cpu")}
        show(facts | row)
        write_report(json_path, facts=facts, rows=[row])
        return
    model = random_model(layers=layers, dtype=getattr(torch, dtype)).to(device).eval()
    facts = {
        "parameters": num_parameters(model),
        "dtype": dtype,
        "prompts": prompts,
        "micro_batch_size": micro_batch,
        "max_new_tokens": new_tokens,
        "threads": threads,
        **machine_facts(device),
    }
    show(facts)
    click.echo("\nlengths  prefix | generate tok/s   loop tok/s   ratio | equal answers")
    rows: list[Row] = []
    for spread in (True, False):
        for shared in (False, True):
            row = compare(
                model,
                num_prompts=prompts,
                longest=new_tokens,
                micro_batch_size=micro_batch,
                spread=spread,
                shared=shared,
                num_turns=turns,
            )
            rows.append(row)
            speed = row["tokens_per_second"]
            click.echo(
                f"{row['lengths']:<7}  {row['prefix']:>6} | {speed['generate']:>14.1f} {speed['loop']:>12.1f}"
                f" {row['ratio']:>7.2f} | {row['equal_answers']:>13.3f}"
            )
    if quickstart and device == "cpu":
        click.echo(
            "\nquickstart, micro-batch | generate s/iteration   loop s/iteration   ratio | equal rewards"
        )
        for size in (32, 64):
            row = compare_on_the_quickstart(size)
            rows.append(row)
            seconds = row["seconds_per_iteration"]
            click.echo(
                f"{size:>23} | {seconds['generate']:>20.2f} {seconds['loop']:>18.2f} {row['ratio']:>7.2f}"
                f" | {row['equal_rewards']:>13.3f}"
            )
    write_report(json_path, facts=facts, rows=rows)


if __name__ == "__main__":
    main()
