"""Put files that are not in the package's folder into wheels; all else is in pyproject.toml."""

from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# What `shardes quickstart` copies; in an installed package it is in shardes/shipped.
SHIPPED = ("configs/quickstart.yaml", "configs/quickstart")


def _shipped_files() -> Iterator[Path]:
    for path in map(Path, SHIPPED):
        yield from sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]


class BuildWithShippedFiles(build_py):
    """Build the package with the shipped files in it."""

    def run(self) -> None:
        """Copy modules, and then the shipped files; an editable install has them where they are."""
        super().run()
        if not self.editable_mode:
            for source, target in self._copies():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_source_files(self) -> list[str]:
        """Return what a source distribution must have."""
        return [*super().get_source_files(), *map(str, _shipped_files())]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return the files that are made."""
        return [
            *super().get_outputs(include_bytecode),
            *(str(target) for _, target in self._copies() if not self.editable_mode),
        ]

    def _copies(self) -> Iterator[tuple[Path, Path]]:
        for source in _shipped_files():
            yield source, Path(self.build_lib) / "shardes" / "shipped" / source


setup(cmdclass={"build_py": BuildWithShippedFiles})
