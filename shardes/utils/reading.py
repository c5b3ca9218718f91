"""Reading of files that somebody else may have written: regular files only, of bounded size and depth.

A pipe or a device in place of a file would keep a command waiting for ever, or fill the memory.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from errno import EFBIG, EINVAL, EISDIR
from pathlib import Path
from typing import Any, BinaryIO

# Largest depth of objects and lists in a JSON document; what this program writes has no more than ten.
_MAX_DEPTH = 100
# Longest line of a file of JSON documents: a million numbers take a tenth of it.
_MAX_LINE_BYTES = 1 << 28

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(mode: int, path: Path) -> None:
    """Refuse what is not a regular file.

    Raises:
        OSError: It is something else; ``strerror`` says what.
    """
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        number = EISDIR if stat.S_ISDIR(mode) else EINVAL
        raise OSError(number, f"it is {kind}; wanted: a regular file", str(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, if it is a regular one.

    Raises:
        OSError: It cannot be read, or is a pipe, a socket, a device or a directory; ``strerror`` says so.
    """
    # Looked at before it is opened, since opening a device may do something; and afterwards, since what has
    # the name may have changed. Without O_NONBLOCK, opening a pipe waits for a writer.
    check_regular(path.stat().st_mode, path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, *, max_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: It cannot be read, is no regular file, or has more than ``max_bytes`` bytes.
    """
    with open_regular(path) as file:
        # The size is looked at first, so that a file of holes does not fill the memory.
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise _too_large(path, max_bytes)
        data = bytearray()
        while piece := file.read(min(1 << 24, max_bytes + 1 - len(data))):
            data += piece
            if len(data) > max_bytes:
                raise _too_large(path, max_bytes)
    return bytes(data)


def read_whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a regular file, without their breaks; not what follows the last break.

    Raises:
        OSError: The file cannot be read, is no regular one, or has a line of more than 256 MiB.
    """
    with open_regular(path) as file:
        while line := file.readline(_MAX_LINE_BYTES + 1):
            if not line.endswith(b"\n"):
                if len(line) > _MAX_LINE_BYTES:
                    raise OSError(EFBIG, f"it has a line of more than {_MAX_LINE_BYTES} bytes", str(path))
                return
            yield line[:-1]


def parse_json(text: str | bytes, *, refuse_repeats: bool = False) -> Any:
    """Parse a JSON document of bounded depth.

    Args:
        text: The document.
        refuse_repeats: Whether an object may not give a name twice; otherwise the last one counts.

    Raises:
        ValueError: It is not JSON, is nested more than 100 deep, or repeats a name.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats if refuse_repeats else None)
    except RecursionError:
        raise _too_deep() from None
    # Few documents have so many brackets at all; the others are looked through.
    num_brackets = (
        text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else sum(map(text.count, "[{"))
    )
    if num_brackets > _MAX_DEPTH and _is_deeper(value, _MAX_DEPTH):
        raise _too_deep()
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the name {repeated_names(pairs)[0]!r} is given twice")
    return found


def repeated_names(pairs: Sequence[tuple[str, Any]]) -> list[str]:
    """Return the names that are given more than once, in the order in which they first occur."""
    return [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]


def _is_deeper(value: Any, depth: int) -> bool:
    """Return whether lists and dictionaries are nested more than ``depth`` deep."""
    level = [value]
    for _ in range(depth):
        level = [
            part
            for each in level
            if isinstance(each, dict | list)
            for part in (each.values() if isinstance(each, dict) else each)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True


def _too_large(path: Path, max_bytes: int) -> OSError:
    return OSError(EFBIG, f"it has more than {max_bytes} bytes, which is too much to be read", str(path))


def _too_deep() -> ValueError:
    return ValueError(f"its lists and objects are nested more than {_MAX_DEPTH} deep")
