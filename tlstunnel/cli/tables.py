"""Tables, numbers, sizes and times as commands print them.

Tested by tests/unit/test_cli_tunnels.py and tests/unit/test_cli_usage.py.
"""

from collections.abc import Collection, Sequence

UNKNOWN = "-"

_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def render_size(number: float) -> str:
    """Return a number of bytes in decimal units, as in the dashboard: 1.2 MB."""
    size, unit = number, "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def render_duration(seconds: float) -> str:
    """Return a time in its two largest units, as in the dashboard: 3 d 4 h."""
    whole = max(0, int(seconds))
    first = next((place for place, (size, _) in enumerate(_UNITS) if whole >= size), len(_UNITS) - 1)
    parts: list[str] = []
    for size, unit in _UNITS[first : first + 2]:
        number, whole = divmod(whole, size)
        if number or not parts:
            parts.append(f"{number} {unit}")
    return " ".join(parts)


def group(number: float | None) -> str:
    """Return a number with its digits grouped, as in the sentences of notices; a dash if it is not known."""
    return UNKNOWN if number is None else f"{number:,.0f}".replace(",", " ")


def count(number: int, one: str, several: str = "") -> str:
    """Return a number with its noun: "1 process", "2 processes". `several` is needed if it is not `one` with an s."""
    return f"{group(number)} {one if number == 1 else several or f'{one}s'}"


def align(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return lines with columns below each other. The columns `right`, from 0, are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines
