"""The figures of tools/structure.py on small packages whose figures are known."""

import json
import re
import sys

import pytest

from tests.helpers.ranks import ROOT, run_command
from tools import structure


@pytest.fixture
def package(tmp_path):
    """Write a package of the given sources by path, and read it."""

    def write(sources):
        for path, source in {"__init__.py": "", **sources}.items():
            file = tmp_path / "pkg" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        return structure.read_package(tmp_path / "pkg")

    return write


def eager_cycles(modules):
    return structure.measure(modules)["import cycles, eager"]


LAZY = "def f():\n    if True:\n        import pkg.a\n"
METHOD = "class C:\n    async def f(self):\n        from pkg.a import x\n"
TYPING = "import typing\nif typing.TYPE_CHECKING:\n    from .a import x\n"
GUARDED = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a\n"


@pytest.mark.parametrize("source", [LAZY, METHOD, TYPING, GUARDED])
def test_a_cycle_through_an_import_that_is_not_eager_is_found(package, source):
    modules = package({"a.py": "import pkg.b\nx = 1\n", "b.py": source, "c.py": "import pkg.a, pkg.b\n"})
    figures = structure.measure(modules)
    assert figures["import cycles, lazy and typing too"] == [["pkg.a", "pkg.b"]]
    assert figures["import cycles, eager"] == []
    assert [line for line in structure.violations(modules) if "cycle" in line] == [
        "1 import cycles, lazy and typing too, allowed 0: pkg.a - pkg.b"
    ]


@pytest.mark.parametrize(
    "source",
    [
        "from pkg.a import x\n",
        "class C:\n    from .a import x\n",
        "try:\n    from . import a\nexcept ImportError:\n    pass\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import pkg.a as other\n",
    ],
)
def test_an_import_that_runs_with_the_module_is_eager(package, source):
    modules = package({"a.py": "from pkg import b\n", "b.py": source})
    assert eager_cycles(modules) == [["pkg.a", "pkg.b"]]


def test_cycles_are_separate_and_the_largest_is_first(package):
    modules = package(
        {
            "a.py": "import pkg.b",
            "b.py": "import pkg.a",
            "c.py": "import pkg.d, pkg.a",
            "d.py": "import pkg.e",
            "e.py": "import pkg.c",
            "f.py": "import pkg.f",
        }
    )
    assert eager_cycles(modules) == [["pkg.c", "pkg.d", "pkg.e"], ["pkg.a", "pkg.b"]]


def test_a_package_stands_for_its_init_and_names_in_strings_are_no_imports(package):
    modules = package(
        {
            "__init__.py": '__version__ = "1"\n_LAZY = {"A": "pkg.sub.a"}\n',
            "sub/__init__.py": "from .a import x\n",
            "sub/a.py": "from pkg import __version__\nfrom ..top import y\nimport os, pkg.sub.b\nx = 1\n",
            "sub/b.py": "",
            "top.py": "from pkg.sub import x\nfrom pkg.sub import a\ny = 1\n",
        }
    )
    assert {module.name: set(module.eager) for module in modules} == {
        "pkg": set(),
        "pkg.sub": {"pkg.sub.a"},
        "pkg.sub.a": {"pkg", "pkg.top", "pkg.sub.b"},
        "pkg.sub.b": set(),
        "pkg.top": {"pkg.sub", "pkg.sub.a"},
    }
    assert [module.name for module in modules if module.is_loose] == ["pkg.top"]
    assert structure.measure(modules)["largest fan-outs"] == {"pkg.sub.a": 3, "pkg.top": 2, "pkg.sub": 1}


SOURCE = '''"""A module.

Of four lines.
"""

import os  # counts

# does not count


class C:
    """A class."""

    size: int = 1
    """Bytes."""

    @property
    def text(self):
        """Return text."""

        return """two

        lines""" + (
            "x"
        )


def one(): "Return nothing."
'''


def test_code_lines_are_those_without_docstrings_comments_and_blank_lines(package):
    # import, class, size, decorator, def, five of the return, and the function of one line.
    assert structure.count_code_lines(SOURCE) == 11
    modules = package({"a.py": SOURCE, "b.py": "x = 1\n\n\ny = 2\n"})
    figures = structure.measure(modules)
    assert figures["code lines"] == 13
    assert figures["median module, lines"] == 4  # of 0, 4 and 28
    assert figures["largest module, lines"] == {"pkg.a": 28}
    assert figures["longest function, lines"] == {"pkg.a:C.text": 8}
    assert figures["docstring coverage"] == (3, 3)
    assert figures["docstring coverage of modules"] == (1, 3)


def test_docstrings_are_counted_by_their_first_words(package):
    docstrings = [
        "What it is.",
        "``how`` it is.",
        "Whatever it is.",
        "Return what it is.",
        "Both.",
        "Both. Too.",
    ]
    functions = [f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings)]
    modules = package({"a.py": '"""Where it is."""\n' + "".join(functions) + "def g():\n    pass\n"})
    figures = structure.measure(modules)
    assert figures["docstring coverage"] == (6, 7)
    assert figures["interrogative docstrings"] == (2, 6)
    assert figures["interrogative docstrings of modules"] == (1, 1)
    assert figures["interrogative first words"] == {"what": 1, "how": 1}
    assert figures["placeholder docstrings"] == 1
    assert structure.violations(modules) == [
        "3 interrogative docstrings, allowed 0: pkg.a, pkg.a:f0, pkg.a:f1",
        "1 placeholder docstrings, allowed 0: pkg.a:f4",
    ]


def test_limits_are_exceeded_by_one_more_and_not_before(package):
    asking = 'def f():\n    """How."""\n'
    telling = 'def f():\n    """Return."""\n' * 49
    within = {f"m{i}.py": "" for i in range(5)} | {
        "sub/a.py": "x = 1\n" * structure.MAX_MODULE_LINES,
        "sub/b.py": "def long():\n" + "    pass\n" * (structure.MAX_FUNCTION_LINES - 1),
        "__main__.py": asking + telling,
    }
    assert structure.violations(package(within)) == []
    beyond = {
        name: source + "    pass\n" if name == "sub/b.py" else source for name, source in within.items()
    }
    beyond |= {"sub/a.py": within["sub/a.py"] + "x = 1\n", "m5.py": "", "m0.py": asking}
    assert structure.violations(package(beyond)) == [
        "7 modules loose in the package root, allowed 6: "
        "pkg.__main__, pkg.m0, pkg.m1, pkg.m2, pkg.m3, pkg.m4, pkg.m5",
        "2 interrogative docstrings, allowed 1: pkg.__main__:f, pkg.m0:f",
        "1 modules of over 450 lines, allowed 0: pkg.sub.a",
        "1 functions of over 90 lines, allowed 0: pkg.sub.b:long",
    ]


def test_the_command_prints_a_table_or_json_and_fails_only_where_it_checks(package, tmp_path):
    package({"a.py": "import pkg.b\n", "b.py": "import pkg.a\n"})
    command = [sys.executable, "tools/structure.py", tmp_path / "pkg"]
    shown, written, checked = (run_command([*command, *more]) for more in ([], ["--json"], ["--check"]))
    assert [shown.returncode, written.returncode, checked.returncode] == [0, 0, 1]
    assert "2 modules: pkg.a, pkg.b" in shown.stdout
    assert json.loads(written.stdout)["import cycles, eager"] == [["pkg.a", "pkg.b"]]
    assert checked.stdout == "1 import cycles, lazy and typing too, allowed 0: pkg.a - pkg.b\n"
    package({"b.py": ""})
    assert run_command([*command, "--check"]).returncode == 0


@pytest.mark.parametrize("folder", ["noise", "es"])
def test_the_core_knows_no_ranks(folder):
    """lint-imports sees torch as one package, so torch.distributed is looked for here."""
    paths = sorted((ROOT / "shardes" / folder).rglob("*.py"))
    assert paths
    assert [
        path for path in paths if re.search(r"torch\.distributed|import distributed", path.read_text())
    ] == []
