"""Numbers formatted for people."""


def shown_bytes(num_bytes: float) -> str:
    """Format bytes in the largest unit that gives 1 or more; memory up to 10 TiB in GiB."""
    if num_bytes < 1024:
        return f"{num_bytes:.0f} B"
    if num_bytes < 1024**2:
        return f"{num_bytes / 1024:.1f} KiB"
    if num_bytes < 1024**3:
        return f"{num_bytes / 1024**2:.1f} MiB"
    if num_bytes < 10 * 1024**4:
        return f"{num_bytes / 1024**3:.2f} GiB"
    return f"{num_bytes / 1024**4:.1f} TiB"


def shown_seconds(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shown_number(value: float | None) -> str:
    """Format a reward or another number with four decimals; one that is not known as ``none``."""
    return "none" if value is None else f"{value:.4f}"


def shown_count(number: int) -> str:
    """Format a count, in billions from 100 million on."""
    return f"{number / 1e9:.4g} billion" if number >= 10**8 else f"{number:,}"
