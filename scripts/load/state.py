"""The cost of counting together: handshakes with rate limits whose counts are in the process, the ledger or a server.

Each variant has two serving processes, except the one that counts in memory. They, the ledger and the load share two
cores, so only the CPU per handshake and the latency of the questions say something.

The cost of the limits themselves is the difference between "no limits" and "each alone", where each process counts in
its own memory because the ledger is stopped. The cost of counting together is what "ledger" needs beyond that.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.load import machine
from scripts.load.figures import Column, Figure
from scripts.load.firewall import LIMITS
from scripts.load.running import CORES, BenchError, Load, Running, find_free_port
from scripts.load.subjects import Subject

HEAD = """\
listen = ["127.0.0.1:$port"]
processes = {processes}
[log]
format = "json"
"""

SITE = """\
[[sites]]
origins = ["127.0.0.1:$origin"]
cert = "$cert"
key = "$key"
"""

VALKEY = '[state]\nurl = "valkey://127.0.0.1:{port}/0"\n'

ALONE = "each alone"
"""The variant whose ledger is stopped while it is measured."""

SHARE = 0.7
"""Of the full rate, at which the latency is measured."""

QUESTION_SECONDS = "tlstunnel_count_question_seconds"


@contextlib.contextmanager
def run_server() -> Iterator[int]:
    """Run a server of Redis on loopback, without persistence; yield its port. Raises BenchError."""
    program = shutil.which("valkey-server") or shutil.which("redis-server")
    if program is None:
        raise BenchError("neither valkey-server nor redis-server is installed")
    port = find_free_port()
    process = subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield port
    finally:
        process.terminate()
        process.wait()


def list_variants(program: str, server_port: int) -> Iterator[Subject]:
    """Return the tunnel with and without limits, and with each place for their counts."""
    variants = {
        "no limits": (2, "", ""),
        "memory": (1, "", LIMITS),
        ALONE: (2, "", LIMITS),
        "ledger": (2, "", LIMITS),
        "ledger, valkey": (2, VALKEY.format(port=server_port), LIMITS),
    }
    for name, (processes, state, limits) in variants.items():
        file = f"state-{name.replace(', ', '-').replace(' ', '-')}.toml"
        yield Subject(
            name=name,
            command=(program, "start", "--config", f"$dir/{file}", "--control", f"$dir/{file}.sock"),
            files={file: HEAD.format(processes=processes) + state + SITE + limits},
            version=(program, "--version"),
            is_peer=name == "no limits",
            cores=CORES,
        )


def questions(seconds: float) -> Figure:
    """Handshakes as fast as possible, then at a share of that rate, for which the questions are timed."""

    def measure(running: Running) -> dict[str, float]:
        with _alone(running), Load(running) as load:
            load.do("open 1 /echo")
            load.do("handshakes 32 0.3 resumed")
            full = load.measure(f"handshakes 32 {seconds} resumed")
            rate = full.answer["handshakes"] / full.answer["seconds"]
            before, waited = _read_buckets(running), machine.read_waiting_seconds(running.processes())
            paced = load.measure(f"handshakes 32 {2 * seconds} resumed 1000000 {SHARE * rate:.0f}")
            waited = machine.read_waiting_seconds(running.processes()) - waited
            after = _read_buckets(running)
            load.do("close")
        found = {bucket: number - before.get(bucket, 0) for bucket, number in after.items()}
        return {
            "cpu": full.cpu / full.answer["handshakes"] * 1e6,
            "rate": rate,
            "paced_cpu": paced.cpu / paced.answer["handshakes"] * 1e6,
            "paced_rate": paced.answer["handshakes"] / paced.answer["seconds"],
            "p50": _find_percentile(found, 0.5) * 1000,
            "p99": _find_percentile(found, 0.99) * 1000,
            "handshake_p99": float(paced.answer["p99_us"]) / 1000,
            "waited": waited / paced.answer["handshakes"] * 1e6,
        }

    return Figure(
        name="state",
        group="state",
        title=f"resumed handshakes at the full rate, and at {SHARE:.0%} of it",
        columns=(
            Column("cpu", "CPU us each", 0),
            Column("rate", "per second", 0, False),
            Column("paced_cpu", "CPU us each, paced", 0),
            Column("paced_rate", "per second, paced", 0, False),
            Column("p50", "question p50 ms, at most", 2),
            Column("p99", "question p99 ms, at most", 2),
            Column("handshake_p99", "handshake p99 ms", 1),
            Column("waited", "waiting for a core, us each", 0),
        ),
        measure=measure,
    )


@contextlib.contextmanager
def _alone(running: Running) -> Iterator[None]:
    """Stop the ledger meanwhile if the subject is that variant. The tunnel kills a ledger that is silent for 30 s."""
    if running.subject.name != ALONE:
        yield
        return
    ledger = _read_status(running)["ledger"]["process"]
    os.kill(ledger, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(ledger, signal.SIGCONT)


def _read_status(running: Running) -> Any:
    config = Path(running.bench.render(running.subject.command[3], running.port))
    status = subprocess.run(
        [running.subject.command[0], "status", "--json", "--control", f"{config}.sock"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(status.stdout)


def _read_buckets(running: Running) -> dict[float, int]:
    """Return the numbers of questions by the bounds of their seconds."""
    series = _read_status(running)["metrics"].get(QUESTION_SECONDS, [])
    return {float(one["labels"]["le"]): one["value"] for one in series if one["labels"]["le"] != "sum"}


def _find_percentile(buckets: dict[float, int], share: float) -> float:
    """Return the bound of the bucket that has this percentile; 0 without questions."""
    total, passed = sum(buckets.values()), 0
    for bound, number in sorted(buckets.items()):
        passed += number
        if passed >= share * total:
            return bound
    return 0.0


def choose(seconds: float | None) -> list[Figure]:
    """Return the figures of ``scripts/bench --state``."""
    return [questions(seconds or 3.0)]
