"""Fixtures of several files."""

import os

import pytest

# Of launchers, and of the libraries that go by them.
VARIABLES = ("RANK", "LOCAL_", "WORLD_SIZE", "CROSS_", "MASTER_", "TORCHELASTIC", "DS_", "WANDB_")


@pytest.fixture(autouse=True)
def environment_is_left_as_it_was():
    """Other tests, those that happen to run in the same process, would go by what one leaves there."""
    before = _environment()
    yield
    assert _environment() == before


def _environment():
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}


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
