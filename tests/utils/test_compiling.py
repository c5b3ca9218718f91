"""Kernels run where numba finds no place to keep them, and say what would help."""

import errno

import numba.core.caching
import numpy as np
import pytest

from shardes.utils import compiling
from shardes.utils.compiling import compile_kernel


def double(values):
    for i in range(values.size):
        values[i] *= 2


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(compiling, "_warned", set())


def check_it_runs(kernel, caplog, words):
    values = np.arange(3.0)
    kernel(values)
    assert values.tolist() == [0, 2, 4]
    (record,) = caplog.records
    assert words in record.getMessage() and "set NUMBA_CACHE_DIR" in record.getMessage()


def test_a_kernel_runs_without_a_place_to_keep_it(monkeypatch, caplog):
    monkeypatch.setattr(numba.core.caching.CompileResultCacheImpl, "_locator_classes", [])
    check_it_runs(compile_kernel(double), caplog, "neither the installation nor a home directory")
    compile_kernel(double)
    assert len(caplog.records) == 1  # said once, not for each kernel


def test_a_kernel_runs_though_there_is_no_room_to_keep_it(monkeypatch, caplog, tmp_path):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "index.nbi")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "save", full)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    check_it_runs(compile_kernel(double), caplog, "index.nbi cannot be written: No space left on device")
