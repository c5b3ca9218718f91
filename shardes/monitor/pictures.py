"""Shared by all pictures: their files, colours and axes."""

from pathlib import Path
from typing import Any

from shardes.errors import UserError
from shardes.utils.logs import printable

_FORMATS = (".png", ".svg")
# Okabe and Ito's palette: told apart with any colour vision. Markers repeat the distinction without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GREY = "#333333", "#777777"


def check_picture(out: Path) -> None:
    """Check that a picture can be drawn, before something expensive comes of it.

    Raises:
        UserError: The file's suffix is none of a picture, or matplotlib is missing.
    """
    if out.suffix.lower() not in _FORMATS:
        raise UserError(
            f"{out}: got the suffix {out.suffix!r}; name a file that ends in {' or '.join(_FORMATS)}"
        )
    check_matplotlib("plots need")


def check_matplotlib(who_needs: str) -> None:
    """Check that matplotlib is there.

    Args:
        who_needs: How the message begins.

    Raises:
        UserError: It is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(f"{who_needs} matplotlib ({error}); pip install 'shardes[plot]'") from None


def save_picture(figure: Any, out: Path) -> None:
    """Write a figure to a file, which is replaced if it exists.

    Raises:
        UserError: The file cannot be written.
    """
    # Written beside the picture and renamed, so that a reader never sees half of it.
    partial = out.with_name(f".{out.name}.partial")
    metadata = {"Date": None} if out.suffix.lower() == ".svg" else {}
    try:
        figure.savefig(partial, format=out.suffix.lower()[1:], metadata=metadata, facecolor="white")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{out} cannot be written: {error.strerror}; give a file in a directory that exists"
        ) from None


def style(axes: Any, *, labelsize: float | None = None) -> None:
    """Give axes a quiet grid and no frame."""
    axes.margins(x=0.015)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, **({} if labelsize is None else {"labelsize": labelsize}))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def shown(name: str, *, max_characters: int | None = None) -> str:
    """Return a name as matplotlib shows it: without formulas, and not left out."""
    text = printable(name[:max_characters]).encode(errors="replace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
