"""What launchers start to evaluate a model: the same program as ``shardes evaluate``."""

from shardes.cli import evaluate, main

if __name__ == "__main__":
    main(evaluate)
