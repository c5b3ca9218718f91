"""Files that come with the package and are not modules: the quickstart's."""

import shutil
from pathlib import Path

from shardes.errors import UserError

_PACKAGE = Path(__file__).parents[1]
_QUICKSTART = ("configs/quickstart.yaml", "configs/quickstart")


def _root() -> Path:
    """Return the directory that has them: within an installed package, or the root of a checkout."""
    installed = _PACKAGE / "shipped"
    return installed if installed.is_dir() else _PACKAGE.parent


def copy_quickstart(directory: Path) -> list[Path]:
    """Copy the quickstart's files into a directory, at the places that its configuration names.

    A file that is there already is left as it is.

    Args:
        directory: Where training will be started; made if there is none.

    Returns:
        The files, relative to the directory.

    Raises:
        UserError: One of the files is there with another content, or cannot be written, or this
            installation has none of them.
    """
    root = _root()
    files = [
        found.relative_to(root)
        for path in _QUICKSTART
        for found in sorted([root / path, *(root / path).rglob("*")])
        if found.is_file()
    ]
    if not files:
        raise UserError(
            f"the quickstart's files are not part of this installation (looked for in {root}); install a "
            "wheel of shardes, or start in a checkout, which has them in configs/"
        )
    for file in files:
        target = directory / file
        if target.exists() and not _is_same(root / file, target):
            raise UserError(
                f"{target}: another file has this name; give an empty directory: shardes quickstart DIR"
            )
    try:
        for file in files:
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            if not (directory / file).exists():
                shutil.copyfile(root / file, directory / file)
    except OSError as error:
        raise UserError(
            f"{error.filename or directory} cannot be written ({error.strerror}); give another directory: "
            "shardes quickstart DIR"
        ) from None
    return files


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()
