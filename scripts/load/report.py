"""What a run found, as tables for a person, as JSON for a program, and as plots."""

import importlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.load.figures import Column, Figure


@dataclass(frozen=True, slots=True)
class Spread:
    """The rounds of one number."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The number to compare."""
        return statistics.median(self.rounds)

    def text(self, decimals: int, *, whole: bool) -> str:
        """`12.3`, or `12.3 (11.9-13.0)` when `whole`."""
        text = f"{self.median:.{decimals}f}"
        if whole and len(self.rounds) > 1:
            text += f" ({min(self.rounds):.{decimals}f}-{max(self.rounds):.{decimals}f})"
        return text


# figure -> subject -> column -> its rounds
Results = dict[str, dict[str, dict[str, Spread]]]


def best_peer(column: Column, subjects: dict[str, dict[str, Spread]], peers: set[str]) -> float | None:
    """The best median among the peers."""
    medians = [spreads[column.name].median for name, spreads in subjects.items() if name in peers]
    if not medians:
        return None
    return min(medians) if column.lower_is_better else max(medians)


def ratio(column: Column, ours: float, best: float | None) -> float | None:
    """How good a number is beside the best peer's: above 1 is better than every peer."""
    if best is None or ours <= 0 or best <= 0:
        return None
    return best / ours if column.lower_is_better else ours / best


def table(figure: Figure, subjects: dict[str, dict[str, Spread]], peers: set[str]) -> str:
    """One figure: a line a subject, the main column first, with its spread and its ratio to the best peer."""
    main = figure.columns[0]
    best = best_peer(main, subjects, peers)
    rows = [["", main.label, *(["x best peer"] if best else []), *(column.label for column in figure.columns[1:])]]
    for name, spreads in subjects.items():
        found = ratio(main, spreads[main.name].median, best)
        rows.append(
            [
                name,
                spreads[main.name].text(main.decimals, whole=True),
                *([f"{found:.2f}" if found else "-"] if best else []),
                *(spreads[column.name].text(column.decimals, whole=False) for column in figure.columns[1:]),
            ]
        )
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([figure.title, *("  " + line.rstrip() for line in lines)])


def as_json(figures: list[Figure], results: Results, peers: set[str]) -> dict[str, Any]:
    """All figures, with medians, extremes, ratios to the best peer, and each round."""
    found = {}
    for figure in figures:
        subjects = results.get(figure.name, {})
        found[figure.name] = {
            "title": figure.title,
            "columns": {
                column.name: {
                    "label": column.label,
                    "lower_is_better": column.lower_is_better,
                    "subjects": {
                        name: {
                            "median": spreads[column.name].median,
                            "low": min(spreads[column.name].rounds),
                            "high": max(spreads[column.name].rounds),
                            "ratio_to_best_peer": ratio(
                                column, spreads[column.name].median, best_peer(column, subjects, peers)
                            ),
                            "rounds": spreads[column.name].rounds,
                        }
                        for name, spreads in subjects.items()
                    },
                }
                for column in figure.columns
            },
        }
    return found


def save(folder: Path, content: dict[str, Any]) -> Path:
    """Write the JSON file; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bench.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def plot(folder: Path, figures: list[Figure], results: Results) -> None:
    """Draw the main column of every figure, a bar a subject with its spread, as PNG and SVG; needs matplotlib."""
    plt = importlib.import_module("matplotlib.pyplot")
    for figure in figures:
        subjects = results.get(figure.name, {})
        if not subjects:
            continue
        main = figure.columns[0]
        spreads = [columns[main.name] for columns in subjects.values()]
        medians = [spread.median for spread in spreads]
        low = [spread.median - min(spread.rounds) for spread in spreads]
        high = [max(spread.rounds) - spread.median for spread in spreads]
        drawing, axes = plt.subplots(figsize=(7, 0.5 * len(subjects) + 1.2), layout="constrained")
        bars = axes.barh(list(subjects), medians, xerr=[low, high], color="#4c78a8", ecolor="#555555", capsize=3)
        axes.bar_label(bars, [f" {median:.{main.decimals}f}" for median in medians], padding=8)
        axes.invert_yaxis()
        axes.set_xlabel(main.label)
        axes.set_title(figure.title)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
        for kind in ("png", "svg"):
            drawing.savefig(folder / f"{figure.name}.{kind}", dpi=150)
        plt.close(drawing)
