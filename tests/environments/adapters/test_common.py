"""Parts that adapters share, without any of their packages."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from shardes.environments.adapters.common import check_known, load_package, override
from shardes.environments.adapters.registry import ADAPTERS


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_a_missing_package_is_named_with_its_extra(name: str, monkeypatch) -> None:
    module, _, function = ADAPTERS[name].partition(":")
    make = getattr(importlib.import_module(module), function)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"needs the package {name}, .*pip install 'shardes\[") as caught:
        make("anything", {})
    extra = str(caught.value).rpartition("[")[2].partition("]")[0]
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]


def test_a_package_of_something_missing_says_what() -> None:
    with pytest.raises(ValueError, match=r"needs the package no_such, .*No module named 'no_such'"):
        load_package("no_such.part", adapter="a", extra="b")


def test_unknown_names_come_with_the_nearest_or_with_all() -> None:
    known = ["Alpha-v0", "Alpha-v0-hard", "Beta-v1"]
    check_known("Beta-v1", known, kind="thing")
    with pytest.raises(ValueError, match=r"^Unknown thing: 'alpha'; nearest: Alpha-v0, Alpha-v0-hard$"):
        check_known("alpha", known, kind="thing")
    with pytest.raises(ValueError, match=r"^Unknown thing: 'zzz'; known: Alpha-v0, Alpha-v0-hard, Beta-v1$"):
        check_known("zzz", known, kind="thing")
    with pytest.raises(ValueError, match=r"known: .* and 10 more$"):
        check_known("zzz", [f"name{number}" for number in range(30)], kind="thing")


def test_columns_replace_arguments_that_are_given() -> None:
    assert override({"a": 1, "b": 2}, {"b": 3, "c": 4}) == {"a": 1, "b": 3}
