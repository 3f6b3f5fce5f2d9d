"""Plots of a run, as SVG, drawn from its JSON: plots.py FILE FOLDER. Needs matplotlib (the extra `bench`)."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which most colour-blind people can distinguish; the tunnel has the strongest.
COLOURS = {
    "tlstunnel": "#0072b2",
    "haproxy": "#e69f00",
    "nginx": "#009e73",
    "hitch": "#cc79a7",
    "stunnel": "#999999",
}
SPARE = ("#56b4e9", "#d55e00", "#f0e442")

# Fits the names of five subjects above the narrowest plot.
LEGEND = {"fontsize": 8, "handlelength": 1.0, "handletextpad": 0.4, "columnspacing": 1.1}

Found = dict[str, dict[str, Any]]


class Plots:
    """The plots of one run, in one folder."""

    def __init__(self, content: dict[str, Any], folder: Path) -> None:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        # The same figures must produce the same files, so there are no random IDs and no date.
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
        self._ticker = importlib.import_module("matplotlib.ticker")
        self._figures, self._folder = content["figures"], folder
        spare = iter(SPARE * 10)
        self._colours = {name: COLOURS.get(name) or next(spare) for name in content["subjects"]}
        folder.mkdir(parents=True, exist_ok=True)

    def all(self) -> None:
        """Draw every plot for which the run has figures."""
        self._echo()
        self._latency()
        ways = [(f"bulk-{way}", "cpu", way) for way in ("down", "up", "both")]
        self._bars("bulk", [("CPU of the proxy, s per GB", ways)])
        kinds = [(f"handshakes-{kind}", "cpu", kind) for kind in ("full", "resumed")]
        self._bars("handshakes", [("CPU of the proxy, us each", kinds)])
        self._memory()
        self._growth()
        start = [("start", "ms", "start to first answered handshake")]
        storm = [("storm-5000", "seconds", "5 000 tunnels reset, all back")]
        self._bars("start-and-storm", [("ms", start), ("s", storm)])

    def _has(self, *names: str) -> bool:
        return any(self._figures.get(name, {}).get("columns") for name in names)

    def _subjects(self, figure: str, column: str) -> Found:
        columns = self._figures.get(figure, {"columns": {}})["columns"]
        return columns[column]["subjects"] if column in columns else {}

    def _places(self, found: list[Found]) -> Iterator[tuple[str, float, list[tuple[float, dict[str, Any]]]]]:
        """Yield for each subject its name, the width of its bars, and their position in each group."""
        names = [name for name in self._colours if any(name in subjects for subjects in found)]
        width = 0.84 / max(1, len(names))
        for index, name in enumerate(names):
            shift = (index - (len(names) - 1) / 2) * width
            yield name, width, [(i + shift, subjects[name]) for i, subjects in enumerate(found) if name in subjects]

    def _grouped(self, axes: Any, sources: list[tuple[str, str, str]]) -> None:
        """Draw groups of bars, a bar for each subject. `sources` has a figure, a column and a label for each group."""
        tops = [0.0]
        for name, width, bars in self._places([self._subjects(figure, column) for figure, column, _ in sources]):
            places, medians = [place for place, _ in bars], [one["median"] for _, one in bars]
            axes.bar(places, medians, width * 0.9, color=self._colours[name], label=name)
            for place, one in bars:
                if len(one["rounds"]) > 1:
                    axes.vlines(place, one["low"], one["high"], color="#333333", linewidth=0.8)
                axes.annotate(
                    f"{one['median']:.3g}" if one["median"] < 1000 else f"{one['median']:.0f}",
                    (place, one["high"]),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    fontsize=6.5,
                    rotation=90,
                )
                tops.append(one["high"])
        axes.set_xticks(range(len(sources)), [label for _, _, label in sources])
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_ylim(0, max(tops) * 1.17 or 1)

    def _bars(self, file: str, panels: list[tuple[str, list[tuple[str, str, str]]]]) -> None:
        """Draw a panel for each unit, with its groups."""
        panels = [(unit, [group for group in groups if self._has(group[0])]) for unit, groups in panels]
        panels = [(unit, groups) for unit, groups in panels if groups]
        if not panels:
            return
        widths = [max(3.4, 2.4 * len(groups)) for _, groups in panels]
        drawing, drawn = self._plt.subplots(
            1, len(panels), figsize=(sum(widths), 3.2), width_ratios=widths, layout="constrained", squeeze=False
        )
        for axes, (unit, groups) in zip(drawn[0], panels, strict=True):
            self._grouped(axes, groups)
            axes.set_ylabel(unit)
        self._save(drawing, drawn[0][0], file)

    def _echo_panels(self) -> Iterator[tuple[Any, list[str]]]:
        """Yield a panel for each size of message: its axes and its figures."""
        sizes = [
            (text, [f"echo-{count}-{size}" for count in (1, 64, 1000) if self._has(f"echo-{count}-{size}")])
            for size, text in ((64, "64 B"), (4096, "4 KiB"), (65536, "64 KiB"))
        ]
        sizes = [(text, names) for text, names in sizes if names]
        if not sizes:
            return
        _, drawn = self._plt.subplots(
            1, len(sizes), figsize=(3.6 * len(sizes) + 0.6, 3.2), layout="constrained", squeeze=False
        )
        for axes, (text, names) in zip(drawn[0], sizes, strict=True):
            axes.set_title(f"{text} messages")
            yield axes, names

    def _echo(self) -> None:
        panels = list(self._echo_panels())
        for axes, names in panels:
            self._grouped(axes, [(name, "cpu", tunnels(name)) for name in names])
        if panels:
            panels[0][0].set_ylabel("CPU of the proxy, us per message")
            self._save(panels[0][0].figure, panels[0][0], "echo")

    def _latency(self) -> None:
        """Draw lines from the median (a dot) past p99 (a dash) to p99.9 (the end)."""
        panels = list(self._echo_panels())
        for axes, names in panels:
            percentiles = [
                [self._subjects(name, column) for name in names] for column in ("p50_us", "p99_us", "p999_us")
            ]
            for subject, _width, middle in self._places(percentiles[0]):
                style = {"color": self._colours[subject]}
                _, _, high = next(one for one in self._places(percentiles[1]) if one[0] == subject)
                _, _, highest = next(one for one in self._places(percentiles[2]) if one[0] == subject)
                places = [place for place, _ in middle]
                ends = [[one["median"] for _, one in line] for line in (middle, high, highest)]
                axes.vlines(places, ends[0], ends[2], linewidth=1.6, **style)
                axes.plot(places, ends[0], "o", ms=4.5, label=subject, **style)
                axes.plot(places, ends[1], "_", ms=8, mew=1.6, **style)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(self._ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter("{x:.0f}")
            axes.minorticks_off()
            axes.set_xticks(range(len(names)), [tunnels(name) for name in names])
            axes.tick_params(axis="x", length=0)
            axes.set_xlim(-0.5, len(names) - 0.5)
            axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        if panels:
            panels[0][0].set_ylabel("round trip, us: p50, p99, p99.9")
            self._save(panels[0][0].figure, panels[0][0], "latency")

    def _memory(self) -> None:
        columns = [("kib", "idle"), ("moved_kib", "after 1 MiB\neach way"), ("minute_kib", "a minute\nlater")]
        figures = [(name, text) for name, text in (("idle-1000", "1 000"), ("idle-9000", "9 000")) if self._has(name)]
        if not figures:
            return
        drawing, panels = self._plt.subplots(
            1, len(figures), figsize=(4.4 * len(figures), 3.2), layout="constrained", squeeze=False
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
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_xlabel("tunnels, 100 of them busy")
        axes.set_ylabel("CPU of the proxy, us per message")
        self._save(drawing, axes, "growth")

    def _save(self, drawing: Any, legend_of: Any, file: str) -> None:
        handles, labels = legend_of.get_legend_handles_labels()
        if handles:
            drawing.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, **LEGEND)
        drawing.savefig(self._folder / f"{file}.svg", metadata={"Date": None})
        self._plt.close(drawing)


def tunnels(name: str) -> str:
    """Return `64 tunnels` for `echo-64-4096`."""
    count = name.split("-")[1]
    return f"{count} tunnel{'s' if count != '1' else ''}"


if __name__ == "__main__":
    Plots(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])).all()
