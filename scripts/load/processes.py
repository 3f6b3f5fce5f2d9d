"""The gain and the cost of a second process: the same loads with one process and with two.

The tunnel, the load and the origin share two cores here; a machine with more cores would show a larger gain.
"""

import time
from collections.abc import Iterator

from scripts.load import machine
from scripts.load.figures import Column, Figure, bulk, echo, handshakes
from scripts.load.running import CORES, Running
from scripts.load.subjects import Subject, tunnel

CHILD = "tlstunnel.processes.child"


def list_variants(program: str) -> Iterator[Subject]:
    """Return the tunnel with one process and with two, on both cores."""
    for count in (1, 2):
        alone = tunnel(program)
        yield Subject(
            name=f"{count} process{'es' if count > 1 else ''}",
            command=(*alone.command, "--processes", str(count)),
            logging=alone.logging,
            version=alone.version,
            is_peer=count == 1,
            cores=CORES,
        )


def memory() -> Figure:
    """The memory of the parent and of each process before the first connection."""

    def measure(running: Running) -> dict[str, float]:
        time.sleep(1.0)  # until the last ones have started
        serving = [pid for pid in running.processes() if CHILD in machine.read_command_line(pid)]
        parent = [pid for pid in running.processes() if pid not in serving]
        return {
            "parent": machine.read_pss_kib(parent) / 1024,
            "each": machine.read_pss_kib(serving) / len(serving) / 1024,
            "all": machine.read_pss_kib([*parent, *serving]) / 1024,
        }

    return Figure(
        name="processes-memory",
        group="processes",
        title="MiB (PSS) at the start",
        columns=(Column("all", "all", 1), Column("parent", "parent", 1), Column("each", "each process", 1)),
        measure=measure,
        once=True,
    )


def choose(seconds: float | None) -> list[Figure]:
    """Return the figures of ``scripts/bench --processes``."""
    seconds = seconds or 1.5
    return [
        memory(),
        handshakes("full", seconds),
        handshakes("resumed", seconds),
        echo(64, 64, seconds),
        echo(64, 4096, seconds),
        echo(1000, 64, seconds),
        bulk("down", units=10),
    ]
