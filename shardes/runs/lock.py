"""A lock that lets one job at a time into a run directory, on one machine or on several that share it.

The lock is the kernel's (``flock``), which it lifts when the holder dies. Some shared file systems keep such
a lock to the machine it was taken on, so the file also says who holds it, and the holder signs it again every
few seconds. A job that is given the kernel's lock but finds another machine's record watches it: if it is
signed meanwhile, its owner lives; if not for ``SILENCE_SECONDS``, the owner is dead, and the lock is taken
over. Only changes are looked at, never another machine's clock.
"""

import datetime
import fcntl
import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardes.errors import StorageError, UserError
from shardes.utils.files import open_own
from shardes.utils.reading import parse_json, read_regular

logger = logging.getLogger(__name__)

# How often the owner signs, and how long without a signature makes it dead: several signatures, so that a
# slow disk or a long pause does not look like a death.
SIGNATURE_SECONDS = 5.0
SILENCE_SECONDS = 30.0
# How long a job that is just ending may still hold the kernel's lock.
PATIENCE_SECONDS = 5.0
_RECORD_BYTES = 512
_POLL_SECONDS = 0.1


class DirectoryLock:
    """A lock on a run directory, held from its construction until ``release``.

    Args:
        path: The lock file; created if it does not exist.

    Raises:
        UserError: Another job holds it.
        OSError: The file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = open_own(path, os.O_RDWR)
        try:
            has_kernel_lock = self._take_kernel_lock()
            is_certain = self._outlive_owner(has_kernel_lock)
            now = _now()
            self._mine: dict[str, Any] = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "machine": _machine(),
                "since": now,
                "seen": now,
                "signatures": 0,
            }
            self._sign()
            if not is_certain:
                # Another job may have come to the same conclusion; the last to sign has it.
                time.sleep(SIGNATURE_SECONDS / 5)
                if not self._is_mine():
                    raise self._refusal()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._is_ended = threading.Event()
        self._signer = threading.Thread(target=self._keep_signing, name="run lock", daemon=True)
        self._signer.start()

    def check(self) -> None:
        """Make sure that nobody has taken the lock over.

        Raises:
            StorageError: Somebody has: this job was silent for too long.
        """
        if not self._is_mine():
            raise StorageError(
                f"run.dir: {self._path.parent} was taken over by {_described(self._read())}, because "
                f"this job gave no sign of life for {SILENCE_SECONDS:.0f} s. The other goes on with the run; "
                "this one ends"
            )

    def release(self) -> None:
        """Release the directory."""
        self._is_ended.set()
        self._signer.join()
        with suppress(OSError):
            if self._is_mine():
                os.ftruncate(self._descriptor, 0)
            # Not by closing alone: a process that this one forked has the file open as well.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _take_kernel_lock(self) -> bool:
        """Take the kernel's lock, and return whether the file system has such locks.

        Raises:
            UserError: It has, and another job holds this one.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._refusal() from None
                time.sleep(_POLL_SECONDS)
            except OSError:
                return False

    def _outlive_owner(self, has_kernel_lock: bool) -> bool:
        """Wait until the file's owner, if it names one, is known to be dead; return whether that is certain.

        Raises:
            UserError: It lives.
        """
        text = self._read_text()
        if not text.strip("\0 \n"):
            return has_kernel_lock
        owner = _parsed(text)
        if has_kernel_lock and owner.get("machine") == _machine():
            logger.info("run.dir: %s was left by %s, which is dead", self._path.parent, _described(owner))
            return True
        logger.warning(
            "run.dir: %s was last used by %s; waiting %.0f s for a sign of life of it",
            self._path.parent,
            _described(owner),
            SILENCE_SECONDS,
        )
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            now = self._read_text()
            if not now.strip("\0 \n"):
                return has_kernel_lock
            if now != text:
                raise self._refusal()
        logger.warning("run.dir: %s gave none, so the directory is taken over", _described(owner))
        return False

    def _keep_signing(self) -> None:
        while not self._is_ended.wait(SIGNATURE_SECONDS):
            # A failure is not told: ``check`` looks whether it did harm.
            with suppress(OSError):
                if not self._is_mine():
                    return
                self._sign()

    def _sign(self) -> None:
        self._mine |= {"seen": _now(), "signatures": self._mine["signatures"] + 1}
        # Always as long, and in place: it needs no room on a full disk, and one write has all of it.
        text = json.dumps(self._mine).encode().ljust(_RECORD_BYTES - 1) + b"\n"
        os.pwrite(self._descriptor, text, 0)
        os.fsync(self._descriptor)

    def _is_mine(self) -> bool:
        """Return whether the file still names this job. A file that cannot be read now is not another's."""
        try:
            owner = self._read()
        except OSError:
            return True
        return all(owner.get(key) == self._mine[key] for key in ("host", "pid", "machine", "since"))

    def _read_text(self) -> str:
        # Opened anew: that is when network file systems look for what other machines wrote.
        return read_regular(self._path, max_bytes=1 << 20).decode(errors="replace")

    def _read(self) -> dict[str, Any]:
        return _parsed(self._read_text())

    def _refusal(self) -> UserError:
        owner = self._read()
        return UserError(
            f"run.dir: {self._path.parent} is in use by {_described(owner)}; wait for it, end it, or give "
            "another run.dir. If it died on another machine, the directory is free "
            f"{SILENCE_SECONDS:.0f} s after its death"
        )


def _parsed(text: str) -> dict[str, Any]:
    """Return the owner that the file names; an empty mapping if nothing in it can be read."""
    try:
        owner = parse_json(text.strip("\0 \n") or "{}")
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _described(owner: dict[str, Any]) -> str:
    """Describe a job to people."""
    if not {"host", "pid", "since"} <= owner.keys():
        return "another job"
    return f"process {owner['pid']} on host {owner['host']} (since {owner['since']})"


def _machine() -> str:
    """Return an identifier of this machine since its last start; hosts may share a name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
