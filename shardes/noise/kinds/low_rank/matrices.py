"""The rule by which noise of low rank takes a parameter as matrices."""

from collections.abc import Sequence


def matrix_shape(shape: Sequence[int]) -> tuple[int, int, int] | None:
    """Return a parameter's shape as matrices: their number, rows and columns.

    Returns:
        Three numbers whose product is the parameter's size: [m, n] is one matrix, [e, m, n] are e of them
        (experts), each with factors of its own. None for a vector or a scalar, whose noise has full rank.

    Raises:
        ValueError: More than three dimensions.
    """
    if len(shape) > 3:
        raise ValueError(f"low-rank noise has no rule for a parameter of shape {list(shape)}")
    if len(shape) < 2:
        return None
    return (1, shape[0], shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2])
