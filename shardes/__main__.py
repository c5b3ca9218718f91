"""``python -m shardes`` is the console command."""

from shardes.cli import main

if __name__ == "__main__":
    main()
