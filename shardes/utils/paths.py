"""Paths in messages."""

import stat
from pathlib import Path


def describe_path(path: Path) -> str:
    """Return a path and why it is no file or directory that can be used, for a message."""
    return f"{path} {path_problem(path)}"


def path_problem(path: Path) -> str:
    """Return why a path is no file or directory that can be used, as what follows it in a message."""
    try:
        if path.is_symlink() and not path.exists():
            return f"is a link to {path.readlink()}, which does not exist"
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFREG: "a file, and not a directory",
        stat.S_IFIFO: "a pipe, and not a file",
        stat.S_IFSOCK: "a socket, and not a file",
        stat.S_IFCHR: "a device, and not a file",
        stat.S_IFBLK: "a device, and not a file",
    }
    return f"is {kinds.get(stat.S_IFMT(mode), 'no file')}"
