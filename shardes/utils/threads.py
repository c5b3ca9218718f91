"""Compiled CPU kernels on several threads."""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


def split_over_threads(
    kernel: Callable[..., Any], num_parts: int, *arguments: Any, at_least: int
) -> list[Any]:
    """Call ``kernel(first, last, *arguments)`` on stretches of ``range(num_parts)``, in parallel.

    As many threads are used as torch would use. The kernel must release the interpreter's lock.

    Args:
        kernel: Function that processes the parts from ``first`` up to, without, ``last``.
        num_parts: Number of parts.
        *arguments: Further arguments of the kernel.
        at_least: Least number of parts worth a thread (a hand-over takes about 30 microseconds).

    Returns:
        Return values of the calls, in order.
    """
    num_threads = min(torch.get_num_threads(), num_parts // at_least)
    if num_threads < 2:
        return [kernel(0, num_parts, *arguments)]
    bounds = [num_parts * i // num_threads for i in range(num_threads + 1)]
    pending: list[Future[Any]] = [
        _pool(num_threads).submit(kernel, low, high, *arguments) for low, high in itertools.pairwise(bounds)
    ]
    return [future.result() for future in pending]


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="kernel")
