"""Limit of what rewards print into the job's log."""

import contextlib
import os
import time

_MAX_BYTES = 1 << 16
# What they may print again for each second; less than 90 MB a day.
_BYTES_PER_SECOND = 1 << 10


class LimitedLog:
    """Writer of what processes print, up to a limit.

    Args:
        descriptor: The open file that it writes to.
        max_bytes: How much may be printed at once.
        bytes_per_second: How much of that is allowed again each second.
        who: Who prints, for messages.
    """

    def __init__(
        self,
        descriptor: int,
        *,
        max_bytes: int = _MAX_BYTES,
        bytes_per_second: int = _BYTES_PER_SECOND,
        who: str = "rewards",
    ) -> None:
        self._who = who.encode()
        self._descriptor = descriptor
        self._max_bytes = max_bytes
        self._bytes_per_second = bytes_per_second
        self._num_allowed = float(max_bytes)
        self._last = time.monotonic()
        self._num_cut = 0

    def write(self, data: bytes) -> None:
        """Write data, or the part of it that is allowed; say once where something is left out."""
        now = time.monotonic()
        self._num_allowed += (now - self._last) * self._bytes_per_second
        self._num_allowed = min(self._num_allowed, self._max_bytes)
        self._last = now
        if self._num_cut:
            if self._num_allowed < self._max_bytes / 2:
                self._num_cut += len(data)
                return
            self.close()
        kept = data
        if len(data) > self._num_allowed:
            kept = data[: int(self._num_allowed)]
            kept = kept[: kept.rfind(b"\n") + 1] or kept
        self._put(kept)
        self._num_allowed -= len(kept)
        self._num_cut = len(data) - len(kept)
        if self._num_cut:
            self._put(
                b"\n[%b printed more than %d bytes at once; what follows is cut]\n"
                % (self._who, self._max_bytes)
            )

    def close(self) -> None:
        """Say how much was left out since something was."""
        if self._num_cut:
            self._put(b"[%d bytes that %b printed were cut]\n" % (self._num_cut, self._who))
        self._num_cut = 0

    def _put(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a log that is gone, or a full disk
            while data:
                data = data[os.write(self._descriptor, data) :]
