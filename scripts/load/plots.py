"""Plots of a run, PNG and SVG, made from its JSON: plots.py FILE FOLDER. Needs matplotlib (the extra `bench`)."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which most colour-blind people tell apart; the tunnel has the strongest.
COLOURS = {
    "tlstunnel": "#0072b2",
    "haproxy": "#e69f00",
    "nginx": "#009e73",
    "hitch": "#cc79a7",
    "stunnel": "#999999",
}
SPARE = ("#56b4e9", "#d55e00", "#f0e442")

Found = dict[str, dict[str, Any]]


class Plots:
    """The plots of one run, in one folder."""

    def __init__(self, content: dict[str, Any], folder: Path) -> None:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        # The same figures give the same files: no ids by chance, no date.
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "tlstunnel",
                "svg.fonttype": "none",
                "font.size": 9,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.titlesize": 10,
                "axes.axisbelow": True,
            }
        )
        self._plt = importlib.import_module("matplotlib.pyplot")
        self._figures, self._folder = content["figures"], folder
        spare = iter(SPARE * 10)
        self._colours = {name: COLOURS.get(name) or next(spare) for name in content["subjects"]}
        folder.mkdir(parents=True, exist_ok=True)

    def all(self) -> None:
        """Draw what the run has figures for."""
        self._echo("echo", "cpu", "CPU of the proxy, us per message")
        self._echo("latency", "p50_us", "round trip, p50, us")
        self._bars("bulk", "cpu", [(f"bulk-{way}", way) for way in ("down", "up", "both")], "CPU of the proxy, s per GB")
        self._bars(
            "handshakes", "cpu", [(f"handshakes-{kind}", kind) for kind in ("full", "resumed")], "CPU of the proxy, us each"
        )
        self._memory()
        self._growth()
        self._bars("start", "ms", [("start", "start to first answered handshake")], "ms")
        self._bars("storm", "seconds", [("storm-5000", "5 000 tunnels reset, all back")], "s")

    def _has(self, *names: str) -> bool:
        return any(self._figures.get(name, {}).get("columns") for name in names)

    def _subjects(self, figure: str, column: str) -> Found:
        columns = self._figures.get(figure, {"columns": {}})["columns"]
        return columns[column]["subjects"] if column in columns else {}

    def _grouped(self, axes: Any, sources: list[tuple[str, str, str]]) -> None:
        """Groups of bars, one bar a subject: for each group its figure, its column and its label."""
        found = [(label, self._subjects(figure, column)) for figure, column, label in sources]
        names = [name for name in self._colours if any(name in subjects for _, subjects in found)]
        width = 0.8 / max(1, len(names))
        for index, name in enumerate(names):
            places, medians, low, high = [], [], [], []
            for place, (_, subjects) in enumerate(found):
                if name in subjects:
                    one = subjects[name]
                    places.append(place + (index - (len(names) - 1) / 2) * width)
                    medians.append(one["median"])
                    low.append(one["median"] - one["low"])
                    high.append(one["high"] - one["median"])
            bars = axes.bar(places, medians, width * 0.92, color=self._colours[name], label=name)
            axes.errorbar(places, medians, yerr=[low, high], fmt="none", ecolor="#333333", elinewidth=0.8, capsize=1.5)
            texts = [f"{value:.3g}" if value < 1000 else f"{value:,.0f}".replace(",", " ") for value in medians]
            axes.bar_label(bars, texts, padding=6, fontsize=6, rotation=90)
        axes.set_xticks(range(len(found)), [label for label, _ in found])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.margins(y=0.2)
        axes.set_ylim(bottom=0)

    def _bars(self, file: str, column: str, sources: list[tuple[str, str]], unit: str) -> None:
        sources = [(figure, label) for figure, label in sources if self._has(figure)]
        if not sources:
            return
        drawing, axes = self._plt.subplots(figsize=(max(4.2, 2.4 * len(sources)), 3.2), layout="constrained")
        self._grouped(axes, [(figure, column, label) for figure, label in sources])
        axes.set_ylabel(unit)
        self._save(drawing, axes, file)

    def _echo(self, file: str, column: str, unit: str) -> None:
        sizes = [(64, "64 B"), (4096, "4 KiB"), (65536, "64 KiB")]
        counts = (1, 64, 1000)
        sizes = [(size, text) for size, text in sizes if self._has(*(f"echo-{count}-{size}" for count in counts))]
        if not sizes:
            return
        drawing, panels = self._plt.subplots(
            1, len(sizes), figsize=(3.6 * len(sizes) + 0.6, 3.2), layout="constrained", squeeze=False
        )
        for axes, (size, text) in zip(panels[0], sizes, strict=True):
            shown = [count for count in counts if self._has(f"echo-{count}-{size}")]
            self._grouped(axes, [(f"echo-{count}-{size}", column, f"{count} tunnels") for count in shown])
            axes.set_title(f"{text} messages")
            if column == "p50_us":
                axes.set_yscale("log")
        panels[0][0].set_ylabel(unit)
        self._save(drawing, panels[0][0], file)

    def _memory(self) -> None:
        columns = [("kib", "idle"), ("moved_kib", "after 1 MiB\neach way"), ("minute_kib", "a minute\nlater")]
        figures = [(name, text) for name, text in (("idle-1000", "1 000"), ("idle-9000", "9 000")) if self._has(name)]
        if not figures:
            return
        drawing, panels = self._plt.subplots(
            1, len(figures), figsize=(4.4 * len(figures), 3.2), layout="constrained", squeeze=False, sharey=True
        )
        for axes, (figure, text) in zip(panels[0], figures, strict=True):
            self._grouped(axes, [(figure, name, label) for name, label in columns if self._subjects(figure, name)])
            axes.set_title(f"{text} tunnels")
        panels[0][0].set_ylabel("KiB (PSS) per tunnel")
        self._save(drawing, panels[0][0], "memory")

    def _growth(self) -> None:
        figure = next((name for name in self._figures if name.startswith("grow-") and self._has(name)), None)
        if figure is None:
            return
        totals = [name for name in self._figures[figure]["columns"] if name.startswith("of_")]
        drawing, axes = self._plt.subplots(figsize=(5.2, 3.2), layout="constrained")
        for name, colour in self._colours.items():
            found = [self._subjects(figure, total).get(name) for total in totals]
            if all(found):
                points = [int(total.removeprefix("of_")) for total in totals]
                axes.plot(points, [one["median"] for one in found if one], marker="o", ms=4, color=colour, label=name)
        axes.set_xscale("log")
        axes.set_xticks(points := [int(total.removeprefix("of_")) for total in totals], [str(p) for p in points])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_xlabel("tunnels, 100 of them busy")
        axes.set_ylabel("CPU of the proxy, us per message")
        self._save(drawing, axes, "growth")

    def _save(self, drawing: Any, legend_of: Any, file: str) -> None:
        handles, labels = legend_of.get_legend_handles_labels()
        if handles:
            drawing.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            drawing.savefig(self._folder / f"{file}.{kind}", dpi=150, metadata=metadata)
        self._plt.close(drawing)


if __name__ == "__main__":
    Plots(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])).all()
