"""A 7B model of random weights on one GPU: a member, the memory, a token by part, graphs, and ``generate``.

The model is made on the device, from its sizes alone.
"""

import functools
from typing import Any

import torch

from gpu_check import members, random_model, tokens
from gpu_check.devices import copy_bytes_per_second, device_of_check, seconds_of
from gpu_check.part import Context
from gpu_check.training import without_graphs

# Device memory, in GiB, from which the model of a name is used: weights, a float32 master and the cache.
_FEWEST_GIB = {"7B": 70, "1.5B": 18}


class _Replayed:
    """Stands in for a CUDA graph in a rehearsal: a replay calls the function."""

    def __init__(self, function: Any) -> None:
        self.replay = function
        function()


def choose_model(device: torch.device) -> str:
    """Return the name of the largest model that the device has the memory for."""
    if device.type != "cuda":
        return "tiny"
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return next((name for name, fewest in _FEWEST_GIB.items() if gib >= fewest), "1.5B")


def run(context: Context) -> None:
    """Measure a member of the model, then what its time is made of."""
    device = device_of_check()
    name = choose_model(device)
    is_tiny = name == "tiny"
    work = members.Work(6, 20, 8) if is_tiny else members.Work(200, 150, 256)
    model_dir = random_model.write_config(context.folder, name)
    random_model.write_prompts(context.folder, num_prompts=work.num_rows, num_tokens=work.prompt_tokens)
    config = random_model.tree_of(
        context.folder,
        model_dir,
        rollout__max_new_tokens=work.new_tokens,
        rollout__micro_batch_size=work.num_rows,
    )
    context.record(
        model=name, rows=work.num_rows, prompt_tokens=work.prompt_tokens, new_tokens=work.new_tokens
    )
    with random_model.open_random_session(config) as session:
        model = session.backend.sharded_model
        with context.section("member"):
            population = members.Members(session, work)
            population.measure(context)
            population.evaluator.engine.release()
        positions = 40 if is_tiny else work.prompt_tokens + 1024
        with context.section("token"):
            _measure_token(context, model, work, num_positions=positions)
        with context.section("graphs"):
            _compare_graphs(context, model, work)
        with context.section("generate"):
            _compare_generate(context, model, work)


def _decoder(context: Context, max_new_tokens: int) -> Any:
    from shardes.rollout.engines.transformers.decoder import Decoder

    made = _Replayed if context.is_rehearsal else None
    return Decoder(eos_ids=[], pad_id=0, max_new_tokens=max_new_tokens, make_graph=made)


def _batch(model: Any, work: members.Work) -> Any:
    return tokens.make_batch(
        work.num_rows, work.prompt_tokens, vocab_size=model.config.vocab_size, device=model.device
    )


def _measure_token(context: Context, model: Any, work: members.Work, *, num_positions: int) -> None:
    """Measure a captured step over a cache of ``num_positions`` a row, and its share of the limit."""
    decoder, batch = _decoder(context, num_positions - work.prompt_tokens), _batch(model, work)
    lengths = tokens.Lengths(2, 6) if context.is_rehearsal else tokens.Lengths(16, 56)
    rate = copy_bytes_per_second(model.device)
    seconds = tokens.token_seconds(decoder, model, batch, lengths)
    weights, cache = tokens.step_bytes(model, num_rows=work.num_rows, num_positions=num_positions)
    limit = (weights + cache) / rate
    context.record(
        copy_bytes_per_second=rate,
        token_seconds=seconds,
        token_positions=num_positions,
        token_weights_bytes=weights,
        token_cache_bytes=cache,
        token_limit_seconds=limit,
        token_share_of_limit=limit / seconds,
    )
    parts = tokens.token_parts(decoder, model, batch, lengths)
    parts["idle"] = max(0.0, seconds - sum(parts.values()))
    context.record(**{f"token_{name}_seconds": value for name, value in parts.items()})
    context.check("the step was captured", decoder._graphs is not None and decoder._graphs.is_usable)
    decoder.release()


def _compare_graphs(context: Context, model: Any, work: members.Work) -> None:
    """Compare answers of captured steps with those of steps kernel by kernel."""
    batch, answers = _batch(model, work), []
    decoder = _decoder(context, work.new_tokens)

    def decode(most_tokens: int) -> None:
        decoder.begin(model)
        answers.append(decoder.decode(model, batch, most_tokens=most_tokens).tokens)

    decode(work.new_tokens)
    decoder.release()
    few = 4
    with without_graphs():
        decode(few)
        seconds = [seconds_of(functools.partial(decode, most), warm_ups=0) for most in (few, work.new_tokens)]
        decoder.release()
    context.record(eager_token_seconds=(seconds[1] - seconds[0]) / (work.new_tokens - few))
    answers = [answers[0], answers[-1]]
    equal = [one == other for one, other in zip(*answers, strict=True)]
    context.record(graphs_equal_answers_share=sum(equal) / len(equal))
    context.check(
        "graphs on and off give the same tokens", all(equal), detail=f"{sum(equal)} of {len(equal)}"
    )


def _compare_generate(context: Context, model: Any, work: members.Work) -> None:
    """Compare the loop with transformers' ``generate`` on the same batch."""
    batch = _batch(model, work)
    decoder = _decoder(context, work.new_tokens)
    answers: dict[str, Any] = {}

    def loop() -> None:
        decoder.begin(model)
        answers["loop"] = decoder.decode(model, batch).tokens

    def generate(new_tokens: int = work.new_tokens) -> None:
        with torch.no_grad():
            output = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        answers["generate"] = output[:, batch.input_ids.shape[1] :].tolist()

    num_tokens = work.num_rows * work.new_tokens
    seconds = seconds_of(loop)
    context.record(loop_seconds=seconds, loop_tokens_per_second=num_tokens / seconds)
    decoder.release()
    generate(4)
    other = seconds_of(generate, warm_ups=0)
    equal = [one == two for one, two in zip(answers["loop"], answers["generate"], strict=True)]
    context.record(
        generate_seconds=other,
        generate_tokens_per_second=num_tokens / other,
        times_generate=other / seconds,
        generate_equal_answers_share=sum(equal) / len(equal),
    )
