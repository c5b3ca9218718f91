"""Writing files so that whatever dies, a reader finds the old text or the new one."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file, so that a reader sees the old text or the new one whatever happens."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
