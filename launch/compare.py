"""Start ``shardes compare`` as a script, for ``deepspeed``, ``torchrun`` and ``accelerate launch``."""

from shardes.cli import main
from shardes.evaluation.command import compare

if __name__ == "__main__":
    main(compare)
