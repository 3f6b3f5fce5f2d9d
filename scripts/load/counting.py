"""Counts the instructions and system calls of one unit of work, which hardly depend on the machine's load.

The units are done one after the other, so that no two are served in the same turn of an event loop: a busy proxy needs
less for each. Instructions are those of the subject's own code and its libraries, not the kernel's.
"""

import os
import re
import signal
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.load.running import BenchError, Load, Running

BATCHES = 5

# unit -> the command for the load generator, and the size of a batch. Messages come first: closed connections leave a
# timer behind for some seconds, which makes each wake-up of an event loop a little longer.
UNITS = {
    "small": ("echo 1 64 300 {count}", 400),
    "page": ("echo 1 4096 300 {count}", 400),
    "full": ("handshakes 1 300 full {count}", 60),
    "resumed": ("handshakes 1 300 resumed {count}", 60),
}


def count_instructions(running: Running) -> dict[str, float]:
    """Return the instructions per unit, as counted by callgrind on a fresh start; medians of `BATCHES` batches.

    PYTHONHASHSEED=0 removes one source of variation. The others are ECDSA, garbage collections, and how bytes are
    spread over wake-ups. *start* is everything up to the first successful handshake.
    """
    with _under_callgrind(running, "no") as (fresh, output):
        found = _count_units(fresh, output)
    with _under_callgrind(running, "yes") as (fresh, output), Load(fresh) as load:
        load.do("open 1 /echo")
        return found | {"start": _read_dump(fresh.processes(), output)}


@contextmanager
def _under_callgrind(running: Running, at_start: str) -> Iterator[tuple[Running, Path]]:
    output = running.bench.folder / f"callgrind.{running.subject.name}"
    # The tunnel's children do the serving, and they are executed by the parent.
    callgrind = (
        "--tool=callgrind",
        "--trace-children=yes",
        f"--instr-atstart={at_start}",
        f"--callgrind-out-file={output}.%p",
    )
    environment = {"PYTHONHASHSEED": "0"}
    fresh = Running(running.bench, running.subject, under=("valgrind", "--quiet", *callgrind), environment=environment)
    try:
        yield fresh, output
    finally:
        fresh.stop()


def _count_units(fresh: Running, output: Path) -> dict[str, float]:
    found = {}
    with Load(fresh) as load:
        load.do("open 1 /echo")  # the first session ticket, and the tunnel of the echoes
        processes = fresh.processes()  # a worker has responded, so all have started
        for process in processes:
            _monitor(process, "instrumentation", "on")
        for unit, (command, count) in UNITS.items():
            load.do(command.format(count=count))  # excludes what is only done the first time
            _read_dump(processes, output)
            batches = []
            for _ in range(BATCHES):
                load.do(command.format(count=count))
                batches.append(_read_dump(processes, output) / count)
            found[unit] = statistics.median(batches)
        for process in processes:
            _monitor(process, "instrumentation", "off")
    return found


def _monitor(process: int, *command: str) -> None:
    result = subprocess.run(["vgdb", f"--pid={process}", *command], capture_output=True, text=True, check=False)
    if result.returncode:
        raise BenchError(f"vgdb {' '.join(command)}: {result.stderr.strip()}")


def _read_dump(processes: list[int], output: Path) -> int:
    """Return the instructions of all processes since the last dump."""
    total = 0
    for process in processes:
        _monitor(process, "dump")
        dumps = sorted(output.parent.glob(f"{output.name}.{process}.*"), key=lambda path: int(path.suffix[1:]))
        if not dumps or not (found := re.search(r"^(?:totals|summary): (\d+)", dumps[-1].read_text(), re.MULTILINE)):
            raise BenchError(f"callgrind wrote no count for process {process}")
        total += int(found[1])
        dumps[-1].unlink()
    return total


def count_system_calls(running: Running) -> dict[str, float]:
    """Return the system calls per unit, counted by strace."""
    found = {}
    with Load(running) as load:
        load.do("open 1 /echo")
        for unit, (command, count) in UNITS.items():
            load.do(command.format(count=10))
            with _strace(running) as calls:
                load.do(command.format(count=count))
            found[unit] = sum(calls.values()) / count
    return found


@contextmanager
def _strace(running: Running) -> Iterator[dict[str, int]]:
    """Count the calls of all the subject's processes. The counts, by name, are available after the exit."""
    calls: dict[str, int] = {}
    output = running.bench.folder / "strace"
    pids = running.processes()
    strace = subprocess.Popen(
        ["strace", "-f", "-c", "-o", str(output), *(part for pid in pids for part in ("-p", str(pid)))],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert strace.stderr is not None
        for _ in pids:
            if "attached" not in (line := strace.stderr.readline()):
                raise BenchError(f"strace: {line.strip() or 'no output'}")
        yield calls
    finally:
        os.kill(strace.pid, signal.SIGINT)
        strace.communicate()
    for line in output.read_text().splitlines():
        fields = line.split()
        if len(fields) >= 5 and fields[3].isdigit() and fields[-1] != "total":
            calls[fields[-1]] = int(fields[3])
