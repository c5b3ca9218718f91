"""The schema of the section ``log``."""

from typing import Annotated

from pydantic import Field

from shardes.config.section import NeedsConsent, Registered, Section
from shardes.runs.trackers import TRACKERS


class LogConfig(Section):
    """Records that are kept besides the rewards, and trackers."""

    samples_every: int = Field(default=10, ge=0)
    """Iterations between those of which a few answers of the first member are written to samples.jsonl; 0
    means never. Those of held-out evaluations always are."""
    instruments_every: int = Field(default=10, ge=0)
    """Iterations between those whose update is measured: its length, what of it was lost in rounding, how far
    the weights are from the base model; 0 means never. It takes one to two updates more, and reads the base
    model's file."""
    kl_every: int = Field(default=0, ge=0)
    """Iterations between estimates of how far the centre's answers have moved from the base model's, on
    ``kl_prompts`` prompts; 0 means never."""
    kl_prompts: int = Field(default=16, gt=0)
    """Number of prompts that the base model answers for that: held-out problems if there are any."""
    report_to: Annotated[
        list[Annotated[str, Registered("tracker", lambda: TRACKERS)]],
        NeedsConsent("metrics are sent over the network", lambda names: not {*names} <= {"tensorboard"}),
    ] = []
    """Trackers that get the lines of metrics.jsonl. ``tensorboard``: event files in ``run.dir``. ``wandb``:
    Weights & Biases, as its own settings and environment variables (``WANDB_MODE``, ``WANDB_PROJECT``) say.
    Each is an extra to install."""
