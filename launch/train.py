"""Start ``shardes train`` as a script, for ``deepspeed``, ``torchrun`` and ``accelerate launch``."""

from shardes.cli import main, train

if __name__ == "__main__":
    main(train)
