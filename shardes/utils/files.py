"""Writing files so that after a crash a reader finds the old text or the new one."""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from shardes.errors import StorageError
from shardes.utils.reading import check_regular


def jsonl_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of a JSONL file."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file, so that a reader sees the old text or the new one whatever happens.

    Raises:
        OSError: It cannot be written; the old text is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        # Made anew: what has the name may be a link to a file elsewhere, which would be written to.
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            flush_to_disk(file)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def flush_to_disk(file: IO[Any]) -> None:
    """Flush a file to disk, so that it survives a crash of the machine."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush a directory to disk, so that new and renamed files survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_own(path: Path, flags: int) -> int:
    """Open a file of a run to write to it, and make it if there is none; return its descriptor.

    Raises:
        OSError: It cannot be opened, or is no regular file: a link could lead to a file of somebody else.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a symbolic link; wanted: a regular file", str(path)) from None
    try:
        check_regular(os.fstat(descriptor).st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class AppendFile:
    """A file that grows by whole pieces; nothing remains of one that does not fit on the disk.

    Args:
        path: The file; created if it does not exist.
        keep_bytes: Size to truncate the file to when it is opened; None: it is not truncated.
    """

    def __init__(self, path: Path, *, keep_bytes: int | None = None) -> None:
        self.path = path
        # Without a buffer: one would keep what could not be written, and write it later.
        self._file = os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)
        if keep_bytes is not None:
            self._file.truncate(keep_bytes)
        self._num_bytes = os.fstat(self._file.fileno()).st_size
        sync_directory(path.parent)

    def append(self, data: bytes, *, durable: bool = False) -> None:
        """Write a piece that survives a crash of this process, and if ``durable`` of the machine.

        Raises:
            StorageError: It cannot be written.
        """
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            if durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            # Where even this fails, the piece is a torn last line, which every reader drops.
            with suppress(OSError):
                self._file.truncate(self._num_bytes)
            raise cannot_write(self.path, error) from error
        self._num_bytes += len(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cannot_write(path: Path, error: OSError) -> StorageError:
    """Return the error for a file that cannot be written."""
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}. What was recorded before is whole; mend the "
        "cause (make room, say) and start the same command again, and it goes on from there"
    )


def read_exactly(descriptor: int, view: memoryview, *, offset: int) -> None:
    """Fill memory with the bytes of a file.

    Args:
        descriptor: The file, open for reading.
        view: Memory, as bytes.
        offset: Index of the first byte in the file.

    Raises:
        OSError: The file cannot be read, or ends before.
    """
    done = 0
    while done < len(view):  # one call reads 2 GiB at most
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise OSError(f"unexpected end of file at byte {offset + done}")
        done += count
