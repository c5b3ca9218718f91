"""Imports of all runs, for the process that they are forked from: importing takes longer than some runs.

It also loads the kernels of plain noise, which numba compiles in the first process that ever uses them.
"""

import contextlib
import importlib
from typing import Any

import torch

from shardes import noise

for _name in ("shardes.session", "shardes.trainer", "shardes.rollout.preparing", "shardes.evaluation.kl"):
    importlib.import_module(_name)
with contextlib.suppress(ImportError):
    importlib.import_module("trl.trainer.grpo_trainer")

torch.set_num_threads(1)
_region = noise.Region(0, 1, 0, 1)
_key: dict[str, Any] = {"region": _region, "seed": 0, "iteration": 0}
for _dtype in (torch.float32, torch.bfloat16):
    _master = torch.zeros(1)
    noise.perturb(_master, torch.zeros(1, dtype=_dtype), sigma=1.0, direction=0, **_key)
    noise.accumulate(_master, coefficients=[1.0], directions=[0], **_key)
