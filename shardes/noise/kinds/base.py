"""Protocol of a kind of noise, and its implementation for kinds whose elements are independent."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardes.noise.definition import Floats, Ints, NoiseKey, Stream
from shardes.noise.parts import MAX_PARTS, Parts, scale_of
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
        num_parts: Number of parts of the parameters, of which a direction's noise covers one.
    """

    name: ClassVar[str]
    num_parts: int = 1

    def __str__(self) -> str:
        return self.name

    def parts_of(self, param_size: int) -> Parts | None:
        """Return the parts of a parameter, of which a direction's noise covers one; None: it covers all."""
        return None

    @property
    @abstractmethod
    def largest(self) -> float:
        """Upper bound of the magnitude of eps, or of eps times the parts' scale."""

    def check_shape(self, shape: Sequence[int]) -> None:  # noqa: B027 - most kinds take any shape
        """Check that the noise is defined for a parameter of this shape.

        Raises:
            ValueError: It is not.
        """

    @abstractmethod
    def eps(self, *, shape: Sequence[int] | None = None, **address: Any) -> NDArray[np.float32]:
        """Compute eps of consecutive elements in NumPy: the definition that kernels are compared with.

        It is that of all elements, whether the direction's part covers them or not, without ``part_scale``.

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

    @property
    def part_scale(self) -> np.float32:
        """Factor of sigma and of coefficients, float32: the root of the number of parts."""
        return scale_of(self.num_parts)

    def covers(self, *, start: int, length: int, param_size: int, **address: Any) -> NDArray[np.bool_]:
        """Return in NumPy for consecutive elements whether the noise changes them: bool of shape [length].

        Args:
            start: Row-major index of the first element in the whole parameter.
            length: Number of elements.
            param_size: Number of elements of the whole parameter.
            **address: seed, iteration, direction and param_id, as for ``gaussian.normals``.
        """
        parts = self.parts_of(param_size)
        if parts is None:
            return np.ones(length, np.bool_)
        return parts.covers(start=start, length=length, **address)

    def restore(
        self, source: Tensor, target: Tensor, region: Region, *, key: NoiseKey, direction: int
    ) -> None:
        """Write the centre to what ``perturb`` writes to; ``shardes.noise.restore`` checks before."""
        parts = self.parts_of(region.param_size)
        if parts is None:
            target.copy_(source)
            return
        shared = kernels("shardes.noise.parts", source.device)
        shared.restore(source, target, region, parts=parts, key=key, direction=direction)


@dataclass(frozen=True)
class ElementwiseNoise(NoiseKind):
    """Noise whose elements do not depend on the parameter's shape, computed block by block.

    The kind's package has modules ``cpu`` and ``gpu``, each with a ``FILL`` that the shared kernels
    (``shardes.noise.cpu``, ``shardes.noise.gpu``, and those of ``shardes.noise.parts``) are compiled with.

    Attributes:
        stream: Counters that the noise draws from.
        largest_eps: Upper bound of the magnitude of eps.
        part_block: Elements of a part's block in small parameters, a multiple of what fills compute.
        num_parts: Number of parts, see ``EsConfig.subspaces``.

    Raises:
        ValueError: No part, or too many.
    """

    stream: ClassVar[Stream]
    largest_eps: ClassVar[float]
    part_block: ClassVar[int]
    num_parts: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_parts < MAX_PARTS:
            raise ValueError(f"got {self.num_parts} parts; wanted 1 to {MAX_PARTS - 1}")

    def parts_of(self, param_size: int) -> Parts | None:
        """Return the parts of a parameter, of which a direction's noise covers one; None: it covers all."""
        if self.num_parts == 1:
            return None
        return Parts.of_size(self.num_parts, self.part_block, param_size=param_size)

    @property
    def largest(self) -> float:
        """Upper bound of the magnitude of eps times the parts' scale."""
        return self.largest_eps * float(self.part_scale)

    def fill(self, device: torch.device) -> Any:
        """Return the ``FILL`` of the kind's module for a device."""
        return kernels(type(self).__module__, device).FILL

    def perturb(
        self, source: Tensor, target: Tensor, region: Region, *, sigma: float, key: NoiseKey, direction: int
    ) -> None:
        """Write ``round(centre + sigma * eps)`` to ``target``, to the elements of the direction's part."""
        fill, word = self.fill(source.device), direction << 8 | self.stream
        parts = self.parts_of(region.param_size)
        if parts is None:
            shared = kernels("shardes.noise", source.device)
            shared.perturb(source, target, region, fill=fill, sigma=sigma, word2=word, key=key)
            return
        shared = kernels("shardes.noise.parts", source.device)
        scaled = float(np.float32(sigma) * self.part_scale)
        numbers: dict[str, Any] = {"sigma": scaled, "word2": word, "key": key, "direction": direction}
        shared.perturb(source, target, region, fill=fill, parts=parts, **numbers)

    def accumulate(
        self, master: Tensor, region: Region, *, key: NoiseKey, coefficients: Floats, directions: Ints
    ) -> None:
        """Add a weighted sum of eps to ``master``."""
        fill, words = self.fill(master.device), [direction << 8 | self.stream for direction in directions]
        terms: dict[str, Any] = {"coefficients": coefficients, "words2": words, "key": key}
        parts = self.parts_of(region.param_size)
        if parts is None:
            kernels("shardes.noise", master.device).accumulate(master, region, fill=fill, **terms)
            return
        shared = kernels("shardes.noise.parts", master.device)
        shared.accumulate(master, region, fill=fill, parts=parts, directions=directions, **terms)
