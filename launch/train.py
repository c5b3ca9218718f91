"""Start ``shardes train`` as a script, for ``deepspeed``, ``torchrun`` and ``accelerate launch``."""

if __name__ == "__main__":
    from shardes.distributed.stop import hold_signals

    hold_signals()  # before what takes seconds to import

from shardes.cli import main, train

if __name__ == "__main__":
    main(train)
