"""Waiting for what is queued on a device."""

import torch


def synchronize(device: torch.device) -> None:
    """Wait until everything that is queued on a device is done; on a CPU nothing is queued.

    The host waits, and so everything that it queues later comes after, on whatever stream.
    """
    torch.get_device_module(device).synchronize(device)
