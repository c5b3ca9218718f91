"""Measure engines: vLLM with members written into its weights, the decode loop, and both without shardes.

    python tools/bench/engines.py --json benchmarks/engines-cpu.json

All sides answer the same prompts with the same Llama of random parameters, each in a process of its own:

- vllm: the engine vllm over the backend vllm, another member before each turn
- plain vllm: vllm.LLM as it comes, with the same memory of keys and values, never perturbed
- unpacked vllm: the same without packed weights, as shardes has it on CPUs (no other than plain on GPUs)
- transformers: the engine transformers over the backend single, another member before each turn
- generate: transformers' generate on the same model, never perturbed

Answers never end by themselves: where each ends is drawn beforehand ("spread": geometric, with a mean of a
third of the longest) or is the longest ("equal"). Half of the sets have prompts that begin with the same 48
tokens. Seconds are the best of some turns: of the process on CPUs, so that others do not count, of the clock
on GPUs. Start-up is everything until the first member could be loaded, imports included.
"""

import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_BEGIN = time.perf_counter()

import click  # noqa: E402
import torch  # noqa: E402
from common import CONSTANT, Row, machine_facts, run_job, show, write_model, write_report  # noqa: E402
from rollout import PREFIX_LENGTH, answer_lengths, random_prompts  # noqa: E402

from shardes.utils.device import synchronize  # noqa: E402

SIDES = ("vllm", "plain vllm", "unpacked vllm", "transformers", "generate")
SIGMA = 0.001
# Of the Llama: the sizes of tools/bench/common.py, and of layers as in models of that many parameters.
MODELS: dict[str, dict[str, int]] = {
    "small": {},
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 32768,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 32768,
    },
}


@dataclass
class Stopwatch:
    """Measures seconds: of this process on CPUs, of the clock on GPUs."""

    device: torch.device

    def now(self) -> float:
        """Return the time, once the device has done all its work."""
        synchronize(self.device)
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()

    def best(self, run: Callable[[int], object], *, turns: int, wanted: object = None) -> float:
        """Return the least seconds of some turns, which are given their number and return ``wanted``."""
        least = math.inf
        for turn in range(turns):
            start = self.now()
            found = run(turn)
            least = min(least, self.now() - start)
            assert found == wanted, f"a turn returned {found}; wanted: {wanted}"
        return least


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and how many tokens each is answered with.

    Attributes:
        lengths: "spread" or "equal".
        prefix: Number of tokens with which all prompts begin.
        prompts: Token ids of each.
        budgets: Number of tokens of each answer.
    """

    lengths: str
    prefix: int
    prompts: list[list[int]]
    budgets: list[int]

    @property
    def name(self) -> str:
        """Return what the set is called among the figures."""
        return f"{self.lengths} {self.prefix}"

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all answers."""
        return sum(self.budgets)

    def batches(self, micro_batch_size: int, device: torch.device) -> list[Any]:
        """Cut the prompts into micro-batches of shardes."""
        from shardes.rollout.batching import compose

        longest = max(self.budgets)
        cut = compose(self.prompts, micro_batch_size=micro_batch_size, pad_id=0, max_new_tokens=longest)
        batches = []
        for batch in cut:
            budgets = torch.tensor([self.budgets[row] for row in batch.rows])
            batches.append(replace(batch, budgets=budgets).to(device))
        return batches


def prompt_sets(num_prompts: int, *, longest: int) -> list[PromptSet]:
    """Return all sets of prompts."""
    return [
        PromptSet(
            "spread" if spread else "equal",
            prefix,
            random_prompts(num_prompts, prefix_length=prefix),
            answer_lengths(num_prompts, longest=longest, spread=spread),
        )
        for spread in (True, False)
        for prefix in (0, PREFIX_LENGTH)
    ]


def measure_engine(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure an engine of shardes, another member before each turn."""
    from shardes.config.loading import parse_config
    from shardes.es.update import Perturbation
    from shardes.rollout.batching import shared_prefix
    from shardes.rollout.build import make_evaluator
    from shardes.rollout.prompts import PromptBatch
    from shardes.session import open_session
    from shardes.tasks.loading import load_task

    config = parse_config(spec["tree"], source=Path(__file__).name)
    found: dict[str, Any] = {}
    with open_session(config) as session:
        device = session.mesh.world.device
        watch = Stopwatch(device)
        evaluator, *_ = make_evaluator(session, load_task(config.task))
        engine, size = evaluator.engine, config.rollout.micro_batch_size
        assert isinstance(size, int), "the tree has a number"
        found["start"] = seconds_since_begin(device)
        # Kernels are compiled when they are first called.
        session.weights.perturb(Perturbation(0, 0, SIGMA))
        perturb = session.weights.perturb
        found["perturb"] = watch.best(lambda turn: perturb(Perturbation(turn, 0, SIGMA)), turns=5)
        found["centre"] = watch.best(lambda _: session.weights.centre(), turns=5)
        if config.rollout.engine == "vllm":
            found["forget"] = watch.best(lambda _: engine._requests.forget(), turns=5)  # type: ignore[attr-defined]
        for chosen in prompt_sets(spec["prompts"], longest=spec["new_tokens"]):
            batches = chosen.batches(size, device)
            prefix = shared_prefix(chosen.prompts)
            prompts = PromptBatch(
                rows=[],
                prompts=[],
                scorer=None,  # type: ignore[arg-type]
                samples_per_prompt=1,
                micro_batches=batches,
                prefix=torch.tensor([prefix], device=device) if prefix else None,
            )
            evaluator.begin(prompts)

            def answer(turn: int, batches: list[Any] = batches, prompts: PromptBatch = prompts) -> int:
                engine.load([Perturbation(turn, 0, SIGMA)])
                engine.expect(batches)
                answers = [engine.generate(batch, prompts=prompts) for batch in batches]
                return sum(len(row) for completions in answers for row in completions.tokens)

            found[chosen.name] = watch.best(answer, turns=spec["turns"], wanted=chosen.num_tokens)
        return found | memory(device)


def measure_plain_vllm(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure ``vllm.LLM`` as it comes, which is never perturbed."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    if spec["side"] == "unpacked vllm":
        from shardes.backends.vllm.cpu import keep_weights_unpacked

        keep_weights_unpacked()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, gib = spec["tree"]["model"], spec["tree"]["rollout"].get("kv_cache_gib")
    arguments = {} if gib is None else {"kv_cache_memory_bytes": int(gib * 2**30)}
    llm = LLM(
        model=model["path"],
        dtype=model["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=device.type == "cpu",
        **arguments,
    )
    torch.set_num_threads(spec["tree"]["parallel"]["threads_per_rank"])
    watch = Stopwatch(device)
    found: dict[str, Any] = {"start": seconds_since_begin(device)}
    for chosen in prompt_sets(spec["prompts"], longest=spec["new_tokens"]):
        parameters = [
            SamplingParams(temperature=0.0, max_tokens=budget, ignore_eos=True, detokenize=False)
            for budget in chosen.budgets
        ]
        prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in chosen.prompts]

        def answer(_: int, prompts: list[Any] = prompts, parameters: list[Any] = parameters) -> int:
            llm.reset_prefix_cache()
            answers = llm.generate(prompts, parameters, use_tqdm=False)
            return sum(len(one.outputs[0].token_ids) for one in answers)

        found[chosen.name] = watch.best(answer, turns=spec["turns"], wanted=chosen.num_tokens)
    return found | memory(device)


def measure_generate(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure transformers' ``generate``, which is never perturbed."""
    from transformers import AutoModelForCausalLM
    from transformers.generation import StoppingCriteria, StoppingCriteriaList

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = spec["tree"]["model"]
    torch.set_num_threads(spec["tree"]["parallel"]["threads_per_rank"])
    model = AutoModelForCausalLM.from_pretrained(settings["path"], dtype=settings["dtype"]).to(device).eval()
    watch = Stopwatch(device)
    found: dict[str, Any] = {"start": seconds_since_begin(device)}

    class Ends(StoppingCriteria):
        def __init__(self, width: int, budgets: torch.Tensor) -> None:
            self._ends = width + budgets

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return self._ends <= input_ids.shape[1]

    for chosen in prompt_sets(spec["prompts"], longest=spec["new_tokens"]):
        batches = chosen.batches(spec["tree"]["rollout"]["micro_batch_size"], device)

        def answer(_: int, batches: list[Any] = batches) -> None:
            for batch in batches:
                with torch.no_grad():
                    model.generate(
                        input_ids=batch.input_ids,
                        attention_mask=batch.attention_mask,
                        do_sample=False,
                        max_new_tokens=int(batch.budgets.max()),
                        pad_token_id=0,
                        stopping_criteria=StoppingCriteriaList(
                            [Ends(batch.input_ids.shape[1], batch.budgets)]
                        ),
                    )

        found[chosen.name] = watch.best(answer, turns=spec["turns"])
    return found | memory(device)


def seconds_since_begin(device: torch.device) -> float:
    """Return the seconds since this process began."""
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter() - _BEGIN


def memory(device: torch.device) -> dict[str, int]:
    """Return the most bytes that this process has held, or on a GPU what is taken of it now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"memory_bytes": total - free}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


MEASURES = dict.fromkeys(("plain vllm", "unpacked vllm"), measure_plain_vllm)
MEASURES["generate"] = measure_generate


def run_side(spec_path: Path, out: Path) -> None:
    """Measure the side that a job was told, and end the process."""
    spec = json.loads(spec_path.read_text())
    found = MEASURES.get(spec["side"], measure_engine)(spec)
    with suppress(ImportError):
        import vllm

        found["vllm"] = vllm.__version__
    import transformers

    out.write_text(json.dumps(found | {"transformers": transformers.__version__}))
    sys.stdout.flush()
    os._exit(0)  # as shardes.cli.main does, and for the same reason


def tree_of(folder: Path, side: str, *, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a side."""
    is_vllm = "vllm" in side
    rollout = {key: facts[key] for key in ("micro_batch_size", "max_new_tokens")}
    return {
        "model": {"path": str(folder / "model"), "dtype": facts["dtype"]},
        "run": {"dir": str(folder / "run")},
        "parallel": {"backend": "vllm" if is_vllm else "single", "threads_per_rank": facts["threads"]},
        "rollout": rollout | ({"kv_cache_gib": facts["kv_cache_gib"]} if is_vllm else {}),
        "es": {"iterations": 1, "population": 2, "sigma": SIGMA},
        "task": {"data": str(folder / "problems.jsonl"), "reward": CONSTANT},
    }


def report(found: dict[str, Row], sets: Sequence[PromptSet]) -> list[Row]:
    """Print the figures, and return them as rows."""
    click.echo("\nside           start s  perturb s  centre s  forget ms    MB")
    rows: list[Row] = []
    for side, row in found.items():
        if "failure" in row:
            click.echo(f"{side:<13} {row['failure']}")
            rows.append({"side": side, **row})
            continue
        parts = [f"{row[name]:>9.3f}" if name in row else " " * 9 for name in ("perturb", "centre")]
        forget = f"{row['forget'] * 1e3:>9.3f}" if "forget" in row else " " * 9
        memory_mb = row["memory_bytes"] / 1e6
        click.echo(f"{side:<13} {row['start']:>8.1f}  {parts[0]} {parts[1]}  {forget} {memory_mb:>6.0f}")
        rows.append({"side": side, **row})
    measured = {side: row for side, row in found.items() if "failure" not in row}
    click.echo("\nlengths  prefix | tokens a second: " + "  ".join(f"{side:>13}" for side in measured))
    for chosen in sets:
        speeds = {side: chosen.num_tokens / row[chosen.name] for side, row in measured.items()}
        shown = "  ".join(f"{speed:>13.1f}" for speed in speeds.values())
        click.echo(f"{chosen.lengths:<7}  {chosen.prefix:>6} |                  {shown}")
        place = {"lengths": chosen.lengths, "prefix": chosen.prefix, "num_tokens": chosen.num_tokens}
        rows.append(place | {"tokens_per_second": speeds})
    return rows


@click.command(help=__doc__)
@click.option("--side", "sides", type=click.Choice(SIDES), multiple=True, default=SIDES)
@click.option("--model", type=click.Choice(list(MODELS)), default="small", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--prompts", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--micro-batch", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=4), default=32, show_default=True)
@click.option("--kv-cache-gib", type=click.FloatRange(min=0.01), default=1.0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=2, show_default=True, help="Of which the best.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--job", type=click.Path(path_type=Path), nargs=2, hidden=True)
def main(
    *,
    sides: tuple[str, ...],
    model: str,
    layers: int,
    dtype: str,
    prompts: int,
    micro_batch: int,
    new_tokens: int,
    kv_cache_gib: float,
    threads: int,
    turns: int,
    json_path: Path | None,
    job: tuple[Path, Path] | None,
) -> None:
    if job is not None:
        run_side(*job)
    with tempfile.TemporaryDirectory(prefix="shardes-bench-") as name:
        folder = Path(name)
        num_parameters = write_model(folder / "model", layers=layers, eos_id=None, **MODELS[model])
        (folder / "problems.jsonl").write_text('{"prompt": "1+1"}\n')
        facts = {
            "parameters": num_parameters,
            "dtype": dtype,
            "prompts": prompts,
            "micro_batch_size": micro_batch,
            "max_new_tokens": new_tokens,
            "kv_cache_gib": kv_cache_gib,
            "threads": threads,
            **machine_facts("cuda" if torch.cuda.is_available() else "cpu"),
        }
        show(facts)
        found: dict[str, Row] = {}
        for side in sides:
            if side == "unpacked vllm" and torch.cuda.is_available():
                continue
            tree = tree_of(folder, side, facts=facts)
            spec = {"side": side, "tree": tree, "prompts": prompts, "new_tokens": new_tokens, "turns": turns}
            row = run_job(__file__, spec, world_size=0, folder=folder)
            found[side] = {"failure": row} if isinstance(row, str) else row
        rows = report(found, prompt_sets(prompts, longest=new_tokens))
    for name in ("vllm", "transformers"):
        versions = {row[name] for row in found.values() if name in row}
        facts[f"{name}_version"] = ", ".join(sorted(versions))
    write_report(json_path, facts=facts, rows=rows)


if __name__ == "__main__":
    main()
