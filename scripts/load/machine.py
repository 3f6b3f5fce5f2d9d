"""Information from the operating system about the machine, and about all processes of a subject."""

import os
import platform
import resource
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICK = os.sysconf("SC_CLK_TCK")


def find_processes(session: int) -> list[int]:
    """Return the IDs of the running processes of a session: a subject with all its descendants."""
    pids = [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if (fields := read_stat(pid)) and int(fields[3]) == session]


def read_command_line(pid: int) -> str:
    """Return the arguments of a process, empty if it has exited."""
    try:
        return (PROC / str(pid) / "cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (state) on; none if the process has exited or is a zombie."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    fields = text[text.rindex(")") + 2 :].split()
    return [] if fields[0] == "Z" else fields


def read_cpu_seconds(pids: list[int]) -> float:
    """Return the CPU time, user and system, of processes and their exited children, to the tick (10 ms)."""
    return sum(int(ticks) for pid in pids for ticks in read_stat(pid)[11:15]) / TICK


def read_waiting_seconds(pids: list[int]) -> float:
    """Return how long the first threads of processes were ready to run and waited for a core (schedstat, in ns)."""
    return sum(int((PROC / str(pid) / "schedstat").read_text().split()[1]) for pid in pids) / 1e9


def read_pss_kib(pids: list[int]) -> int:
    """Return the proportional set size in KiB: a page shared by several processes is counted once among them."""
    total = 0
    for pid in pids:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def read_busy_seconds(cores: Iterable[int]) -> float:
    """Return how long these cores have been busy since the machine started, in total and including stolen time."""
    names = {f"cpu{core}" for core in cores}
    total = 0
    for line in (PROC / "stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in names:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, ticks[:8])
            total += user + nice + system + irq + softirq + steal
    return total / TICK


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine on which the figures were measured."""

    processor: str
    cores: int
    memory_mib: int
    kernel: str
    system: str
    python: str
    openssl: str
    congestion_control: str
    descriptors: int
    load_average: float

    @classmethod
    def inspect(cls) -> "Machine":
        """Return this machine in its current state."""
        models = [line for line in (PROC / "cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return cls(
            processor=models[0].partition(":")[2].strip() if models else platform.machine(),
            cores=os.cpu_count() or 0,
            memory_mib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
            kernel=platform.release(),
            system=platform.freedesktop_os_release().get("PRETTY_NAME", platform.system()),
            python=platform.python_version(),
            openssl=read_version("openssl", "version"),
            congestion_control=(PROC / "sys/net/ipv4/tcp_congestion_control").read_text().strip(),
            descriptors=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            load_average=os.getloadavg()[0],
        )


def find_runtime(program: Path) -> tuple[str, str]:
    """Return the versions of Python and its OpenSSL that run a program of a virtual environment."""
    code = "import platform, ssl; print(platform.python_version(), ssl.OPENSSL_VERSION, sep='\\n')"
    with program.open() as script:
        interpreter = script.readline().removeprefix("#!").split()
    result = subprocess.run([*interpreter, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    python, _, openssl = result.stdout.strip().partition("\n")
    return python, openssl


def read_version(*command: str) -> str:
    """Return the first line with a digit that the command prints, on either output; "unknown" without one."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return "unknown"
    lines = (result.stdout + result.stderr).splitlines()
    return next((line.strip() for line in lines if any(c.isdigit() for c in line)), "unknown")
