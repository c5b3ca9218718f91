"""The memory of a rank, in parts, and what each value of ``rollout.gather`` needs of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank, in bytes.

    Attributes:
        working: The rank's part of the working weights, which generate.
        master: The rank's part of the master weights, on the device or in host memory.
        optimizer: States of the optimizer, in the same place as the master weights.
        passing: Buffer on the device through which chunks of host memory pass.
        pinned: Pinned host memory that holds master weights and optimizer states; 0 if the device does.
        gathers: Memory that each value of ``rollout.gather`` takes besides, fastest first.
        gather_buffers: Temporary buffers of gathering a whole model.
        cache: Keys and values of a micro-batch.
        activations: Activations and logits of a micro-batch.
        update: Temporary buffers of an update.
        process: What the process takes besides, if that is of the same memory.
        fragments: What it keeps, in that case, of layers that were gathered and freed.
    """

    working: int
    master: int
    optimizer: int
    passing: int
    pinned: int
    gathers: dict[str, int]
    gather_buffers: int
    cache: int
    activations: int
    update: int
    process: int = 0
    fragments: int = 0

    @property
    def held(self) -> int:
        """Bytes on the device at all times, whatever ``rollout.gather`` is."""
        kept = 0 if self.is_on_host else self.master + self.optimizer
        return self.working + self.passing + kept

    @property
    def is_on_host(self) -> bool:
        """Return whether master weights and optimizer states are in host memory."""
        return self.pinned > 0

    def needed(self, gather: str) -> int:
        """Compute the most bytes on the device with a value of ``rollout.gather``."""
        gathered = self.gathers[gather]
        if gather == "layer":
            # Layers are gathered for a forward, and not while weights are updated.
            temporary = max(gathered + self.activations, self.update)
        else:
            temporary = gathered + max(self.activations, self.update, self.gather_buffers)
        # Forwards of many members are compared with the members' weights at first, by forwards of layers.
        kept = self.fragments if gather == "layer" or "member" not in self.gathers else 0
        return self.process + kept + self.held + self.cache + temporary
