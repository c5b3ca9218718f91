"""Protocol of a kind of noise, and its implementation for kinds whose elements are independent."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardes.noise.definition import Floats, Ints, NoiseKey, Stream
from shardes.noise.region import Region


def kernels(package: str, device: torch.device) -> ModuleType:
    """Import the module of a package whose kernels run on a device: its ``cpu`` or its ``gpu``.

    Raises:
        ValueError: There are no kernels for this type of device.
    """
    name = {"cpu": "cpu", "cuda": "gpu"}.get(device.type)
    if name is None:
        raise ValueError(f"there is no noise kernel for the device {device}; use a CPU or a CUDA device")
    return importlib.import_module(f"{package}.{name}")


class NoiseKind(ABC):
    """Distribution of eps, and the code that computes it.

    Attributes:
        name: Value of ``es.noise``.
    """

    name: ClassVar[str]

    def __str__(self) -> str:
        return self.name

    @property
    @abstractmethod
    def largest(self) -> float:
        """Upper bound of the magnitude of eps."""

    def check_shape(self, shape: Sequence[int]) -> None:  # noqa: B027 - most kinds take any shape
        """Check that the noise is defined for a parameter of this shape.

        Raises:
            ValueError: It is not.
        """

    @abstractmethod
    def eps(self, *, shape: Sequence[int] | None = None, **address: Any) -> NDArray[np.float32]:
        """Compute eps of consecutive elements in NumPy: the definition that kernels are compared with.

        Args:
            shape: Shape of the whole parameter; only kinds that take matrices need it.
            **address: seed, iteration, direction, param_id, start and length, as for ``gaussian.normals``.

        Returns:
            float32 of shape [length].
        """

    @abstractmethod
    def perturb(
        self, source: Tensor, target: Tensor, region: Region, *, sigma: float, key: NoiseKey, direction: int
    ) -> None:
        """Write ``round(centre + sigma * eps)`` to ``target``; ``shardes.noise.perturb`` checks before."""

    @abstractmethod
    def accumulate(
        self, master: Tensor, region: Region, *, key: NoiseKey, coefficients: Floats, directions: Ints
    ) -> None:
        """Add a weighted sum of eps to ``master``; ``shardes.noise.accumulate`` checks before."""


class ElementwiseNoise(NoiseKind):
    """Noise whose elements do not depend on the parameter's shape, computed block by block.

    The kind's package has modules ``cpu`` and ``gpu``, each with a ``FILL`` that the shared kernels
    (``shardes.noise.cpu``, ``shardes.noise.gpu``) are compiled with.

    Attributes:
        stream: Counters that the noise draws from.
    """

    stream: ClassVar[Stream]

    def fill(self, device: torch.device) -> Any:
        """Return the ``FILL`` of the kind's module for a device."""
        return kernels(type(self).__module__, device).FILL

    def perturb(
        self, source: Tensor, target: Tensor, region: Region, *, sigma: float, key: NoiseKey, direction: int
    ) -> None:
        """Write ``round(centre + sigma * eps)`` to ``target``."""
        fill, word = self.fill(source.device), direction << 8 | self.stream
        shared = kernels("shardes.noise", source.device)
        shared.perturb(source, target, region, fill=fill, sigma=sigma, word2=word, key=key)

    def accumulate(
        self, master: Tensor, region: Region, *, key: NoiseKey, coefficients: Floats, directions: Ints
    ) -> None:
        """Add a weighted sum of eps to ``master``."""
        fill, words = self.fill(master.device), [direction << 8 | self.stream for direction in directions]
        shared = kernels("shardes.noise", master.device)
        shared.accumulate(master, region, fill=fill, coefficients=coefficients, words2=words, key=key)
