"""The device of a rank, and what collectives of its tensors go through."""

import torch
import torch.distributed as dist

from shardes.distributed.place import Place
from shardes.errors import UserError

_REMEDY = "start one rank per GPU, or hide them with CUDA_VISIBLE_DEVICES= to run on the CPU"


def choose_device(place: Place) -> torch.device:
    """Return this rank's device, and make it the current one.

    A launcher shows a rank all GPUs of its machine, of which it takes the one of its number there, or a
    single one, which is its own whatever its number.

    Args:
        place: Place of this process in the job.

    Raises:
        UserError: There are several GPUs, but fewer than ranks on this machine, or the rank does not know
            its number there.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count, rank, local_rank = torch.cuda.device_count(), place.rank, place.local_rank or 0
    if place.local_rank is None and place.world_size > 1 and count > 1:
        raise UserError(
            f"LOCAL_RANK: it is not set, so rank {rank} of {place.world_size} cannot know which of the "
            f"{count} GPUs is its own; start the ranks with torchrun, deepspeed or accelerate launch, set it "
            "to the rank's number on its machine, or show each rank one GPU with CUDA_VISIBLE_DEVICES"
        )
    if 1 < count <= local_rank:
        raise UserError(
            f"this machine has {count} GPU(s), but rank {rank} is number {local_rank + 1} on it; {_REMEDY}"
        )
    device = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


def collectives_of(device: torch.device) -> str:
    """Return the name of torch's backend for collectives of tensors on a device.

    All that ranks exchange lies on their devices. A gloo group beside NCCL would connect all ranks with each
    other at once, at the addresses that their machines' names resolve to, and on Debian that is 127.0.1.1.
    """
    return "nccl" if device.type == "cuda" else "gloo"


def check_devices_differ(store: dist.Store, device: torch.device, *, rank: int, world_size: int) -> None:
    """Check that no two ranks have the same GPU; a collective of all ranks.

    Args:
        store: Store of this attempt alone.
        device: This rank's device; nothing is compared on CPUs.
        rank: Index of this process.
        world_size: Number of ranks.

    Raises:
        UserError: Two ranks have the same GPU; on all ranks.
    """
    if device.type == "cpu" or world_size == 1:
        return
    store.set(f"device/{rank}", str(torch.cuda.get_device_properties(device).uuid))
    found: dict[str, int] = {}
    for other in range(world_size):
        name = store.get(f"device/{other}").decode()
        if name in found:
            raise UserError(f"ranks {found[name]} and {other} have the same GPU ({name}); {_REMEDY}")
        found[name] = other
