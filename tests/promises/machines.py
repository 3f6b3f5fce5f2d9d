"""Two machines for a test: network namespaces, each with a cable to this one."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from tests.harness import missing, require


@dataclass(frozen=True, slots=True)
class Machine:
    """A network namespace with the address `own`, which reaches this machine at `host`."""

    name: str
    own: str
    host: str

    @property
    def wrapper(self) -> tuple[str, ...]:
        """The command that executes a program there."""
        return require("ip", "iproute2"), "netns", "exec", self.name


@contextlib.contextmanager
def connected_machines(count: int = 2) -> Iterator[list[Machine]]:
    """Make network namespaces, and remove them afterwards. Calls `missing` without the right to make them."""
    ip = require("ip", "iproute2")
    if os.geteuid() != 0:
        missing("network namespaces need root")

    def run(*words: str) -> None:
        done = subprocess.run([ip, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            missing(f"ip {' '.join(words)}: {done.stderr.strip()}")

    with contextlib.ExitStack() as stack:
        machines = []
        for number in range(1, count + 1):
            net = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 64 * 4 + number}"
            machine = Machine(f"tlstunnel-{os.getpid()}-{number}", f"{net}.2", f"{net}.1")
            ours, theirs = f"tt{os.getpid()}n{number}", f"tt{os.getpid()}m{number}"
            run("netns", "add", machine.name)
            stack.callback(subprocess.run, [ip, "netns", "delete", machine.name], check=True)
            run("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", machine.name)
            run("address", "add", f"{machine.host}/30", "dev", ours)
            run("link", "set", ours, "up")
            run("-n", machine.name, "address", "add", f"{machine.own}/30", "dev", theirs)
            run("-n", machine.name, "link", "set", theirs, "up")
            run("-n", machine.name, "link", "set", "lo", "up")
            machines.append(machine)
        yield machines
