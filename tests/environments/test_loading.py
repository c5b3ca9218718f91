"""Environments made of what the configuration names, or refused with one message."""

import os
import subprocess
import sys

import pytest

from shardes.environments.base import EnvironmentSpec
from shardes.environments.loading import make_factory
from tests.helpers.ranks import ROOT

FILE = "tests/helpers/hostile_environments.py"


@pytest.mark.parametrize(
    ("reference", "columns", "required"),
    [
        (f"{FILE}:Keen", ["a", "b"], ["a"]),
        ("tests.helpers.hostile_environments:Keen", ["a", "b"], ["a"]),
        (f"{FILE}:make", ["a", "b"], ["a"]),
        (f"{FILE}:Any", None, []),
        (f"{FILE}:Hostile", ["start", "do"], ["start"]),
    ],
)
def test_a_class_or_a_function_makes_environments(reference, columns, required):
    factory = make_factory(EnvironmentSpec(reference))
    assert (factory.columns, factory.required, factory.tools) == (columns, required, None)
    first, second = factory.make(), factory.make()
    assert first is not second
    assert type(first) is type(second)


def test_arguments_reach_the_class():
    spec = EnvironmentSpec(f"{FILE}:Keen", {"scale": 3.0})
    assert make_factory(spec).make().scale == 3.0
    assert make_factory(EnvironmentSpec(f"{FILE}:make", {"scale": 3.0})).make().scale == 3.0


@pytest.mark.parametrize(
    ("reference", "arguments", "message"),
    [
        (f"{FILE}:Nobody", {}, f"{FILE} has no class 'Nobody'"),
        (f"{FILE}:NUMBER", {}, f"{FILE} has no class 'NUMBER'"),
        (
            "nowhere.py:X",
            {},
            "nowhere.py cannot be imported (FileNotFoundError: no file nowhere.py); give",
        ),
        ("no_such_module:X", {}, "no_such_module cannot be imported (ModuleNotFoundError: "),
        ("textarenas:X", {}, "; or is the adapter 'textarena' meant?"),
        ("nothing", {}, "'nothing' is no environment; give package.module:Class, path/to/file.py:Class or A"),
        (f"{FILE}:NoStep", {}, f"{FILE}:NoStep has no method step; an environment is a class with reset(**r"),
        (f"{FILE}:NoReset", {}, f"{FILE}:NoReset has no method reset; an environment is a class with"),
        (f"{FILE}:ByPosition", {}, "reset takes 'row' by position; columns are passed by name"),
        (f"{FILE}:broken", {}, f"{FILE}:broken raised RuntimeError: no such thing"),
        (f"{FILE}:shapeless", {}, f"what {FILE}:shapeless returns, NoReset, has no method reset; an env"),
        (
            f"{FILE}:Keen",
            {"sale": 1},
            f"task.environment_arguments: {FILE}:Keen: got an unexpected keyword argument 'sale'; it takes "
            "(scale=1.0)",
        ),
    ],
)
def test_what_is_no_environment_is_refused(reference, arguments, message):
    with pytest.raises(ValueError) as caught:
        make_factory(EnvironmentSpec(reference, arguments))
    assert message in str(caught.value)


def test_nothing_heavy_is_imported_by_the_processes():
    heavy = "{'torch', 'numpy', 'pydantic', 'transformers'}"
    code = f"import sys, shardes.environments.worker; print(sorted({heavy} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert output.stdout == "[]\n"
