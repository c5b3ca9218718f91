"""Start and end of the worker processes of environments."""

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shardes.environments.base import EnvironmentSpec
from shardes.environments.host import Host
from shardes.rewards.processes import ForkServer, ending

# How long the import of an environment may take.
IMPORT_SECONDS = 600.0


class NoProcessError(Exception):
    """A worker could not be started.

    Args:
        message: The reason.
        may_be_chance: True if another attempt may fare better.
    """

    def __init__(self, message: str, *, may_be_chance: bool = False) -> None:
        super().__init__(message)
        self.may_be_chance = may_be_chance


@dataclass(frozen=True)
class SetUp:
    """What a worker says of its environment; see ``loading.EnvironmentFactory``."""

    tools: list[dict[str, Any]] | None
    columns: list[str] | None
    required: list[str]


class Starter:
    """Starter of workers.

    Args:
        spec: What they import.
        start_fork_server: Starts the process that they are forked from.

    Attributes:
        fork_server: That process.
    """

    def __init__(self, spec: EnvironmentSpec, start_fork_server: Callable[[], ForkServer]) -> None:
        self._spec = spec
        self._start_fork_server = start_fork_server
        self.fork_server = start_fork_server()

    async def start(self) -> tuple[Host, SetUp]:
        """Start a worker, and have it import the environment.

        Raises:
            NoProcessError: It cannot.
        """
        try:
            host = await self._fork()
        except OSError as error:
            raise NoProcessError(f"no process can be started ({error})", may_be_chance=True) from None
        try:
            return host, await self._set_up(host)
        except BaseException:
            host.disconnect()
            self.end(host)
            raise

    async def _set_up(self, host: Host) -> SetUp:
        said: asyncio.Future[dict[str, Any] | str | None] = asyncio.get_running_loop().create_future()

        def say(message: dict[str, Any] | str | None) -> None:
            if not said.done():
                said.set_result(message)

        host.on_message, host.on_end = say, say
        host.send(self._spec)
        try:
            async with asyncio.timeout(IMPORT_SECONDS):
                message = await said
        except TimeoutError:
            raise NoProcessError(f"importing it took longer than {IMPORT_SECONDS:g} s") from None
        if message is None:
            await host.has_ended()
            code = self.end(host)
            how = "with its parent" if code is None else ending(code)
            may_be_chance = code in (None, -signal.SIGKILL)
            raise NoProcessError(f"importing it ended the process ({how})", may_be_chance=may_be_chance)
        if isinstance(message, str) or message.get("error") is not None:
            raise NoProcessError(message if isinstance(message, str) else str(message["error"]))
        try:
            setup = message["setup"]
            return SetUp(setup["tools"], setup["columns"], setup["required"])
        except (KeyError, TypeError) as error:
            raise NoProcessError(f"importing it broke the process ({error!r})") from None

    async def _fork(self) -> Host:
        """Fork a worker; if the fork server is gone, start another first.

        Raises:
            OSError: No process can be started.
        """
        try:
            pid, connection = self.fork_server.fork()
        except OSError:
            self.fork_server.close()
            self.fork_server = self._start_fork_server()
            pid, connection = self.fork_server.fork()
        host = Host(pid, self.fork_server)
        await asyncio.get_running_loop().create_unix_connection(lambda: host, sock=connection)
        return host

    def end(self, host: Host) -> int | None:
        """Kill a worker; return the exit code, or minus the signal, that it ended with, if known."""
        if host.fork_server is not self.fork_server or host.is_ended:
            return None
        host.is_ended = True
        try:
            return self.fork_server.kill(host.pid)
        except OSError:  # a reply that comes later would be taken for another's
            self.fork_server.close()
            return None
