"""A plan as a page to read."""

from collections.abc import Sequence

from shardes.planning.plan import Plan
from shardes.utils.units import shown_bytes, shown_count, shown_seconds

_GATHER_NOTES = {
    "iteration": "the centre and a copy of the model",
    "member": "a copy of the model",
    "layer": "what a forward has gathered",
}


def report(plan: Plan, *, files: str) -> list[str]:
    """Return the page of a plan, by line.

    Args:
        plan: Plan to show.
        files: What is known of the model's files, in words.
    """
    return [*_head(plan, files), "", *_memory(plan), "", *_gathers(plan), "", _conclusion(plan)]


def _head(plan: Plan, files: str) -> list[str]:
    config, load, machine = plan.config, plan.workload, plan.machine
    total, trained = plan.num_parameters, plan.num_trained
    model = f"{type(plan.model).__name__}, {shown_count(total)} parameters"
    model += "" if trained == total else f", {shown_count(trained)} of them trained"
    model += f", {shown_bytes(total * plan.dtype.itemsize)} in {config.model.dtype}"
    ranks = f"{plan.world_size} with {config.parallel.backend}, {plan.num_replicas} replica(s) of "
    ranks += f"{plan.shard_size}; {shown_bytes(machine.memory_bytes)} each, "
    ranks += f"{shown_bytes(machine.reserved_bytes)} of it reserved"
    asks = f"{load.num_sequences} answers of up to {load.answer_tokens} tokens"
    if load.answer_tokens == 0:
        asks = f"{load.num_sequences} likelihoods"
    asks = f"{load.num_members} members, each {asks}; prompts of up to {load.prompt_tokens} tokens"
    rates = [
        f"{machine.gather_bytes_per_second / 1e9:.3g} GB/s between ranks",
        f"{machine.memory_bytes_per_second / 1e9:.4g} GB/s to the device's memory",
        f"{machine.flops_per_second / 1e12:.3g} TFLOP/s",
        f"noise {machine.noise_elements_per_second / 1e9:.3g} billion/s",
    ]
    lines = {
        "model": model,
        "files": files,
        "ranks": ranks,
        "iteration": f"{asks}; {load.micro_batch_rows} in a forward",
        "rates": ", ".join(rates),
        "assumed": "; ".join([*load.assumed, "the rates"]),
    }
    return [f"{name:<11}{text}" for name, text in lines.items()]


def _memory(plan: Plan) -> list[str]:
    memory, config = plan.memory, plan.config
    place = ", in host memory" if memory.is_on_host else ""
    lines = [
        ("working weights", memory.working, config.model.dtype),
        ("master weights", memory.master, config.weights.master + place),
        (f"states of {config.es.optimizer}", memory.optimizer, "float32" + place),
        ("pinned host memory", memory.pinned, "for master weights and states, in blocks of powers of two"),
        ("transfer buffers", memory.passing, "on the way from and to host memory"),
        *((f"gather: {gather}", held, _GATHER_NOTES[gather]) for gather, held in memory.gathers.items()),
        ("interpreter and libraries", memory.process, "of each process"),
        ("kept of gathered layers", memory.fragments, "by the C library; only with gather: layer"),
        ("keys and values", memory.cache, "while answering"),
        ("activations and logits", memory.activations, "while answering"),
        ("buffers of an update", memory.update, "temporarily; not while answering"),
        ("buffers of a gather", memory.gather_buffers, "temporarily; not with gather: layer"),
    ]
    rows = [(f"  {name}", shown_bytes(held), f"  {note}") for name, held, note in lines if held]
    width = max(len(name) for name, *_ in rows)
    return ["on each rank", *(f"{name:<{width}}  {held:>11}{note}" for name, held, note in rows)]


def _gathers(plan: Plan) -> list[str]:
    rows = [("gather", "needs", "fits", "fewest ranks", "gathers", "received", "about")]
    for gather in plan.memory.gathers:
        cost, fewest = plan.cost(gather), plan.fewest_ranks(gather)
        rows.append(
            (
                gather,
                shown_bytes(plan.memory.needed(gather)),
                "yes" if plan.fits(gather) else "no",
                "none" if fewest is None else str(fewest),
                str(cost.num_gathers),
                shown_bytes(cost.received_bytes),
                shown_seconds(cost.seconds),
            )
        )
    return [
        *_table(rows),
        "Fewest ranks is the smallest number that holds one replica. Gathers of the whole model, bytes that",
        "a rank receives and time are those of an iteration in which all answers have the maximum length;",
        "rewards and waiting come on top.",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _conclusion(plan: Plan) -> str:
    wanted, found = plan.config.rollout.gather, plan.chosen_gather
    if found is not None:
        return f"rollout.gather: {wanted} " + ("fits" if found == wanted else f"comes to {found}")
    needs = min(plan.memory.needed(name) for name in plan.memory.gathers if wanted in ("auto", name))
    has = shown_bytes(plan.usable_bytes)
    return (
        f"DOES NOT FIT: rollout.gather: {wanted} needs {shown_bytes(needs)} of {has}. Less is needed with "
        "more ranks per replica, weights.master: model, weights.master_device: cpu, or a smaller "
        "rollout.micro_batch_size"
    )
