"""On a machine with a CUDA device the tests here run on it, and are marked ``gpu``.

On any other the same tests run under Triton's interpreter, on CPU tensors.
"""

import dataclasses
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import shardes.weights
from tests.noise.gpu.checks import HAS_CUDA, interpreted, use_for_cpu


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_CUDA else "interpreter"])
def kernels(request, monkeypatch):
    """Has the entries of the noise and of the digest use the Triton kernels; gives their device."""
    if request.param == "cuda":
        yield SimpleNamespace(device=torch.device("cuda"), gpu=importlib.import_module("shardes.noise.gpu"))
        return
    from triton.runtime.interpreter import InterpretedFunction

    modules = interpreted()
    use_for_cpu(monkeypatch, modules)
    monkeypatch.setattr(shardes.weights, "digest_cpu", modules.digest_gpu, raising=False)
    # A launch readies triton.language for the interpreter; each call of a function would do so once more, in
    # three milliseconds.
    monkeypatch.setattr(InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
    with np.errstate(all="ignore"):
        yield SimpleNamespace(device=torch.device("cpu"), **vars(modules))


@pytest.fixture
def large_programs(kernels, monkeypatch):
    """Programs of more calls where a program takes long, whatever its size: under the interpreter."""
    if kernels.device.type == "cpu":
        for module, calls in ((kernels.gaussian_gpu, 4096), (kernels.rademacher_gpu, 512)):
            monkeypatch.setattr(module, "FILL", dataclasses.replace(module.FILL, calls=calls))
