"""Fixtures of several files."""

import os
from collections import Counter

import pytest

from tools.gpu_check.processes import LAUNCHER_VARIABLES


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as ``slow`` what is ``exhaustive``: ``-m "not slow"`` replaces another ``-m``.

    Files with slow tests come first, so that no worker is left alone with a long one at the end.
    """
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.slow)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def environment_is_left_as_it_was():
    """Other tests, those that happen to run in the same process, would go by what one leaves there."""
    before = _environment()
    yield
    assert _environment() == before


def _environment():
    prefixes = (*LAUNCHER_VARIABLES, "DS_", "WANDB_")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """Directories of tiny models, by name; what is "even" divides by four ranks. Nobody writes to them."""
    from tests.helpers.models import tiny_model

    root = tmp_path_factory.mktemp("models")
    return {
        "tied": tiny_model(root / "tied", tied=True),
        "untied": tiny_model(root / "untied", tied=False, architecture="llama"),
        "even": tiny_model(root / "even", tied=True, num_heads=4, num_kv_heads=2),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of every architecture that is decoded, by name; made anew for each file."""
    from tests.helpers.decoding import load_models

    return load_models(tmp_path_factory.mktemp("models"))
