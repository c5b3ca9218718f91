"""An event loop in a thread of its own, for what goes on while the program computes."""

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Event loop that runs in a thread until it is stopped.

    Args:
        name: Name of the thread.

    Attributes:
        loop: The event loop.
    """

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._forwarder = threading.Thread(target=self._forward, name=f"{name} inbox", daemon=True)
        self._forwarder.start()

    @property
    def is_running(self) -> bool:
        """Return whether callbacks still run; False once it is stopped, or the interpreter ends."""
        return self._thread.is_alive()

    def call(self, callback: Callable[[], None]) -> None:
        """Have a callback run in the loop; from any thread, in order."""
        self._inbox.put(callback)

    def _forward(self) -> None:
        """Pass on to the event loop what callers put into the inbox.

        Waking the loop lets go of the interpreter's lock and may wait for it for long; this thread has the
        time, a caller that generates does not.
        """
        while (callback := self._inbox.get()) is not None:
            self.loop.call_soon_threadsafe(callback)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Have a coroutine run in the loop; from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def start(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Have a coroutine run in the loop; from the loop's own thread."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def stop(self, last: Callable[[], None]) -> None:
        """Cancel all that runs, and end the thread.

        Args:
            last: Called in the loop before that ends.
        """
        self._inbox.put(None)
        self._forwarder.join()
        self.run(_cancel_others(last)).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _cancel_others(last: Callable[[], None]) -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    last()
