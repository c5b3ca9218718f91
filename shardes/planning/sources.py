"""The sources of a plan: the architecture, the headers of the weights, and the data if it is there."""

from pathlib import Path

from transformers import PreTrainedModel

from shardes.config.schema import Config
from shardes.config.task import is_hub_reference, is_range
from shardes.errors import UserError
from shardes.models.build import parameter_aliases, skeleton_of
from shardes.models.checkpoint import Checkpoint
from shardes.models.conversion import Conversion
from shardes.models.files import has_weights
from shardes.planning.machine import Machine
from shardes.planning.plan import Plan
from shardes.planning.workload import make_workload
from shardes.rollout.preparing import make_encoder
from shardes.tasks.loading import load_task
from shardes.utils.units import shown_bytes


def plan_run(
    config: Config,
    *,
    machine: Machine,
    world_size: int | None = None,
    model_config: Path | None = None,
    num_prompts: int | None = None,
    prompt_tokens: int | None = None,
) -> tuple[Plan, str]:
    """Plan a run from its files, of which only ``config.json`` must be there; no weights are read.

    Args:
        config: Configuration of the run.
        machine: Device of each rank.
        world_size: Number of ranks; None for the fewest that hold one replica.
        model_config: ``config.json``, or its directory, to be used instead of that of ``model.path``.
        num_prompts: Prompts of an iteration; None to take them from the configuration and the data.
        prompt_tokens: Tokens of the longest prompt; None to measure them in the data.

    Returns:
        The plan, and what is known of the files, in words.

    Raises:
        UserError: A file that is there cannot be used, or the ranks cannot hold the model.
    """
    config = config.on_device(machine.device_type)
    path = config.model.path
    if model_config is None and not (path / "config.json").is_file():
        raise UserError(
            f"model.path: {path / 'config.json'} does not exist; for a plan that file is enough (hf download "
            "ORGANISATION/MODEL config.json --local-dir DIRECTORY), or give another with --model-config"
        )
    model = skeleton_of(config, source=model_config)
    files = "not looked at" if model_config is not None else check_files(path, model)
    is_there = model_config is None and any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    encoder = make_encoder(config) if is_there else None
    data = config.task.data
    is_known = is_range(data) or (not is_hub_reference(data) and data.exists())
    task = load_task(config.task) if is_known else None
    workload = make_workload(
        config, task=task, encoder=encoder, num_prompts=num_prompts, prompt_tokens=prompt_tokens
    )
    plan = Plan(config, model, workload=workload, machine=machine, world_size=world_size)
    if config.rollout.micro_batch_size == "auto":
        plan = plan.with_rows_found()
    return plan, files


def check_files(path: Path, model: PreTrainedModel) -> str:
    """Check the headers of the weights in a model directory, if there are any, and describe the files.

    Raises:
        UserError: The headers are damaged, or belong to another model.
    """
    if not has_weights(path):
        return "no weights there yet: planned from config.json alone"
    checkpoint = Checkpoint(path)
    files = {stored.path for found in checkpoint.tensors.values() for stored, *_ in found.find(0, 1)}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    Conversion(model).apply(checkpoint, shapes=shapes)
    checkpoint.check_matches(shapes, aliases=parameter_aliases(model))
    total = shown_bytes(sum(file.stat().st_size for file in files))
    return f"{len(files)} with {total}; all parameters are there, in the right shapes"
