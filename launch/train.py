"""What ``deepspeed``, ``torchrun`` and ``accelerate launch`` start: the same program as ``shardes train``."""

from shardes.cli import main, train

if __name__ == "__main__":
    main(train)
