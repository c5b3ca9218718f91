"""On a machine with a CUDA device the tests here run on it, and are marked ``gpu``.

On any other the same tests run under Triton's interpreter, on CPU tensors.
"""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import shardes.weights
from shardes import noise
from shardes.noise import NoiseKind
from shardes.noise.definition import BLOCK, SIGN_BLOCK
from tests.noise.gpu.checks import HAS_CUDA, interpreted


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if HAS_CUDA else "interpreter"])
def kernels(request, monkeypatch):
    """Has the entries of the noise and of the digest use the Triton kernels; gives their device."""
    if request.param == "cuda":
        yield SimpleNamespace(device=torch.device("cuda"), gpu=importlib.import_module("shardes.noise.gpu"))
        return
    from triton.runtime.interpreter import InterpretedFunction

    modules = interpreted()
    monkeypatch.setattr(noise, "_kernels", lambda device: modules.gpu)
    monkeypatch.setattr(shardes.weights, "digest_cpu", modules.digest_gpu, raising=False)
    # A launch readies triton.language for the interpreter; each call of a function would do so once more, in
    # three milliseconds.
    monkeypatch.setattr(InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
    with np.errstate(all="ignore"):
        yield SimpleNamespace(device=torch.device("cpu"), gpu=modules.gpu)


@pytest.fixture
def large_programs(kernels, monkeypatch):
    """Programs of more calls where a program takes long, whatever its size: under the interpreter."""
    if kernels.device.type == "cpu":
        sizes = {NoiseKind.GAUSSIAN: (BLOCK, 4096), NoiseKind.RADEMACHER: (SIGN_BLOCK, 512)}
        monkeypatch.setattr(kernels.gpu, "_SIZES", sizes)
