"""Tables, sizes and times as commands print them.

Tested by tests/unit/test_cli_tunnels.py.
"""

from collections.abc import Sequence

UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def render_size(count: float) -> str:
    """Return a number of bytes with its unit."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def render_age(seconds: float) -> str:
    """Return a time in its largest unit."""
    size, unit = next((unit for unit in UNITS if seconds >= unit[0]), UNITS[-1])
    return f"{seconds / size:.0f} {unit}"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
