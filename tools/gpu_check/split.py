"""Tensor parallelism with a 7B model of random weights: a token with graphs on and off."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from gpu_check import members, random_model
from gpu_check.decode import choose_model
from gpu_check.devices import device_of_check
from gpu_check.part import Context
from gpu_check.ranks import run_job
from gpu_check.training import without_graphs


def run(context: Context) -> None:
    """Measure on all ranks, or as many as the model's 4 heads of keys and values can be split over."""
    heads = 2 if context.is_rehearsal else 4
    num_ranks = next(size for size in (4, 2) if size <= context.num_ranks and heads % size == 0)
    run_job(context, "split", None, num_ranks=num_ranks, seconds=170)


@contextlib.contextmanager
def decoding(*, most_tokens: int | None = None) -> Iterator[dict[str, Any]]:
    """Have the decode loop stop after so many tokens; give the answers of the last batch.

    Gives:
        ``tokens``: answers; ``is_captured``: True if graphs were used.
    """
    from shardes.rollout.engines.transformers.decoder import Decoder

    decode = Decoder.decode
    seen: dict[str, Any] = {}

    def wrapper(self: Any, *arguments: Any, **named: Any) -> Any:
        found = decode(self, *arguments, **(named | {"most_tokens": most_tokens}))
        graphs = self._graphs
        seen.update(tokens=found.tokens, is_captured=graphs is not None and graphs.is_usable)
        return found

    with mock.patch.object(Decoder, "decode", wrapper):
        yield seen


def measure(context: Context, _: Any) -> None:
    """Measure on each rank."""
    name = choose_model(device_of_check())
    is_tiny = name == "tiny"
    work = members.Work(6, 20, 8) if is_tiny else members.Work(200, 150, 128)
    lengths = (2, 6) if is_tiny else (16, 80)
    folder = context.out.parent / f"split-{context.out.suffix.strip('.')}"
    folder.mkdir(exist_ok=True)
    model_dir = random_model.write_config(folder, name)
    random_model.write_prompts(folder, num_prompts=work.num_rows, num_tokens=work.prompt_tokens)
    tree = random_model.tree_of(
        folder,
        model_dir,
        parallel__backend="tensor_parallel",
        rollout__max_new_tokens=work.new_tokens,
        rollout__micro_batch_size=work.num_rows,
    )
    with random_model.open_random_session(tree) as session:
        is_main = session.mesh.world.is_main
        population = members.Members(session, work)
        population.measure(context)
        answers = []
        for kind in ("captured", "eager"):
            with without_graphs() if kind == "eager" else contextlib.nullcontext():
                population.evaluator.engine.release()
                seconds = []
                for most in lengths:
                    with decoding(most_tokens=most) as seen:
                        # The same member each time, so that its answers can be compared.
                        seconds.append(min(population.evaluate(2)["member"] for _ in range(3)))
                answers.append(seen["tokens"])
            token = (seconds[1] - seconds[0]) / (lengths[1] - lengths[0])
            if is_main:
                name_of = "token" if kind == "captured" else "eager_token"
                context.record(**{f"{name_of}_seconds": token, f"{kind}_has_graphs": seen["is_captured"]})
        if is_main:
            context.record(model=name, num_ranks=session.mesh.world.world_size)
            equal = sum(one == other for one, other in zip(*answers, strict=True))
            context.record(graphs_equal_answers_share=equal / len(answers[0]))
            context.check("graphs on and off give the same tokens", equal == len(answers[0]))
