"""Starts and stops the parts of a benchmark: the origin, the load generator, the subjects."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from scripts.load import machine
from scripts.load.subjects import SUBJECT_CORE, Subject

LOAD_CORE = 1
CORES = (SUBJECT_CORE, LOAD_CORE)
START_TIMEOUT = 60.0  # callgrind takes some seconds
STOP_TIMEOUT = 5.0


class BenchError(Exception):
    """A measurement failed; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The certificate that all subjects serve: P-256, `localhost`, self-signed."""

    cert: Path
    key: Path
    pem: Path

    @classmethod
    def create(cls, folder: Path) -> "Certificate":
        """Create it in `folder`."""
        made = cls(folder / "cert.pem", folder / "key.pem", folder / "both.pem")
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
                *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "365"),
                *("-keyout", str(made.key), "-out", str(made.cert)),
            ],
            check=True,
            capture_output=True,
        )
        made.pem.write_text(made.cert.read_text() + made.key.read_text())
        return made


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements of a run share."""

    programs: Path
    folder: Path
    certificate: Certificate
    origin_port: int
    origin_pid: int
    descriptors: int

    @property
    def tunnels(self) -> int:
        """The number of tunnels that the descriptor limit allows for a process."""
        return (self.descriptors - 100) // 2

    def render(self, template: str, port: int) -> str:
        """Fill in a template of `subjects.py`."""
        return Template(template).substitute(
            port=port,
            origin=self.origin_port,
            cert=self.certificate.cert,
            key=self.certificate.key,
            pem=self.certificate.pem,
            dir=self.folder,
            tunnels=self.tunnels,
            descriptors=self.descriptors,
            user="nobody" if os.geteuid() == 0 else "",
        )


@contextlib.contextmanager
def run_origin(program: Path) -> Iterator[tuple[int, int]]:
    """Run the origin on the load's core; yield its port and its process ID."""
    process = subprocess.Popen([str(program)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["port"], process.pid
    finally:
        process.kill()
        process.communicate()


def find_free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class Running:
    """A running subject on its own core.

    `under` is the command of a program to run it with, such as valgrind; `environment` is added to this process's.
    """

    def __init__(
        self, bench: Bench, subject: Subject, under: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self.bench, self.subject, self.port = bench, subject, find_free_port()
        for name, template in subject.files.items():
            (bench.folder / name).write_text(bench.render(template, self.port))
        command = [bench.render(part, self.port) for part in subject.command]
        self._log = bench.folder / f"{subject.name}.log"
        self._started = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["taskset", "--cpu-list", ",".join(map(str, subject.cores)), *under, *command],
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_until_listening()
        except BaseException:
            self.stop()
            raise

    def _wait_until_listening(self) -> None:
        while time.monotonic() - self._started < START_TIMEOUT:
            if self._process.poll() is not None:
                raise BenchError(
                    f"{self.subject.name} ended with {self._process.returncode}: {self._read_last_lines()}"
                )
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.002)
        raise BenchError(
            f"{self.subject.name} was not listening after {START_TIMEOUT:.0f} s: {self._read_last_lines()}"
        )

    def _read_last_lines(self) -> str:
        return " | ".join(self._log.read_text(errors="replace").splitlines()[-3:]) or "no output"

    def processes(self) -> list[int]:
        """Return the IDs of all its processes."""
        return machine.find_processes(self._process.pid)

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its processes."""
        return machine.read_cpu_seconds(self.processes())

    def pss_kib(self) -> int:
        """Return the memory of all its processes in KiB, after a moment without load."""
        time.sleep(0.5)
        return machine.read_pss_kib(self.processes())

    def seconds_since_start(self) -> float:
        """Return the time since it was started."""
        return time.monotonic() - self._started

    def stop(self) -> None:
        """Stop all its processes with SIGTERM, then with SIGKILL those that take too long."""
        for signal_number, timeout in ((signal.SIGTERM, STOP_TIMEOUT), (signal.SIGKILL, STOP_TIMEOUT)):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal_number)
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline:
                self._process.poll()
                if not self.processes():
                    return
                time.sleep(0.01)


class Load:
    """The load generator, connected to a subject. It responds to each command with a JSON object."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self._process = subprocess.Popen(
            [str(running.bench.programs / "client"), str(running.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def do(self, command: str) -> dict[str, Any]:
        """Run a command and return the response."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(command, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the load generator ended"}
        if "error" in answer:
            raise BenchError(f"{self.running.subject.name}: {command}: {answer['error']}")
        return answer

    def measure(self, command: str) -> "Work":
        """Run a command, and measure the CPU time of the subject, the load and everything else."""
        origin = [self.running.bench.origin_pid]
        before = self.running.cpu_seconds(), machine.read_cpu_seconds(origin), machine.read_busy_seconds(CORES)
        answer = self.do(command)
        after = self.running.cpu_seconds(), machine.read_cpu_seconds(origin), machine.read_busy_seconds(CORES)
        subject, served, cores = (end - start for start, end in zip(before, after, strict=True))
        seconds = answer["seconds"]
        return Work(
            answer=answer,
            cpu=subject,
            subject_busy=subject / seconds,
            load_busy=(served + answer["cpu"]) / seconds,
            others_busy=max(0.0, cores - subject - served - answer["cpu"]) / seconds,
        )


@dataclass(frozen=True, slots=True)
class Work:
    """A command of the load generator, and its cost."""

    answer: dict[str, Any]
    cpu: float  # seconds of the subject
    subject_busy: float  # share of one core that the subject used
    load_busy: float  # share of one core that the load and the origin used together
    others_busy: float  # share of the two cores that other processes used: 0 to 2
