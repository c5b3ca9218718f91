"""The sources of a plan: the architecture, the headers of the weights, and the data if it is there."""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from shardes.config.schema import Config, ModelConfig
from shardes.config.task import is_hub_reference, is_range
from shardes.errors import UserError
from shardes.models.build import parameter_aliases, skeleton_of
from shardes.models.checkpoint import Checkpoint
from shardes.models.conversion import Conversion
from shardes.models.files import has_weights
from shardes.models.hub import has_all_weights
from shardes.planning.hub_model import headers_from_hub, without_weights
from shardes.planning.machine import Machine
from shardes.planning.plan import Plan
from shardes.planning.rates import used_bytes
from shardes.planning.workload import make_workload
from shardes.rollout.preparing import make_encoder
from shardes.runs.journal import recorded_commit
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
    if model_config is None and config.model.hub_id is not None:
        model = without_weights(config.model, recorded=recorded_commit(config.run.dir, config.model.hub_id))
        config = config.model_copy(update={"model": model})
    path = config.model.directory
    if model_config is None and not (path / "config.json").is_file():
        raise UserError(
            f"model.path: {path / 'config.json'} does not exist; for a plan that file is enough. Give a "
            "model directory, the name of a model on the hub (ORGANISATION/MODEL), or a config.json with "
            "--model-config"
        )
    model = skeleton_of(config, source=model_config)
    files = "not looked at" if model_config is not None else check_files(config.model, model)
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
    if machine.process_bytes:  # with the tokenizer, which runs load, too
        machine = replace(machine, process_bytes=used_bytes())
    plan = Plan(config, model, workload=workload, machine=machine, world_size=world_size)
    if config.rollout.micro_batch_size == "auto":
        plan = plan.with_rows_found()
    return plan, files


def check_files(model: ModelConfig, skeleton: PreTrainedModel) -> str:
    """Check the headers of a model's weights, if there are any, and describe the files.

    Those of the hub may still be there.

    Raises:
        UserError: The headers are damaged, or belong to another model.
    """
    directory = model.directory
    checkpoint, where = None, ""
    if model.hub_id is not None and not has_all_weights(directory):
        checkpoint, where = headers_from_hub(directory), ", on the hub"
    elif has_weights(directory):
        checkpoint = Checkpoint(directory)
    if checkpoint is None:
        return "no weights there yet: planned from config.json alone"
    files = {stored.path for found in checkpoint.tensors.values() for stored, *_ in found.find(0, 1)}
    num_bytes = checkpoint.num_bytes
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    Conversion(skeleton).apply(checkpoint, shapes=shapes)
    checkpoint.check_matches(shapes, aliases=parameter_aliases(skeleton))
    return f"{len(files)} with {shown_bytes(num_bytes)}{where}; all parameters are there, in the right shapes"
