"""The results of a run: as JSON for programs, as tables for a terminal, and as Markdown for docs/performance.md.

Tables and plots are made from the JSON only, so that they can be made again from a committed file.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scripts.load import budgets
from scripts.load.figures import BUSY, Column, Figure
from scripts.load.running import BenchError

Content = dict[str, Any]
"""A run, as in its JSON file."""

# figure -> subject -> column -> its rounds
Rounds = dict[str, dict[str, dict[str, list[float]]]]

OURS = "tlstunnel"
BEGIN, END = "<!-- figures: scripts/bench --report writes what is between these lines -->", "<!-- end of figures -->"


def best_peer(column: Column, subjects: dict[str, dict[str, list[float]]], peers: set[str]) -> float | None:
    """The best median among the peers."""
    medians = [statistics.median(rounds[column.name]) for name, rounds in subjects.items() if name in peers]
    if not medians:
        return None
    return min(medians) if column.lower_is_better else max(medians)


def ratio(column: Column, ours: float, best: float | None) -> float | None:
    """How good a number is beside the best peer's: above 1 is better than every peer."""
    if best is None or ours <= 0 or best <= 0:
        return None
    return best / ours if column.lower_is_better else ours / best


def to_json(figures: Sequence[Figure], found: Rounds, peers: set[str]) -> Content:
    """All figures, with medians, extremes, ratios to the best peer, and each round."""
    return {
        figure.name: {
            "title": figure.title,
            "group": figure.group,
            "columns": {
                column.name: {
                    **{name: value for name, value in asdict(column).items() if name != "name"},
                    "subjects": {
                        name: {
                            "median": (median := statistics.median(rounds[column.name])),
                            "low": min(rounds[column.name]),
                            "high": max(rounds[column.name]),
                            "ratio_to_best_peer": ratio(
                                column, median, best_peer(column, found.get(figure.name, {}), peers)
                            ),
                            "rounds": rounds[column.name],
                        }
                        for name, rounds in found.get(figure.name, {}).items()
                    },
                }
                for column in figure.columns
            },
        }
        for figure in figures
    }


def save(path: Path, content: Content) -> None:
    """Write a JSON file, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> Content:
    """Read what `save` wrote. Raises BenchError."""
    try:
        content: Content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: {error}") from None
    return content


# ---- for a terminal ----


def render_text(content: Content) -> Iterator[str]:
    """Yield a table for each figure, with a row for each subject. The main column has its range, and the ratio."""
    for figure in content["figures"].values():
        columns = list(figure["columns"].values())
        main, others = columns[0], columns[1:]
        compared = any(found["ratio_to_best_peer"] for found in main["subjects"].values())
        rows = [["", main["label"], *(["x best peer"] if compared else []), *(column["label"] for column in others)]]
        for name, found in main["subjects"].items():
            beside = [_render_ratio(found)] if compared else []
            rest = [_render_number(column["subjects"][name]["median"], column["decimals"]) for column in others]
            rows.append([name, _render_spread(found, main["decimals"]), *beside, *rest])
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        yield "\n".join([figure["title"], *("  " + line.rstrip() for line in lines)])


def _render_number(value: float, decimals: int) -> str:
    """Return a number with digits in groups of three, separated by narrow no-break spaces."""
    return f"{value:,.{decimals}f}".replace(",", "\u202f")


def _render_spread(found: Content, decimals: int) -> str:
    text = _render_number(found["median"], decimals)
    if len(found["rounds"]) > 1:
        text += f" ({_render_number(found['low'], decimals)}-{_render_number(found['high'], decimals)})"
    return text


def _render_ratio(found: Content) -> str:
    return f"{found['ratio_to_best_peer']:.2f}" if found["ratio_to_best_peer"] else "-"


# ---- Markdown ----


def render_markdown(content: Content) -> str:
    """Return the conditions of the run, the budgets, a table for each kind of figure, and the headroom of the load."""
    subjects = list(content["subjects"])
    parts = [_render_run(content), _render_budgets(content)]
    groups = dict.fromkeys(figure["group"] for figure in content["figures"].values())
    for group in groups:
        figures = [figure for figure in content["figures"].values() if figure["group"] == group]
        parts.append(f"### {GROUP_TITLES[group]}")
        parts.append(_render_group(group, figures, subjects))
    parts.append(_render_headroom(content))
    return "\n\n".join(part for part in parts if part)


GROUP_TITLES = {
    "echo": "Echo: one message there and back",
    "bulk": "Bulk",
    "handshakes": "TLS handshake and upgrade",
    "idle": "Memory and CPU of idle tunnels",
    "grow": "Cost of a message as tunnels grow",
    "start": "Start",
    "storm": "Reconnect storm",
    "instructions": "Instructions",
    "calls": "System calls",
}


def write_into(document: Path, content: Content) -> None:
    """Replace the text between the marks of a document. Raises BenchError if there are none."""
    text = document.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BenchError(f"{document} lacks the lines {BEGIN!r} and {END!r}")
    document.write_text(f"{before}{BEGIN}\n\n{render_markdown(content)}\n\n{END}{after}")


def _render_run(content: Content) -> str:
    machine = content["machine"]
    rows = [
        ["taken", f"{content['taken']}, commit {content['commit']}, {content['rounds']} rounds"],
        [
            "machine",
            f"{machine['processor']}, {machine['cores']} cores, {_render_number(machine['memory_mib'], 0)} MiB",
        ],
        ["system", f"{machine['system']}, Linux {machine['kernel']}, {machine['openssl']}"],
        ["job", content["job"]],
        *([name, subject["version"]] for name, subject in content["subjects"].items()),
        ["not measured", "; ".join(content["failures"]) or "nothing"],
    ]
    return _render_table(["", "this run"], rows)


def _render_budgets(content: Content) -> str:
    rows = []
    for budget in budgets.BUDGETS:
        if (value := budget.find_measured(content, OURS)) is None:
            continue
        rows.append(
            [
                budget.title,
                budget.render_limit(budget.must),
                budget.render_limit(budget.aim),
                budget.render_result(value),
            ]
        )
    if not rows:
        return ""
    return "### Against the budgets\n\n" + _render_table(["figure", "must", "aim", "measured"], rows)


MAIN_COLUMNS = {
    "echo": ("cpu",),
    "bulk": ("cpu", "path"),
    "handshakes": ("cpu", "rate"),
    "idle": ("kib", "moved_kib", "idle_cpu"),
    "grow": ("growth",),
    "start": ("ms",),
    "storm": ("seconds", "cpu"),
}
"""The columns of each group that a document shows: all of the others. The JSON file has every one, and every round."""


def _render_group(group: str, figures: list[Content], subjects: list[str]) -> str:
    """Return a table with a row for each figure and column that is shown, and a column for each subject."""
    rows = []
    for figure in figures:
        for name in MAIN_COLUMNS[group] if group in MAIN_COLUMNS else figure["columns"]:
            if (column := figure["columns"].get(name)) is None:
                continue
            found, decimals = column["subjects"], column["decimals"]
            cells = [_render_number(found[who]["median"], decimals) if who in found else "-" for who in subjects]
            title = f"{figure['title']}: {column['label']}"
            rows.append([title, *cells, _render_ratio(found[OURS]) if OURS in found else "-"])
    return _render_table(["", *subjects, "x best peer"], rows)


def _render_headroom(content: Content) -> str:
    """Return how close the load and the origin came to being the bottleneck: their CPU relative to the subject's."""
    rows = []
    for figure in content["figures"].values():
        columns = figure["columns"]
        if BUSY[0].name not in columns:
            continue
        subject, load, others = (columns[column.name]["subjects"] for column in BUSY)
        share = {who: load[who]["median"] / subject[who]["median"] for who in load if subject[who]["median"]}
        if not share:
            continue
        most = max(share, key=lambda who: share[who])
        rows.append(
            [
                figure["title"],
                *(f"{share[OURS]:.2f}" if OURS in share else "-", f"{share[most]:.2f} ({most})"),
                f"{max(found['median'] for found in load.values()):.2f}",
                f"{statistics.median(found['median'] for found in others.values()):.2f}",
            ]
        )
    if not rows:
        return ""
    head = ["", "load CPU per CPU of tlstunnel", "of the lightest subject", "load busy at most", "others busy"]
    return "### Headroom of the load generator and the origin\n\n" + _render_table(head, rows)


def _render_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:" if len(head) > 2 else "---"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
