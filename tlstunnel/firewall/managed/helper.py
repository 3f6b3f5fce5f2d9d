"""A helper: a process that loads rule sets once, and evaluates in a child that can be killed at any time.

The pool starts it by fork and exec. It loads the rules, then forks a child, and for each child that exits the next one.
A fork takes 2 ms, loading 100 or more. So a request that makes libmodsecurity hang costs its own deadline, and does not
delay others for seconds. A helper has one thread, no event loop, and no descriptor of the tunnel except its end of the
socket.

    python -m tlstunnel.firewall.managed.helper DESCRIPTOR PARENT
"""

import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.managed.messages import (
    END_OF_RULES,
    MAX_PACKET,
    EvaluationRequest,
    EvaluationResult,
    FromHelper,
    Ready,
    RuleSet,
    RulesLoaded,
)
from tlstunnel.firewall.managed.modsecurity import ModSecurity
from tlstunnel.program import forbid_core_dumps

EVALUATIONS = 100_000
"""Evaluations after which a child is replaced, in case it leaks memory: about two minutes at full rate."""

NICENESS = 5
"""Established tunnels have precedence when CPU time is short."""

EVALUATION_MEMORY = 268_435_456
"""Bytes that evaluations may use in addition to the rules. They use about 1 MiB."""

_FINISHED = 0
_RECYCLED = 3
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


def serve(connection: socket.socket, library: ModSecurity, loaded: Sequence[int], evaluations: int) -> bool:
    """Evaluate requests until the pool closes the socket (False), or `evaluations` times (True)."""
    connection.setblocking(False)
    with suppress(BlockingIOError):
        # Discard what a killed predecessor did not read: the pool no longer waits for it.
        while connection.recv(MAX_PACKET):
            pass
        return False
    connection.setblocking(True)
    _send(connection, Ready(os.getpid()))
    decoder = msgspec.msgpack.Decoder(EvaluationRequest)
    for made in range(1, evaluations + 1):
        packet = connection.recv(MAX_PACKET)
        if not packet:
            return False
        question = decoder.decode(packet)
        evaluation = library.evaluate(loaded[question.rule_set], question.subject)
        _send(connection, EvaluationResult(question.number, evaluation, last=made == evaluations))
    return True


def load(connection: socket.socket, library: ModSecurity | None = None) -> tuple[ModSecurity, list[int]] | None:
    """Load the rule sets that the pool sends first, and report the result. Return None if that fails."""
    rule_sets = []
    decoder = msgspec.msgpack.Decoder(RuleSet)
    while (packet := connection.recv(MAX_PACKET)) != END_OF_RULES:
        if not packet:
            return None
        rule_sets.append(decoder.decode(packet))
    try:
        library = library or ModSecurity()
        loaded = [library.load(rule_set) for rule_set in rule_sets]
    except ConfigurationError as error:
        _send(connection, RulesLoaded(str(error)))
        return None
    _send(connection, RulesLoaded())
    return library, loaded


def _send(connection: socket.socket, message: FromHelper) -> None:
    connection.sendall(msgspec.msgpack.encode(message))


def main(arguments: Sequence[str]) -> int:
    """Run a helper, and return the exit status."""
    descriptor, parent, evaluations = map(int, arguments)
    _die_with(parent)
    _drop_privileges()
    with socket.socket(fileno=descriptor) as connection, suppress(BrokenPipeError, ConnectionResetError):
        ready = load(connection)
        if ready is None:
            return 1
        # Garbage collections in a child would copy the pages that it shares with this process.
        gc.collect()
        gc.freeze()
        gc.disable()
        _limit_resources()
        while True:
            began = time.monotonic()
            child = os.fork()
            if not child:
                _run_child(connection, *ready, evaluations)
            if os.waitpid(child, 0)[1] == _FINISHED:
                return 0
            if time.monotonic() - began < 0.01:
                time.sleep(0.01)  # a child that fails at once must not use all CPU time
    return 0


def _run_child(connection: socket.socket, library: ModSecurity, loaded: Sequence[int], evaluations: int) -> None:
    status = 1
    try:
        _die_with(os.getppid())
        status = _RECYCLED if serve(connection, library, loaded, evaluations) else _FINISHED
    except (BrokenPipeError, ConnectionResetError):
        status = _FINISHED
    finally:
        os._exit(status)


def _die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent exits, even during an evaluation."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it exited before the call
        os._exit(1)


def _drop_privileges() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    forbid_core_dumps()  # requests contain passwords
    with suppress(OSError):
        os.nice(NICENESS)


def _limit_resources() -> None:
    """Limit memory, and forbid new files and sockets: everything is loaded, and libmodsecurity needs no more."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            most = int(line.split()[1]) * 1024 + EVALUATION_MEMORY
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
