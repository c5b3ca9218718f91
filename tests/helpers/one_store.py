"""For scripts that open several sessions on every rank, one after the other."""

import os

from torch.distributed import TCPStore


def make_store():
    """Has all sessions meet in one store, as under torchrun: whoever keeps it needs one port and no more."""
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if os.environ["RANK"] != "0":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=True, wait_for_workers=False)
