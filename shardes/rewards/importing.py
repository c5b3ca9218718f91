"""Import of reward functions by reference: ``package.module:function`` or ``path/to/file.py:function``."""

import contextlib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from shardes.tasks.base import RewardFunction


def import_functions(references: Sequence[str], *, kind: str = "function") -> list[RewardFunction]:
    """Import functions; a file that several references name is executed once.

    A file's directory comes first in the import path, as if Python had been started with the file, so that it
    can import its neighbours, and so can processes that a reward spawns. Files of two directories may both
    have a neighbour ``common.py``: while a file is imported, its own directory's counts.

    Args:
        references: The functions' references.
        kind: What they are, for messages: a class may be imported as well.

    Raises:
        ValueError: There is no such module, file or function, or importing it fails.
    """
    importer = _Importer(kind)
    # Those found by name go first, so that their files are known.
    in_order = sorted(dict.fromkeys(references), key=_is_file)
    functions = {reference: importer.function(reference) for reference in in_order}
    return [functions[reference] for reference in references]


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


def _is_file(reference: str) -> bool:
    return reference.rpartition(":")[0].endswith(".py")


class _Importer:
    """Importer of functions that are used in the same process."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._modules: dict[Path, ModuleType] = {}
        # By directory, the modules that were imported from it, by name.
        self._neighbours: dict[Path, dict[str, ModuleType]] = {}

    def function(self, reference: str) -> RewardFunction:
        """Import a function.

        Raises:
            ValueError: See ``import_functions``.
        """
        source, _, name = reference.rpartition(":")
        try:
            module = (
                self._module_of_file(Path(source).expanduser())
                if _is_file(reference)
                else _module_of_name(source)
            )
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{source} cannot be imported ({type(error).__name__}: {error}); give "
                f"package.module:{self._kind}, or path/to/file.py:{self._kind} relative to where the command "
                "is started"
            ) from None
        if (file := _file_of(module)) is not None:
            self._modules.setdefault(file, module)
        function = getattr(module, name, None)
        if not callable(function):
            raise ValueError(f"{source} has no {self._kind} {name!r}")
        return function

    def _module_of_file(self, path: Path) -> ModuleType:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        file = path.resolve()
        if file not in self._modules:
            _put_first(file.parent)
            name = _free_name(file)
            with self._own_neighbours(file.parent) as neighbours:
                self._modules[file] = neighbours[file.stem] = _execute(file, name)
        return self._modules[file]

    @contextlib.contextmanager
    def _own_neighbours(self, directory: Path) -> Iterator[dict[str, ModuleType]]:
        """Hide modules of other rewards' directories where this directory has, or had, its own."""
        own = self._neighbours.setdefault(directory, {})
        others = self._neighbours.keys() - {directory}
        names = {path.stem for path in directory.glob("*.py")} & sys.modules.keys() if others else set()
        known = {name: sys.modules[name] for name in names}
        hidden = {
            name: module
            for name, module in known.items()
            if (file := _file_of(module)) is not None and file.parent in others
        }
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(own)
        try:
            yield own
        finally:
            own.update({name: sys.modules[name] for name in hidden if name in sys.modules})
            sys.modules.update(hidden)


def _free_name(file: Path) -> str:
    """Return the name of a file's module; another than the file's if that is taken, as ``random`` is.

    A name with a dot would be that of a module in a package, which pickle then looks for.
    """
    known = sys.modules.get(file.stem)
    if "." not in file.stem and (known is None or _file_of(known) == file):
        return file.stem
    return f"{file.stem.replace('.', '_')}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"


def _execute(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_of_name(name: str) -> ModuleType:
    # A script's first import path is its own directory, but a user's module lies where the command starts.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _put_first(directory: Path) -> None:
    if str(directory) in sys.path:
        sys.path.remove(str(directory))
    sys.path.insert(0, str(directory))


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None
