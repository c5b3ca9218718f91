"""Compilation of CPU kernels by numba, which keeps them on disk where it finds a place."""

import logging
import os
from collections.abc import Callable
from typing import Any

import numba as nb

logger = logging.getLogger(__name__)


def compile_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that releases the interpreter's lock, at its first call.

    The compiled code is kept in NUMBA_CACHE_DIR, beside the package or in the user's cache directory,
    whichever can be written to; if none can, every process compiles anew.
    """
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled: Any = nb.njit(cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        _warn("neither the installation nor a home directory can be written to")
        compiled = nb.njit(**options)(function)
    else:
        _survive_full_disk(compiled)
    kernel: Callable[..., Any] = compiled
    return kernel


def _survive_full_disk(compiled: Any) -> None:
    """Have a kernel run that cannot be kept: numba raises where it has no room for it."""
    save = compiled._cache.save_overload

    def save_if_possible(*arguments: Any) -> None:
        try:
            save(*arguments)
        except OSError as error:
            _warn(f"{error.filename or 'the cache'} cannot be written: {error.strerror or error}")

    compiled._cache.save_overload = save_if_possible


_warned: set[str] = set()


def _warn(reason: str) -> None:
    if reason not in _warned and os.environ.get("RANK", "0") == "0":
        _warned.add(reason)
        logger.warning(
            "CPU kernels are compiled anew in every process, which takes some seconds, because %s; set "
            "NUMBA_CACHE_DIR to a directory that can",
            reason,
        )
