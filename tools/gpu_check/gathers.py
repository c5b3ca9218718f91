"""A 7B model of random weights over all ranks: a member by phase for every gather, and the memory."""

import torch

from gpu_check import members, random_model
from gpu_check.decode import choose_model
from gpu_check.devices import device_of_check
from gpu_check.part import Context, is_installed
from gpu_check.ranks import run_job

GATHERS = ("iteration", "member", "layer")


def run(context: Context) -> None:
    """Measure each backend in a job of its own."""
    for backend in ("fsdp",) if context.is_rehearsal else ("fsdp", "zero3"):
        if backend == "zero3" and not is_installed("deepspeed"):
            context.skip(backend, "not installed: deepspeed")
            continue
        with context.section(backend):
            run_job(context, "gathers", backend, num_ranks=context.num_ranks, seconds=110)


def measure(context: Context, backend: str) -> None:
    """Measure on each rank."""
    name = choose_model(device_of_check())
    is_tiny = name == "tiny"
    work = members.Work(6, 20, 4) if is_tiny else members.Work(200, 150, 32)
    folder = context.folder / f"{backend}-{context.out.suffix.strip('.')}"
    folder.mkdir(exist_ok=True)
    model_dir = random_model.write_config(folder, name)
    random_model.write_prompts(folder, num_prompts=work.num_rows, num_tokens=work.prompt_tokens)
    for gather in GATHERS[:2] if is_tiny else GATHERS:
        # Ranks that share a member's prompts have a micro-batch each.
        rows = work.num_rows if gather == "iteration" else -(-work.num_rows // context.num_ranks)
        tree = random_model.tree_of(
            folder,
            model_dir,
            parallel__backend=backend,
            rollout__gather=gather,
            rollout__max_new_tokens=work.new_tokens,
            rollout__micro_batch_size=rows,
        )
        with random_model.open_random_session(tree) as session:
            population = members.Members(session, work)
            population.measure(context, prefix=f"{backend}_{gather}_")
            if session.mesh.world.is_main:
                context.record(model=name)
            del population, session
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
