"""Rates of gathers and sums between ranks, through the code that runs use."""

from typing import Any

import torch

from gpu_check.devices import seconds_of
from gpu_check.part import Context
from gpu_check.ranks import run_job


def run(context: Context) -> None:
    """Measure on all ranks."""
    run_job(context, "links", None, num_ranks=context.num_ranks, seconds=50)


def measure(context: Context, _: Any) -> None:
    """Measure on each rank: groups of 2 and of all ranks, large and small tensors; all groups at once."""
    from shardes.distributed.group import make_mesh
    from shardes.distributed.launch import process_group
    from shardes.distributed.stop import Stop

    with process_group(timeout_seconds=60, always=True, stop=Stop(), stop_seconds=1) as world:
        sizes = sorted({2, world.world_size} if world.world_size % 2 == 0 else {world.world_size})
        for size in sizes:
            group = make_mesh(world, shard_size=size, timeout_seconds=60).shard
            device = group.device
            num_elements = (2**28 if device.type == "cuda" else 2**14) // size
            part = torch.full((num_elements,), float(group.rank + 1), dtype=torch.bfloat16, device=device)
            whole = torch.empty(num_elements * size, dtype=torch.bfloat16, device=device)
            seconds = seconds_of(lambda group=group: group.gather_tensor(part, whole), num_turns=5)  # type: ignore[misc]  # noqa: B023
            gathered = whole.view(size, -1)[:, 0].tolist() == [float(rank + 1) for rank in range(size)]
            is_right = not world.any(not gathered)
            received = whole.numel() * whole.element_size() * (size - 1) / size
            small = torch.ones(200 * 3584, dtype=torch.bfloat16, device=device)
            sum_seconds = seconds_of(lambda group=group: group.sum_tensor(small.clone()), num_turns=20)  # type: ignore[misc]  # noqa: B023
            total = group.sum_tensor(small.clone())
            is_sum = not world.any(not bool((total == size).all()))
            any_seconds = seconds_of(lambda group=group: group.any(False), num_turns=20)  # type: ignore[misc]
            if world.is_main:
                context.check(f"a gather over {size} ranks is right", is_right)
                context.check(f"a sum over {size} ranks is right", is_sum)
                context.record(
                    **{
                        f"gather_over_{size}_received_bytes_per_second": received / seconds,
                        f"sum_of_activations_over_{size}_seconds": sum_seconds,
                        f"agreement_over_{size}_seconds": any_seconds,
                    }
                )
