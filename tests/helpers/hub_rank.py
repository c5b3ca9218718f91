"""Trains as one rank does whose machine has a cache of the hub of its own, and perhaps no network.

Variables: HUB, the address of the hub; CACHES, a directory for caches; UNREACHABLE, a rank that cannot reach
the hub. With NODES, each rank is the first of its machine; otherwise they are on one machine.
"""

import os

from shardes.cli import main, train
from tests.helpers.hub_server import use_hub

if __name__ == "__main__":
    rank = os.environ["RANK"]
    machine = rank if "NODES" in os.environ else "0"
    if "NODES" in os.environ:
        os.environ["LOCAL_RANK"] = "0"
    url = "http://127.0.0.1:9" if os.environ.get("UNREACHABLE") == rank else os.environ["HUB"]
    use_hub(url, f"{os.environ['CACHES']}/{machine}")
    main(train)
