"""Measure how the package is laid out: sizes, docstrings and imports, from the source alone.

    python tools/structure.py                 # a table
    python tools/structure.py --json          # the same figures for a program
    python tools/structure.py --check         # exit status 1, and one line for each limit that is exceeded
    python tools/structure.py ROOT            # another checkout, or the folder of any package

An import is an edge between two modules of the package. ``from a.b import c`` leads to ``a.b.c`` if that is
a module and to ``a.b`` otherwise, where a package stands for its ``__init__``. Not counted: that Python runs
the ``__init__`` of each enclosing package first, and modules that are named in strings.
"""

import argparse
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERROGATIVES = ("what", "which", "how", "whether", "where", "when", "who", "whose", "whom", "why")
PLACEHOLDERS = ("The same.", "Both.")
MAX_LOOSE_MODULES = 6
MAX_INTERROGATIVE_SHARE = 0.02
MAX_MODULE_LINES = 450
MAX_FUNCTION_LINES = 90

_LAYOUT = {getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}
_TYPING = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Import = ast.Import | ast.ImportFrom


@dataclass(frozen=True)
class Unit:
    """Module, class or function, named ``module:Class.method``; decorators are not among its lines."""

    kind: str
    name: str
    num_lines: int
    docstring: str | None


@dataclass(frozen=True)
class Module:
    """Module of the package, by its dotted name.

    Attributes:
        is_loose: True if it lies in the package's own folder and is not its ``__init__``.
        units: The module itself, then its classes and functions, nested ones too.
        eager: Other modules of the package that importing this one imports.
        imported: ``eager`` and those imported in functions or under ``TYPE_CHECKING``.
    """

    name: str
    is_loose: bool
    num_code_lines: int
    units: tuple[Unit, ...]
    eager: frozenset[str]
    imported: frozenset[str]


def read_package(package: Path) -> list[Module]:
    """Read the modules of the package in a folder, sorted by path."""
    paths: dict[str, Path] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return [_read_module(name, path, package=package, names=paths) for name, path in paths.items()]


def _read_module(name: str, path: Path, *, package: Path, names: Collection[str]) -> Module:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=str(path))
    is_init = path.name == "__init__.py"
    parent = name if is_init else name.rpartition(".")[0]
    statements = _imports(tree, is_eager=True)
    edges = {(to, eager) for node, eager in statements for to in _targets(node, parent=parent, names=names)}
    itself = Unit("module", name, len(source.splitlines()), ast.get_docstring(tree))
    return Module(
        name=name,
        is_loose=path.parent == package and not is_init,
        num_code_lines=count_code_lines(source),
        units=(itself, *_definitions(tree, prefix=f"{name}:")),
        eager=frozenset(target for target, is_eager in edges if is_eager and target != name),
        imported=frozenset(target for target, _ in edges if target != name),
    )


def count_code_lines(source: str) -> int:
    """Count the lines without docstrings (of attributes too), comments and blank lines."""
    documenting = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in documenting
        if token.type not in _LAYOUT and not is_docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


def _definitions(node: ast.AST, *, prefix: str) -> Iterator[Unit]:
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, (ast.ClassDef, *_FUNCTIONS)):
            kind = "function" if isinstance(child, _FUNCTIONS) else "class"
            num_lines = (child.end_lineno or child.lineno) - child.lineno + 1
            yield Unit(kind, prefix + child.name, num_lines, ast.get_docstring(child))
            inner = f"{prefix}{child.name}."
        yield from _definitions(child, prefix=inner)


def _imports(node: ast.AST, *, is_eager: bool) -> Iterator[tuple[_Import, bool]]:
    """Yield the import statements of a tree, each with True if it runs when the module is imported."""
    if isinstance(node, _Import):
        yield node, is_eager
    typing_only = node.body if isinstance(node, ast.If) and ast.unparse(node.test) in _TYPING else []
    for child in ast.iter_child_nodes(node):
        runs = is_eager and not isinstance(node, _FUNCTIONS) and child not in typing_only
        yield from _imports(child, is_eager=runs)


def _targets(node: _Import, *, parent: str, names: Collection[str]) -> Iterator[str]:
    """Yield the modules of the package that a statement of a module in package ``parent`` imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in names)
        return
    levels = parent.split(".")[: 1 - node.level or None] if node.level else []
    base = ".".join([*levels, *filter(None, [node.module])])
    for alias in node.names:
        yield from [name for name in (f"{base}.{alias.name}", base) if name in names][:1]


def import_cycles(edges: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Return the modules of each import cycle (strongly connected component), the largest cycle first."""
    reached = {name: set(targets) for name, targets in edges.items()}
    for via in edges:
        for targets in reached.values():
            if via in targets:
                targets |= reached[via]
    cycles = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in edges if a in reached[a]}
    return sorted(map(list, cycles), key=lambda cycle: (-len(cycle), cycle))


def first_word(docstring: str) -> str:
    """Return the first word of a docstring in lower case, without quotes and markup; "" if it has none."""
    match = re.search(r"[^\W_]+", docstring)
    return match[0].lower() if match else ""


def measure(modules: list[Module]) -> dict[str, Any]:
    """Compute the figures of a package, by what the table calls them; a pair is a part and its whole."""
    units = [unit for module in modules for unit in module.units]
    files = [unit for unit in units if unit.kind == "module"]
    definitions = [unit for unit in units if unit.kind != "module"]
    lengths = [(unit.name, unit.num_lines) for unit in units if unit.kind == "function"]
    words = Counter(first_word(unit.docstring) for unit in definitions if unit.docstring)
    titles = Counter(first_word(file.docstring) for file in files if file.docstring)
    return {
        "modules": len(modules),
        "modules loose in the package root": sum(module.is_loose for module in modules),
        "code lines": sum(module.num_code_lines for module in modules),
        "median module, lines": statistics.median(file.num_lines for file in files),
        "largest module, lines": _largest([(file.name, file.num_lines) for file in files], 1),
        "longest function, lines": _largest(lengths, 1),
        "docstring coverage": (words.total(), len(definitions)),
        "docstring coverage of modules": (titles.total(), len(files)),
        "interrogative docstrings": (sum(words[word] for word in INTERROGATIVES), words.total()),
        "interrogative docstrings of modules": (sum(titles[word] for word in INTERROGATIVES), titles.total()),
        "interrogative first words": {word: words[word] for word in INTERROGATIVES if word in words},
        "placeholder docstrings": sum(unit.docstring in PLACEHOLDERS for unit in units),
        "import cycles, eager": import_cycles({m.name: m.eager for m in modules}),
        "import cycles, lazy and typing too": import_cycles({m.name: m.imported for m in modules}),
        "largest fan-outs": _largest([(m.name, len(m.imported)) for m in modules], 3),
    }


def _largest(sizes: list[tuple[str, int]], count: int) -> dict[str, int]:
    return dict(sorted(sizes, key=lambda size: -size[1])[:count])


def violations(modules: list[Module]) -> list[str]:
    """Return a line for each limit that a package exceeds, with the names of what exceeds it."""
    units = [unit for module in modules for unit in module.units]
    documented = [unit for unit in units if unit.docstring]
    asking = [unit.name for unit in units if first_word(unit.docstring or "") in INTERROGATIVES]
    cycles = import_cycles({module.name: module.imported for module in modules})
    found = [
        ("import cycles, lazy and typing too", 0, [" - ".join(cycle) for cycle in cycles]),
        ("modules loose in the package root", MAX_LOOSE_MODULES, [m.name for m in modules if m.is_loose]),
        ("interrogative docstrings", int(MAX_INTERROGATIVE_SHARE * len(documented)), asking),
        ("placeholder docstrings", 0, [unit.name for unit in documented if unit.docstring in PLACEHOLDERS]),
    ]
    for kind, limit in (("module", MAX_MODULE_LINES), ("function", MAX_FUNCTION_LINES)):
        long = [unit.name for unit in units if unit.kind == kind and unit.num_lines > limit]
        found.append((f"{kind}s of over {limit} lines", 0, long))
    return [
        f"{len(names)} {subject}, allowed {allowed}: {', '.join(names[:10])}{', ...' * (len(names) > 10)}"
        for subject, allowed, names in found
        if len(names) > allowed
    ]


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]} of {value[1]} ({value[0] / max(value[1], 1):.1%})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, list):
        return "; ".join(f"{len(cycle)} modules: {', '.join(cycle)}" for cycle in value) or "0"
    return str(value)


def main() -> int:
    """Measure the package that the command line names; return the exit status."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--check", action="store_true", help="print only the limits that are exceeded")
    arguments = parser.parse_args()
    package = arguments.root.resolve()
    package = package / "shardes" if (package / "shardes").is_dir() else package
    modules = read_package(package)
    if not modules:
        parser.error(f"no Python files under {package}")
    if arguments.check:
        exceeded = violations(modules)
        print("\n".join(exceeded) or "no limit is exceeded")
        return 1 if exceeded else 0
    figures = measure(modules)
    lines = [f"{name:<38}{_shown(value)}" for name, value in figures.items()]
    print(json.dumps(figures, indent=2) if arguments.json else "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
