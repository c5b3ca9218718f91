"""Start ``shardes evaluate`` as a script, for ``deepspeed``, ``torchrun`` and ``accelerate launch``."""

from shardes.cli import evaluate, main

if __name__ == "__main__":
    main(evaluate)
