"""The command ``shardes plan``; nothing heavy is imported before the configuration is checked."""

from collections.abc import Callable
from pathlib import Path

import click

from shardes.config.consent import load_trusted
from shardes.errors import EXIT_FAILURE
from shardes.monitor.commands import TRUST
from shardes.planning.machine import Machine
from shardes.utils.sizes import Size

_PATH = click.Path(path_type=Path)
_POSITIVE = click.IntRange(min=1)


def _rate(name: str, default: float, help_text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option of a rate of the machine."""
    help_text += f" Default: {default:g}, on CPUs what is measured here."
    return click.option(name, type=click.FloatRange(min=0, min_open=True), help=help_text)


@click.command(context_settings={"ignore_unknown_options": True, "show_default": True})
@click.option("--config", "config_path", type=_PATH, required=True, help="The run's YAML file.")
@click.option(
    "--world-size", type=_POSITIVE, help="Number of ranks; default: the fewest that hold the model."
)
@click.option(
    "--device", type=click.Choice(["cuda", "cpu"]), default="cuda", help="Kind of each rank's device."
)
@click.option(
    "--device-memory",
    type=Size(),
    help="Of each rank's device. Default: 80GiB, on CPUs what is free here.",
)
@click.option(
    "--reserve",
    type=Size(),
    help="What of it is left to the driver and others. Default: 2GiB, on CPUs nothing.",
)
@click.option(
    "--model-config",
    type=click.Path(exists=True, path_type=Path),
    help="A config.json instead of that of model.path, which then need not exist.",
)
@click.option(
    "--num-prompts", type=_POSITIVE, help="Of an iteration; default: what configuration and data say."
)
@click.option("--prompt-tokens", type=_POSITIVE, help="Of the longest; default: what data and tokenizer say.")
@_rate("--gather-bandwidth", Machine.gather_bytes_per_second / 1e9, "GB/s that a rank receives in a gather.")
@_rate("--memory-bandwidth", Machine.memory_bytes_per_second / 1e9, "GB/s at which a device reads weights.")
@_rate("--compute", Machine.flops_per_second / 1e12, "TFLOP/s of matrix products in model.dtype.")
@TRUST
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, metavar="[KEY=VALUE]...")
def plan(
    config_path: Path,
    world_size: int | None,
    device: str,
    device_memory: int | None,
    reserve: int | None,
    model_config: Path | None,
    num_prompts: int | None,
    prompt_tokens: int | None,
    gather_bandwidth: float | None,
    memory_bandwidth: float | None,
    compute: float | None,
    is_trusted: bool,
    overrides: tuple[str, ...],
) -> None:
    """Print what a run would take: memory of a rank, gathers that fit, traffic, and about how long.

    Only the configuration, config.json and the headers of the weights are read, the latter if they are there.
    The exit status is 1 if it does not fit.
    """
    config = load_trusted(config_path, list(overrides), is_trusted=is_trusted)
    from shardes.planning.rates import machine_of
    from shardes.planning.report import report
    from shardes.planning.sources import plan_run

    machine = machine_of(
        config,
        device_type=device,
        memory_bytes=device_memory,
        reserved_bytes=reserve,
        gather_bytes_per_second=gather_bandwidth and gather_bandwidth * 1e9,
        collective_bytes_per_second=gather_bandwidth and gather_bandwidth * 1e9,
        memory_bytes_per_second=memory_bandwidth and memory_bandwidth * 1e9,
        flops_per_second=compute and compute * 1e12,
    )
    planned, files = plan_run(
        config,
        machine=machine,
        world_size=world_size,
        model_config=model_config,
        num_prompts=num_prompts,
        prompt_tokens=prompt_tokens,
    )
    click.echo("\n".join(report(planned, files=files)))
    if planned.chosen_gather is None:
        click.get_current_context().exit(EXIT_FAILURE)
