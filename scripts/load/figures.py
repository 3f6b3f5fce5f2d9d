"""The figures: each runs one kind of load against a subject, and returns named numbers."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from scripts.load import counting
from scripts.load.running import Load, Running, Work

GB = 1e9
MIB = 2**20
BULK_TUNNELS = 8
BULK_UNIT = 16 * MIB


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a figure."""

    name: str
    label: str
    decimals: int
    lower_is_better: bool = True


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of measurements. The first column is the main one, for which ratios are computed."""

    name: str
    group: str
    title: str
    columns: tuple[Column, ...]
    measure: Callable[[Running], dict[str, float]]
    once: bool = False  # memory does not vary from round to round


LATENCY = (
    Column("p50_us", "p50 us", 0),
    Column("p99_us", "p99 us", 0),
    Column("p999_us", "p99.9 us", 0),
)
BUSY = (
    Column("subject_busy", "proxy busy", 2),
    Column("load_busy", "load busy", 2),
    Column("others_busy", "others", 2),
)


def common_numbers(work: Work) -> dict[str, float]:
    """Return the numbers that every figure under load has."""
    answer = {name: float(work.answer[name]) for name in ("p50_us", "p99_us", "p999_us")}
    return answer | {name.name: float(getattr(work, name.name)) for name in BUSY}


def echo(tunnels: int, size: int, seconds: float) -> Figure:
    """Messages of `size` bytes, sent and echoed, one in flight on each of `tunnels`."""

    def measure(running: Running) -> dict[str, float]:
        with Load(running) as load:
            load.do(f"open {tunnels} /echo")
            load.do(f"echo {tunnels} {size} 0.3")
            work = load.measure(f"echo {tunnels} {size} {seconds}")
            load.do("close")
        messages = work.answer["messages"]
        return {"cpu": work.cpu / messages * 1e6, "rate": messages / work.answer["seconds"]} | common_numbers(work)

    return Figure(
        name=f"echo-{tunnels}-{size}",
        group="echo",
        title=f"echo, {tunnels} tunnel{'s' if tunnels > 1 else ''}, {render_size(size)} messages",
        columns=(Column("cpu", "CPU us/message", 2), Column("rate", "messages/s", 0, False), *LATENCY, *BUSY),
        measure=measure,
    )


def bulk(direction: str, units: int) -> Figure:
    """Large transfers over a few tunnels at once; `both` counts the bytes of both directions."""

    def measure(running: Running) -> dict[str, float]:
        with Load(running) as load:
            load.do(f"open {BULK_TUNNELS} /{direction}?bytes={BULK_UNIT}")
            load.do("move 1")
            work = load.measure(f"move {units}")
            load.do("close")
        moved = BULK_TUNNELS * BULK_UNIT * units * (2 if direction == "both" else 1) / GB
        path = work.cpu + work.load_busy * work.answer["seconds"]
        return {"cpu": work.cpu / moved, "path": path / moved, "rate": moved / work.answer["seconds"]} | common_numbers(
            work
        )

    return Figure(
        name=f"bulk-{direction}",
        group="bulk",
        title=f"bulk {direction}, {BULK_TUNNELS} tunnels",
        columns=(
            Column("cpu", "CPU s/GB", 3),
            Column("path", "with load and origin", 3),
            Column("rate", "GB/s", 3, False),
            *BUSY,
        ),
        measure=measure,
    )


def handshakes(kind: str, seconds: float, at_once: int = 32) -> Figure:
    """TLS handshake, upgrade, 101 and a clean close, `at_once` at a time; `kind` is full or resumed."""

    def measure(running: Running) -> dict[str, float]:
        with Load(running) as load:
            load.do("open 1 /echo")  # obtains the first session ticket
            load.do(f"handshakes {at_once} 0.3 {kind}")
            work = load.measure(f"handshakes {at_once} {seconds} {kind}")
            load.do("close")
        done = work.answer["handshakes"]
        return {
            "cpu": work.cpu / done * 1e6,
            "rate": done / work.answer["seconds"],
            "resumed": work.answer["resumed"] / done,
            "errors": work.answer["errors"],
        } | common_numbers(work)

    return Figure(
        name=f"handshakes-{kind}" if at_once == 32 else f"handshakes-{kind}-{at_once}",
        group="handshakes",
        title=f"TLS + upgrade, {kind} TLS handshakes, {at_once} at once",
        columns=(
            Column("cpu", "CPU us each", 0),
            Column("rate", "per second", 0, False),
            *LATENCY[:2],
            Column("resumed", "resumed", 2, False),
            Column("errors", "errors", 0),
            *BUSY,
        ),
        measure=measure,
    )


def idle(tunnels: int, seconds: float, minute_later: bool) -> Figure:
    """Memory and CPU of tunnels that do nothing, before and after each has moved 1 MiB both ways, all at once."""

    def measure(running: Running) -> dict[str, float]:
        found = {}
        with Load(running) as load:
            load.do("open 1 /echo")
            load.do("close")
            empty = running.pss_kib()
            load.do(f"open {tunnels} /both?bytes={MIB}")
            found["kib"] = (running.pss_kib() - empty) / tunnels
            found["idle_cpu"] = idle_cpu(running, seconds)
            load.do("move 1")
            found["moved_kib"] = (running.pss_kib() - empty) / tunnels
            if minute_later:
                time.sleep(60)
                found["minute_kib"] = (running.pss_kib() - empty) / tunnels
            load.do("close")
        found["closed_kib"] = (running.pss_kib() - empty) / tunnels
        return found

    return Figure(
        name=f"idle-{tunnels}",
        group="idle",
        title=f"{tunnels} idle tunnels, PSS of all processes",
        columns=(
            Column("kib", "KiB/tunnel", 1),
            Column("moved_kib", "after 1 MiB each way", 1),
            *([Column("minute_kib", "a minute later", 1)] if minute_later else []),
            Column("closed_kib", "kept when closed", 1),
            Column("idle_cpu", "idle CPU ms/s", 1),
        ),
        measure=measure,
        once=True,
    )


def idle_cpu(running: Running, seconds: float) -> float:
    """Return the CPU time of a subject without load, in milliseconds per second."""
    before = running.cpu_seconds()
    time.sleep(seconds)
    return (running.cpu_seconds() - before) / seconds * 1e3


def hold(tunnels: int, seconds: float) -> Figure:
    """As many tunnels as 20 000 descriptors allow, held by one process."""

    def measure(running: Running) -> dict[str, float]:
        with Load(running) as load:
            opened = load.do(f"open {tunnels} /echo")
            used = idle_cpu(running, seconds)
            load.do(f"echo {tunnels} 64 0.1")  # each of them still carries a message
            load.do("close")
        return {"tunnels": opened["opened"], "idle_cpu": used, "seconds": opened["seconds"]}

    return Figure(
        name=f"hold-{tunnels}",
        group="idle",
        title=f"{tunnels} tunnels opened and held",
        columns=(
            Column("tunnels", "tunnels", 0, False),
            Column("idle_cpu", "idle CPU ms/s", 1),
            Column("seconds", "s to open", 1),
        ),
        measure=measure,
        once=True,
    )


def grow(totals: tuple[int, ...], seconds: float) -> Figure:
    """The cost of a message on 100 busy tunnels, with a growing number of idle ones."""

    def measure(running: Running) -> dict[str, float]:
        costs: dict[int, float] = {}
        opened = 0
        with Load(running) as load:
            for total in totals:
                load.do(f"open {total - opened} /echo")
                opened = total
                load.do("echo 100 64 0.3")
                work = load.measure(f"echo 100 64 {seconds}")
                costs[total] = work.cpu / work.answer["messages"] * 1e6
            load.do("close")
        growth = costs[totals[-1]] / costs[totals[0]]
        return {"growth": growth} | {f"of_{total}": cost for total, cost in costs.items()} | common_numbers(work)

    return Figure(
        name=f"grow-{totals[-1]}",
        group="grow",
        title=f"echo, 64 B, 100 busy tunnels of {totals[0]} to {totals[-1]}",
        columns=(
            Column("growth", "cost grows x", 2),
            *(Column(f"of_{total}", f"us/message of {total}", 2) for total in totals),
            *LATENCY,
            *BUSY,
        ),
        measure=measure,
    )


def start() -> Figure:
    """From the start of the process to the first successful handshake."""

    def measure(running: Running) -> dict[str, float]:
        fresh = Running(running.bench, running.subject)
        try:
            with Load(fresh) as load:
                load.do("open 1 /echo")
                return {"ms": fresh.seconds_since_start() * 1e3, "cpu": fresh.cpu_seconds() * 1e3}
        finally:
            fresh.stop()

    return Figure(
        name="start",
        group="start",
        title="start to first answered handshake",
        columns=(Column("ms", "ms", 0), Column("cpu", "CPU ms", 0)),
        measure=measure,
    )


def storm(tunnels: int) -> Figure:
    """All tunnels are reset at once, and all clients reconnect at once."""

    def measure(running: Running) -> dict[str, float]:
        with Load(running) as load:
            load.do(f"open {tunnels} /echo")
            load.do("abort")
            work = load.measure(f"open {tunnels} /echo {tunnels}")
            load.do(f"echo {tunnels} 64 0.5")
            load.do("close")
        return {
            "seconds": work.answer["seconds"],
            "cpu": work.cpu / tunnels * 1e6,
            "tries": 1 + work.answer["errors"] / tunnels,
        } | common_numbers(work)

    return Figure(
        name=f"storm-{tunnels}",
        group="storm",
        title=f"{tunnels} tunnels reset, all clients back at once",
        columns=(
            Column("seconds", "s until all are back", 2),
            Column("cpu", "CPU us each", 0),
            Column("tries", "tries each", 2),
            *LATENCY[:2],
            *BUSY,
        ),
        measure=measure,
    )


def counts(kind: str) -> Figure:
    """Counts for one unit of work, independent of the machine's load; `kind` is instructions or calls."""
    scale = 1e-3 if kind == "instructions" else 1.0

    def measure(running: Running) -> dict[str, float]:
        counted = (counting.count_instructions if kind == "instructions" else counting.count_system_calls)(running)
        return {unit: number * scale for unit, number in counted.items()}

    named = "thousand instructions (user)" if kind == "instructions" else "system calls"
    return Figure(
        name=kind,
        group=kind,
        title=f"{named} for one unit, done alone",
        columns=(
            Column("full", "TLS + upgrade, full", 1),
            Column("resumed", "resumed", 1),
            Column("small", "message of 64 B", 2),
            Column("page", "of 4 KiB", 2),
            *([Column("start", "start to first answer", 0)] if kind == "instructions" else []),
        ),
        measure=measure,
        once=True,
    )


def render_size(size: int) -> str:
    """Return 64 as `64 B`, 4096 as `4 KiB`."""
    return f"{size} B" if size < 1024 else f"{size // 1024} KiB"


def choose(only: set[str], *, full: bool, seconds: float | None) -> list[Figure]:
    """Return the figures of a run: the short list, which takes a minute per subject, or the full one.

    `seconds` is how long each timed load runs, except bulk.
    """
    few, many = 1000, 9000
    seconds = seconds or (3.0 if full else 1.5)
    echoes = [(1, 64), (64, 64), (64, 4096)]
    if full:
        echoes = [(tunnels, size) for tunnels in (1, 64, 1000) for size in (64, 4096, 65536)]
    figures = [
        *(echo(tunnels, size, seconds) for tunnels, size in echoes),
        *(bulk(direction, units=20 if full else 10) for direction in ("down", "up", "both")),
        *(handshakes(kind, seconds) for kind in ("full", "resumed")),
        idle(few, 10.0 if full else 3.0, minute_later=full),
        *([idle(many, 10.0, minute_later=True), hold(9500, 10.0)] if full else []),
        grow((few // 10, few, 3 * few, many) if full else (few // 10, few), seconds),
        start(),
        storm(5000 if full else few),
        counts("instructions"),
        counts("calls"),
    ]
    by_default = GROUPS if full else ("echo", "bulk", "handshakes", "idle")
    return [figure for figure in figures if figure.group in (only or by_default)]


def gate() -> list[Figure]:
    """Return the figures for `--gate`. The loads are short: many short rounds are more precise than few long ones."""
    return [
        *(echo(tunnels, size, 0.6) for tunnels, size in ((1, 64), (64, 64), (64, 4096))),
        *(bulk(direction, units=10) for direction in ("down", "up", "both")),
        *(handshakes(kind, 0.6) for kind in ("full", "resumed")),
        idle(1000, 2.0, minute_later=False),
        counts("instructions"),
        counts("calls"),
    ]


GROUPS = ("echo", "bulk", "handshakes", "idle", "grow", "start", "storm", "instructions", "calls")
