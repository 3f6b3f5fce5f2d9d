"""What is measured: each figure runs one kind of load against one subject and gives named numbers."""

import time
from collections.abc import Callable
from dataclasses import dataclass

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
    """One line of measurements. Its first column is the main one: ratios are of it."""

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


def rest(work: Work) -> dict[str, float]:
    """The numbers that every figure under load has."""
    answer = {name: float(work.answer[name]) for name in ("p50_us", "p99_us", "p999_us")}
    return answer | {name.name: float(getattr(work, name.name)) for name in BUSY}


def echo(tunnels: int, size: int, seconds: float) -> Figure:
    """Messages of `size` bytes to and fro, one in flight on each of `tunnels`."""

    def measure(running: Running) -> dict[str, float]:
        with Load(running) as load:
            load.do(f"open {tunnels} /echo")
            load.do(f"echo {tunnels} {size} 0.3")
            work = load.measure(f"echo {tunnels} {size} {seconds}")
            load.do("close")
        messages = work.answer["messages"]
        return {"cpu": work.cpu / messages * 1e6, "rate": messages / work.answer["seconds"]} | rest(work)

    return Figure(
        name=f"echo-{tunnels}-{size}",
        group="echo",
        title=f"echo, {tunnels} tunnel{'s' if tunnels > 1 else ''}, {spell(size)} messages",
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
        return {"cpu": work.cpu / moved, "rate": moved / work.answer["seconds"]} | rest(work)

    return Figure(
        name=f"bulk-{direction}",
        group="bulk",
        title=f"bulk {direction}, {BULK_TUNNELS} tunnels",
        columns=(Column("cpu", "CPU s/GB", 3), Column("rate", "GB/s", 3, False), *BUSY),
        measure=measure,
    )


def handshakes(kind: str, seconds: float) -> Figure:
    """TLS handshake, upgrade, 101 and an orderly end, 32 at once; `kind` is full or resumed."""

    def measure(running: Running) -> dict[str, float]:
        with Load(running) as load:
            load.do("open 1 /echo")  # brings the first session ticket
            load.do(f"handshakes 32 0.3 {kind}")
            work = load.measure(f"handshakes 32 {seconds} {kind}")
            load.do("close")
        done = work.answer["handshakes"]
        return {
            "cpu": work.cpu / done * 1e6,
            "rate": done / work.answer["seconds"],
            "resumed": work.answer["resumed"] / done,
            "errors": work.answer["errors"],
        } | rest(work)

    return Figure(
        name=f"handshakes-{kind}",
        group="handshakes",
        title=f"TLS + upgrade, {kind} TLS handshakes, 32 at once",
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


def idle(tunnels: int, minute_later: bool) -> Figure:
    """Memory and CPU of tunnels that do nothing, before and after each has moved 1 MiB both ways, all at once."""

    def measure(running: Running) -> dict[str, float]:
        found = {}
        with Load(running) as load:
            load.do("open 1 /echo")
            load.do("close")
            empty = running.pss_kib()
            load.do(f"open {tunnels} /both?bytes={MIB}")
            found["kib"] = (running.pss_kib() - empty) / tunnels
            before, seconds = running.cpu_seconds(), 3.0
            time.sleep(seconds)
            found["idle_cpu"] = (running.cpu_seconds() - before) / seconds * 1e3
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


def grow(many: int, seconds: float) -> Figure:
    """The cost of a message on 100 busy tunnels, alone and among `many`."""

    def measure(running: Running) -> dict[str, float]:
        costs = []
        with Load(running) as load:
            for more in (100, many - 100):
                load.do(f"open {more} /echo")
                load.do("echo 100 64 0.3")
                work = load.measure(f"echo 100 64 {seconds}")
                costs.append(work.cpu / work.answer["messages"] * 1e6)
            load.do("close")
        return {"growth": costs[1] / costs[0], "few": costs[0], "many": costs[1]} | rest(work)

    return Figure(
        name=f"grow-{many}",
        group="grow",
        title=f"echo, 64 B, 100 busy tunnels of 100 and of {many}",
        columns=(
            Column("growth", "cost grows x", 2),
            Column("few", "us/message of 100", 2),
            Column("many", f"of {many}", 2),
            *LATENCY,
            *BUSY,
        ),
        measure=measure,
    )


def start() -> Figure:
    """From the start of the process to the first answered handshake."""

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
    """All tunnels are reset at once and all clients come back at once."""

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
        } | rest(work)

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


def spell(size: int) -> str:
    """64 as `64 B`, 4096 as `4 KiB`."""
    return f"{size} B" if size < 1024 else f"{size // 1024} KiB"


def chosen(only: set[str], full: bool) -> list[Figure]:
    """The figures of a run: the short list, which takes a minute a subject, or the full one."""
    few, many = 1000, 9000
    echoes = [(1, 64), (64, 64), (64, 4096)]
    if full:
        echoes = [(tunnels, size) for tunnels in (1, 64, 1000) for size in (64, 4096, 65536)]
    figures = [
        *(echo(tunnels, size, seconds=3.0 if full else 1.5) for tunnels, size in echoes),
        *(bulk(direction, units=20 if full else 10) for direction in ("down", "up", "both")),
        *(handshakes(kind, seconds=3.0 if full else 1.5) for kind in ("full", "resumed")),
        *(idle(tunnels, minute_later=full) for tunnels in ((few, many) if full else (few,))),
        grow(many if full else few, seconds=3.0 if full else 1.0),
        start(),
        storm(5000 if full else few),
    ]
    by_default = GROUPS if full else ("echo", "bulk", "handshakes", "idle")
    return [figure for figure in figures if figure.group in (only or by_default)]


GROUPS = ("echo", "bulk", "handshakes", "idle", "grow", "start", "storm")
