"""Workers that see no processes but their own: a PID namespace for each, where the kernel allows it.

Root may make namespaces. A user without any privileges makes a user namespace first, in which it stays the
same user, has no further rights outside, and gives up those inside before the worker begins. Whoever has some
privileges but not this one would lose them in a user namespace, and is not isolated. The worker is not the
first process of its namespace, for which signals have other rules; the first one waits for it, and ends
everything else when it has ended.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from shardes.rewards.descendants import descendants, end_all, end_with_parent, reap

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 2, 4, 8, 1 << 14, 1 << 19
_CAPABILITY_VERSION_3 = 0x20080522
_CODE = struct.Struct("i")


def why_not_isolated() -> str | None:
    """Return why this process cannot start isolated ones; None if it can."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _try(writer)
    os.close(writer)
    said = os.read(reader, 256).decode()  # nothing, if there is no more that has the other end
    os.close(reader)
    os.waitpid(pid, 0)
    return None if said == "isolated" else said or "the attempt failed"


def _try(writer: int) -> NoReturn:
    """Say in a pipe whether the namespaces can be made."""
    said = ""
    try:
        _unshare()
        if os.fork() == 0:
            try:
                _mount_own_processes()
                said = "isolated"
            except OSError as error:
                said = f"/proc: {error.strerror}"
            os.write(writer, said.encode())
        else:
            os.wait()
    except OSError as error:
        os.write(writer, f"unshare: {error.strerror}".encode())
    finally:
        os._exit(0)


def run_isolated(work: Callable[[], NoReturn], *, close: Callable[[], None]) -> NoReturn:
    """Run a worker as the second process of namespaces of its own, and end as it ends.

    A SIGTERM to this process ends the worker and all that it has started.

    Args:
        work: The worker; it lets all signals through.
        close: Closes what only the worker may hold open.
    """
    has_rights = _has_capabilities()
    _unshare()
    end_with_parent(signal.SIGKILL)
    parent, reader_writer = os.getpid(), os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    first = os.fork()
    if first == 0:
        os.close(reader_writer[0])
        _run_first(work, close, reader_writer[1], has_rights=has_rights)
    close()
    os.close(reader_writer[1])
    signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # As long as it is not reaped, nobody else has its number, and no signal can go astray.
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    said = os.read(reader_writer[0], _CODE.size)
    code = _CODE.unpack(said)[0] if said else 1
    if code < 0:  # end by the same signal, without a core of its own
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(parent, -code)
    os._exit(code & 0xFF)


def _run_first(
    work: Callable[[], NoReturn], close: Callable[[], None], writer: int, *, has_rights: bool
) -> NoReturn:
    """Run the first process of the namespaces: start the worker, wait for it, and end all others."""
    code = 1
    try:
        end_with_parent(signal.SIGKILL)
        _mount_own_processes()
        worker = os.fork()
        if worker == 0:
            os.close(writer)
            if not has_rights:  # those that it has come with the user namespace
                _drop_capabilities()
            work()
        close()
        codes: dict[int, int] = {}
        while worker not in codes and signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGCHLD:
            reap(codes)
        end_all(descendants, codes)
        code = codes.get(worker, -signal.SIGKILL)
    finally:
        os.write(writer, _CODE.pack(code))
        os._exit(0)


def _unshare() -> None:
    """Have the next child be the first process of new namespaces.

    Raises:
        OSError: The kernel, or a rule of this machine, does not allow it.
    """
    if _has_capabilities():
        _call("unshare", _CLONE_NEWPID | _CLONE_NEWNS)
        return
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _CLONE_NEWUSER | _CLONE_NEWPID | _CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _has_capabilities() -> bool:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("CapEff:")[2].split()[0], 16) != 0


def _mount_own_processes() -> None:
    """Have /proc show the processes of this namespace."""
    _call("mount", b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
    _call("mount", b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)


def _drop_capabilities() -> None:
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, bytes(24))


def _call(name: str, *arguments: object) -> None:
    """Call a function of the C library.

    Raises:
        OSError: It fails.
    """
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
