"""Selection of the parameters that are trained."""

import difflib
import re
from collections.abc import Collection, Sequence

from shardes.errors import UserError


def select_trainable(
    names: Collection[str], patterns: Sequence[str], *, aliases: Collection[str] = ()
) -> frozenset[str]:
    """Return the names that ``es.trainable`` selects.

    Args:
        names: Names of the model's parameters, each tied weight once.
        patterns: Regular expressions for whole names; the last that matches a name decides, and one with a
            ``!`` before it freezes.
        aliases: Further names of tied weights, to explain why one of them does not match.

    Raises:
        UserError: A pattern matches no name, or nothing is left to train.
    """
    trained: set[str] = set()
    for pattern in patterns:
        matching = {name for name in names if re.fullmatch(pattern.removeprefix("!"), name)}
        if not matching:
            hint = _hint(pattern, names, aliases)
            raise UserError(f"es.trainable: {pattern!r} matches no parameter; {hint}")
        if pattern.startswith("!"):
            trained -= matching
        else:
            trained |= matching
    if not trained:
        raise UserError(
            f"es.trainable: {list(patterns)} leaves nothing to train; patterns with '!' take away from those "
            "before them, so begin with '.*' to train all but some"
        )
    return frozenset(trained)


def _hint(pattern: str, names: Collection[str], aliases: Collection[str]) -> str:
    """Return a hint at the names that the user may have meant."""
    wanted = pattern.removeprefix("!")
    tied = sorted(alias for alias in aliases if re.fullmatch(wanted, alias))
    if tied:
        return f"{tied[0]} is tied to another parameter, whose name is the one to give"
    inside = sorted(name for name in names if re.search(wanted, name))
    if inside:
        return f"a pattern must match the whole name, for example {inside[0]}: try {'.*' + wanted + '.*'!r}"
    plain = wanted.replace("\\", "").replace(".*", "")

    def length_in_common(name: str) -> int:
        return difflib.SequenceMatcher(None, plain, name, autojunk=False).find_longest_match().size

    near = sorted(names, key=lambda name: (-length_in_common(name), name))[:3]
    return f"names near it: {', '.join(near)}"
