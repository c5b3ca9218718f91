"""Import of reward functions by reference: ``package.module:function`` or ``path/to/file.py:function``."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType

from shardes.tasks.base import RewardFunction


def import_functions(references: Sequence[str]) -> list[RewardFunction]:
    """Import functions; a file that several references name is executed once.

    A file's directory comes first in the import path, as if Python had been started with the file, so that it
    can import its neighbours, and so can processes that a reward spawns.

    Raises:
        ValueError: There is no such module, file or function, or importing it fails.
    """
    # Modules by their file; those found by name go first, so that their files are known.
    modules: dict[Path, ModuleType] = {}
    functions: dict[str, RewardFunction] = {}
    for reference in sorted(set(references), key=_is_file):
        functions[reference] = _import_function(reference, modules)
    return [functions[reference] for reference in references]


def import_function(reference: str) -> RewardFunction:
    """Import one function; see ``import_functions``."""
    return import_functions([reference])[0]


def _is_file(reference: str) -> bool:
    return reference.rpartition(":")[0].endswith(".py")


def _import_function(reference: str, modules: dict[Path, ModuleType]) -> RewardFunction:
    source, _, name = reference.rpartition(":")
    try:
        module = _module_of_file(Path(source), modules) if _is_file(reference) else _module_of_name(source)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{source} cannot be imported ({type(error).__name__}: {error}); give package.module:function, "
            "or path/to/file.py:function relative to where the command is started"
        ) from None
    if isinstance(file := getattr(module, "__file__", None), str):
        modules.setdefault(Path(file).resolve(), module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{source} has no function {name!r}")
    return function


def reference_of(function: RewardFunction | str) -> str:
    """Return the reference, ``module:function``, by which another process finds a function.

    Raises:
        ValueError: It is not at the top level of a module that can be imported.
    """
    if isinstance(function, str):
        return function
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", None)
    if module in (None, "__main__") or not name.isidentifier():
        raise ValueError(
            f"{function!r} is not a function at the top level of a module, so no other process can find it"
        )
    return f"{module}:{name}"


def _module_of_name(name: str) -> ModuleType:
    # A script's first import path is its own directory, but a user's module lies where the command starts.
    _put_first(Path.cwd(), only_if_missing=True)
    return importlib.import_module(name)


def _module_of_file(path: Path, modules: dict[Path, ModuleType]) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    file = path.resolve()
    if file in modules:
        return modules[file]
    _put_first(file.parent)
    others = {known.parent for known in modules} - {file.parent}
    _forget_namesakes(file.parent, others, kept=modules.values())
    name = path.stem
    taken = sys.modules.get(name)
    if taken is not None and getattr(taken, "__file__", None) != str(file):
        # Such as a file random.py, which must not replace Python's.
        name = f"{name}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    modules[file] = sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del modules[file], sys.modules[name]
        raise
    return module


def _put_first(directory: Path, *, only_if_missing: bool = False) -> None:
    if str(directory) in sys.path:
        if only_if_missing:
            return
        sys.path.remove(str(directory))
    sys.path.insert(0, str(directory))


def _is_of_reward(module: ModuleType, directories: set[Path]) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).resolve().parent in directories


def _forget_namesakes(directory: Path, others: set[Path], *, kept: Collection[ModuleType]) -> None:
    """Forget modules that were imported from other rewards' directories, where this directory has its own.

    Two rewards may both have a neighbour ``common.py``; each gets its own.
    """
    for name, module in list(sys.modules.items()):
        if module not in kept and _is_of_reward(module, others) and (directory / f"{name}.py").is_file():
            del sys.modules[name]
