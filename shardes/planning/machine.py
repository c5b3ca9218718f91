"""The assumptions of a plan about a rank's device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The device of each rank. The rates are round numbers, about those of the GPUs of one node of 2024.

    ``planning/rates.py`` measures those of a CPU.

    Attributes:
        memory_bytes: Memory of the device.
        device_type: ``cuda`` or ``cpu``.
        reserved_bytes: Part of the memory that is left to the driver, the communication library and
            fragmentation; what ``rollout/memory.py`` leaves to them, which needs torch.
        process_bytes: Memory of the device that a rank's process takes before it has a model: on CPUs the
            interpreter and its libraries.
        gather_bytes_per_second: Rate at which a rank receives in a large gather.
        collective_bytes_per_second: The same for the collectives of a forward, in which layers are gathered.
        collective_seconds: Least time of a collective, however little it moves, with the hooks that call it.
        memory_bytes_per_second: Rate at which weights are read.
        flops_per_second: Rate of large matrix products in the model's dtype.
        noise_elements_per_second: Rate at which Gaussian noise is computed and added.
        attention_flops_per_second: Rate of attention, its normalisation included.
        elementwise_bytes_per_second: Rate at which operations between products read and write.
        layer_seconds: Least time of a layer, however little there is to compute: of GPUs, 46 kernels.
    """

    memory_bytes: int
    device_type: str = "cuda"
    reserved_bytes: int = 2 * 2**30
    process_bytes: int = 0
    gather_bytes_per_second: float = 200e9
    collective_bytes_per_second: float = 200e9
    collective_seconds: float = 100e-6
    memory_bytes_per_second: float = 2000e9
    flops_per_second: float = 300e12
    noise_elements_per_second: float = 100e9
    attention_flops_per_second: float = 300e12
    elementwise_bytes_per_second: float = 2000e9
    layer_seconds: float = 46 * 3e-6

    @property
    def overlaps(self) -> bool:
        """Return whether weights are read while products are computed; products of CPUs pack them before."""
        return self.device_type != "cpu"
