"""Names of the kinds of noise; imports a kind when it is asked for, so that the configuration stays light."""

import importlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from shardes.noise.kinds.base import NoiseKind

# ``es.noise``. The kind NAME is defined in the folder shardes/noise/kinds/NAME.
KindName = Literal["gaussian", "rademacher", "low_rank"]


def make_kind(name: KindName, *, rank: int = 1, num_parts: int = 1) -> "NoiseKind":
    """Return the kind of noise called ``name``.

    Args:
        name: Value of ``es.noise``.
        rank: Columns of the factors of low-rank noise; other kinds ignore it.
        num_parts: Parts of the parameters, of which a direction's noise covers one; not for low-rank noise.
    """
    kind: NoiseKind = importlib.import_module(f"shardes.noise.kinds.{name}").make(
        rank=rank, num_parts=num_parts
    )
    return kind
