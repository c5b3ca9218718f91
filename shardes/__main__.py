"""``python -m shardes`` is the console command."""

import sys

if __name__ == "__main__" and "train" in sys.argv[1:2]:
    from shardes.distributed.stop import hold_signals

    hold_signals()  # before what takes seconds to import

from shardes.cli import main

if __name__ == "__main__":
    main()
