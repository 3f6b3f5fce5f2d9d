"""The parent keeps serving processes running; what happens to one of them does not affect the others."""

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.harness import (
    PROGRAM,
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    WebsocketsOrigin,
    child_environment,
    connect_tls,
    echo_bytes,
    eventually,
    handshake_request,
    receive_exactly,
    upgrade,
)
from tests.promises.edged import BY_PATH, edged
from tests.promises.firewalled import config_for
from tests.promises.numbered import Traffic

TWO = ("--processes", "2")


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(echo_bytes) as origin:
        yield origin


def _echoes(tunnel: Tunnel) -> None:
    with connect_tls(tunnel) as client:
        assert upgrade(client).status == 101
        client.sendall(b"ping")
        assert receive_exactly(client, 4) == b"ping"


def _counted(tunnel: Tunnel) -> list[int]:
    return [one["tunnels"] for one in tunnel.status()["processes"]]


def _states(tunnel: Tunnel) -> list[str]:
    return [one["state"] for one in tunnel.status()["processes"]]


def test_names_in_ps(origin: RawOrigin, certificate: Certificate) -> None:
    with Tunnel(origin.address, certificate, arguments=TWO) as tunnel:
        names = {Path(f"/proc/{pid}/comm").read_text() for pid in tunnel.pids}
        assert names == {"tlstunnel 1 g1\n", "tlstunnel 2 g1\n"}
        assert Path(f"/proc/{tunnel.parent}/comm").read_text() == "tlstunnel\n"


def test_no_process_leaves_a_core_dump(origin: RawOrigin, certificate: Certificate) -> None:
    """It would contain the keys. Neither a file, nor a pipe (kernel.core_pattern), which only ignores other limits."""
    with Tunnel(origin.address, certificate, errors_expected=True) as tunnel:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        for pid in (tunnel.parent, tunnel.pid):
            assert resource.prlimit(pid, resource.RLIMIT_CORE) == ((1, 1) if hard else (0, 0))
        os.kill(tunnel.pid, signal.SIGQUIT)  # ends with a core dump (signal(7))
        exited = tunnel.wait_record(lambda record: record["event"] == "process exited")
        assert exited["reason"] == "killed by SIGQUIT"
        assert not list(tunnel.folder.glob("core*"))


def test_the_kernel_spreads_connections_over_all(origin: RawOrigin, certificate: Certificate) -> None:
    with Tunnel(origin.address, certificate, arguments=TWO) as tunnel, ExitStack() as stack:
        for _ in range(40):
            assert upgrade(stack.enter_context(connect_tls(tunnel))).status == 101
        counted = _counted(tunnel)
        assert sum(counted) == 40
        assert min(counted) > 0  # the probability that this happens by chance is 1 in 2 ** 39


def test_status_as_json(origin: RawOrigin, certificate: Certificate) -> None:
    with Tunnel(origin.address, certificate, arguments=TWO) as tunnel:
        printed = json.loads("".join(tunnel.run_command("status", "--json")))
        assert printed.keys() == tunnel.status().keys()
        assert {one["process"] for one in printed["processes"]} == set(tunnel.pids)


def test_a_port_in_use_is_seen(origin: RawOrigin, certificate: Certificate) -> None:
    with Tunnel(origin.address, certificate, arguments=TWO) as tunnel:
        listen = f"127.0.0.1:{tunnel.port}"
        second = subprocess.run(
            [*PROGRAM, "start", origin.address, *TWO, "--listen", listen],
            cwd=tunnel.folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env=child_environment(),
        )
        assert second.returncode == 1
        assert f"cannot listen on {listen}: it is in use by another program" in second.stderr


def test_as_many_as_cores_with_auto(origin: RawOrigin, certificate: Certificate) -> None:
    core = min(os.sched_getaffinity(0))
    command = ["taskset", "--cpu-list", str(core)]
    with Tunnel(origin.address, certificate, arguments=("--processes", "auto")) as tunnel:
        assert len(tunnel.pids) == len(os.sched_getaffinity(0))
    said = subprocess.run(
        [*command, sys.executable, "-c", "from tlstunnel.processes.cores import count_usable; print(count_usable())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "1\n"


@pytest.mark.parametrize(("processes", "tunnels"), [(1, 50), (2, 400), pytest.param(2, 3000, marks=pytest.mark.soak)])
def test_a_killed_process_ends_its_own_tunnels_only(certificate: Certificate, processes: int, tunnels: int) -> None:
    """Clients that reconnect are served within a second, if the machine starts a tunnel in half a second."""
    start = time.monotonic()
    with (
        WebsocketsOrigin() as origin,
        Tunnel(
            origin.address, certificate, arguments=("--processes", str(processes)), errors_expected=True, measured=True
        ) as tunnel,
    ):
        started = time.monotonic() - start

        async def run() -> None:
            traffic = Traffic(tunnel)
            kept = await asyncio.gather(*(traffic.opened() for _ in range(tunnels)))
            await asyncio.gather(*(one.exchange() for one in kept))
            before = dict(zip(tunnel.pids, _counted(tunnel), strict=True))
            victim = max(before, key=lambda pid: before[pid])
            began = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            again = [await traffic.opened()]
            served = time.monotonic() - began
            assert served < max(1.0, 2 * started)
            ended = await asyncio.gather(*(one.exchange() for one in kept), return_exceptions=True)
            lost = [error for error in ended if error is not None]
            assert len(lost) == before[victim], "its own, and no other"
            again += await asyncio.gather(*(traffic.opened() for _ in lost))
            seconds = time.monotonic() - began
            print(f"{len(lost)} of {tunnels} lost; the first is back after {served:.2f} s, all after {seconds:.1f} s")
            await asyncio.gather(*(one.exchange() for one in again))
            await asyncio.gather(*(one.close() for one in (*kept, *again)))

        asyncio.run(run())
        assert [record["reason"] for record in tunnel.records("process exited")] == ["killed by SIGKILL"]
        eventually(lambda: len(tunnel.pids) == processes)


def test_a_dead_process_leaves_no_client_waiting(origin: RawOrigin, certificate: Certificate) -> None:
    """Clients that had connected to its socket are served by its sibling, before it is restarted."""
    with Tunnel(origin.address, certificate, arguments=TWO, errors_expected=True) as tunnel:
        victim = tunnel.pids[0]
        os.kill(victim, signal.SIGSTOP)
        with ExitStack() as stack:
            for _ in range(40):
                plain = socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT)
                stack.enter_context(plain)
            os.kill(victim, signal.SIGKILL)
            for _ in range(40):
                _echoes(tunnel)


def test_a_process_is_replaced_where_the_current_folder_was_replaced(
    origin: RawOrigin, certificate: Certificate, tmp_path: Path
) -> None:
    """A deployment may remove the folder of the previous release, in which the tunnel was started."""
    with Tunnel(origin.address, certificate, errors_expected=True) as tunnel:
        (tunnel.folder / "run").rename(tmp_path / "run")
        shutil.rmtree(tunnel.folder)
        tunnel.folder.mkdir()
        (tmp_path / "run").rename(tunnel.folder / "run")
        before = tunnel.pid
        os.kill(before, signal.SIGKILL)
        eventually(lambda: set(tunnel.pids) - {before})
        _echoes(tunnel)


def test_a_process_that_keeps_exiting_is_restarted_with_delays(origin: RawOrigin, certificate: Certificate) -> None:
    with Tunnel(origin.address, certificate, errors_expected=True) as tunnel:
        for _ in range(4):
            before = tunnel.pid
            os.kill(before, signal.SIGKILL)
            eventually(lambda before=before: set(tunnel.pids) - {before})  # type: ignore[misc]
            _echoes(tunnel)
        pauses = [record["retry_in"] for record in tunnel.records("process exited")]
        assert pauses[0] == 0
        assert pauses == sorted(pauses)
        assert pauses[-1] > 0


def test_the_parent_killed(origin: RawOrigin, certificate: Certificate) -> None:
    """Its processes stop accepting and drain; none is left."""
    settings = '[release]\ndrain_over = "1s"\n'
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(AssertionError, match="it exited with -9"))
        tunnel = stack.enter_context(Tunnel(origin.address, certificate, settings=settings, arguments=TWO))
        with connect_tls(tunnel) as client:
            assert upgrade(client).status == 101
            pids = tunnel.pids
            tunnel.send_signal(signal.SIGKILL)
            tunnel.wait_records(2, "parent exited")
            client.sendall(b"still here")
            assert receive_exactly(client, 10) == b"still here"
            with pytest.raises(ConnectionRefusedError):
                eventually(lambda: socket.create_connection(("127.0.0.1", tunnel.port), 1).close())
            assert client.recv(10) == b""
        for pid in pids:
            eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))  # type: ignore[misc]


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_more_and_fewer_processes_by_reload(certificate: Certificate) -> None:
    """No handshake fails and no tunnel ends meanwhile."""
    with WebsocketsOrigin() as origin:
        text = config_for(origin.address, certificate)
        counts = [3, 1, 2, 1]
        with Tunnel(None, certificate, config=f"processes = 1\n{text}", measured=True) as tunnel:

            def change(number: int) -> None:
                tunnel.reload(f"processes = {counts[number]}\n{text}")
                serving = [one for one in tunnel.status()["processes"] if one["state"] == "serving"]
                assert len(serving) == counts[number]

            async def run() -> None:
                traffic = Traffic(tunnel)
                await traffic.through(100, len(counts), change)
                await traffic.close()

            asyncio.run(run())
            eventually(lambda: len(tunnel.pids) == 1)
            assert [record for record in tunnel.records("connection") if record["status"] != 101] == []


def test_a_place_that_drains_can_be_filled_again(origin: RawOrigin, certificate: Certificate) -> None:
    """Draining takes as long as the tunnels last; a reload that asks for more processes does not wait for it."""
    text = config_for(origin.address, certificate)
    with Tunnel(None, certificate, config=f"processes = 2\n{text}") as tunnel, ExitStack() as stack:
        for _ in range(20):
            assert upgrade(stack.enter_context(connect_tls(tunnel))).status == 101
        tunnel.reload(f"processes = 1\n{text}")
        assert sorted(_states(tunnel)) == ["draining", "serving"]
        tunnel.reload(f"processes = 2\n{text}")
        assert sorted(_states(tunnel)) == ["draining", "serving", "serving"]


def test_fewer_processes_serve_every_socket(origin: RawOrigin, certificate: Certificate) -> None:
    text = config_for(origin.address, certificate)
    with Tunnel(None, certificate, config=f"processes = 3\n{text}") as tunnel:
        tunnel.reload(f"processes = 1\n{text}")
        for _ in range(30):
            _echoes(tunnel)


def test_socket_activation(origin: RawOrigin, certificate: Certificate, tmp_path: Path) -> None:
    """systemd's protocol, spoken by systemd's own tool if it is installed, else by hand (sd_listen_fds(3))."""
    with socket.create_server(("127.0.0.1", 0)) as given:
        port = given.getsockname()[1]
        script = (
            "import os, sys\n"
            f"os.dup2({given.fileno()}, 3)\n"
            'os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))\n'
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
        )
        control = tmp_path / "control.sock"
        command = [sys.executable, "-c", script, "-m", "tlstunnel", "start", origin.address, "--control", str(control)]
        command += ["--cert", str(certificate.cert), "--key", str(certificate.key), *TWO]
        process = subprocess.Popen(command, pass_fds=(given.fileno(),), cwd=tmp_path, env=child_environment())
    try:
        eventually(control.is_socket)
        said = subprocess.run(
            [*PROGRAM, "status", "--control", str(control)], capture_output=True, text=True, check=True
        )
        assert f"listening on 127.0.0.1:{port}\n" in said.stdout
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 0


def test_sigterm_during_the_start(origin: RawOrigin, certificate: Certificate, tmp_path: Path) -> None:
    """SIGTERM at any moment of the start ends it, and leaves no process."""
    for delay in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8):
        command = [*PROGRAM, "start", origin.address, "--listen", "127.0.0.1:0", *TWO]
        command += ["--cert", str(certificate.cert), "--key", str(certificate.key)]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=child_environment(), stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(delay)  # the moment is under test
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) in (0, -signal.SIGTERM)
        eventually(lambda process=process: not _in_session(process.pid))  # type: ignore[misc]


def _in_session(session: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_process_that_gets_sigterm_is_replaced_and_drains(
    origin: RawOrigin, certificate: Certificate, processes: str
) -> None:
    """SIGTERM to a process itself: its tunnels are drained, and clients that connect meanwhile do not notice."""
    settings = '[release]\ndrain_over = "60s"\n'
    arguments = ("--processes", processes)
    with (
        Tunnel(origin.address, certificate, settings=settings, arguments=arguments) as tunnel,
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(connect_tls(tunnel)) for _ in range(20)]
        for client in clients:
            assert upgrade(client).status == 101
        before = tunnel.pids
        os.kill(before[0], signal.SIGTERM)
        for _ in range(40):
            _echoes(tunnel)
        eventually(lambda: len(tunnel.pids) == len(before) + 1)
        eventually(lambda: _states(tunnel).count("serving") == len(before))
        for client in clients[-3:]:  # the oldest end first
            client.sendall(b"ping")
            assert receive_exactly(client, 4) == b"ping"


QUICKLY = {"TLSTUNNEL_WATCH": "0.1,0.4,600,600"}
"""Seconds between polls, until a process is silent, until it is killed, until its loop is hung."""


def test_a_process_that_hangs_delays_no_other(origin: RawOrigin, certificate: Certificate) -> None:
    """Its sibling takes over its connections, and it takes part again once it responds."""
    with Tunnel(origin.address, certificate, arguments=TWO, environment=QUICKLY) as tunnel:
        victim = tunnel.pids[0]
        os.kill(victim, signal.SIGSTOP)
        with ExitStack() as stack:
            stack.callback(os.kill, victim, signal.SIGCONT)
            # Half of these wait at the socket of the process that has stopped.
            waiting = [
                stack.enter_context(socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT)) for _ in range(20)
            ]
            silent = tunnel.wait_record(lambda record: record["event"] == "process does not respond")
            assert (silent["process"], silent["state"]) == (victim, "stopped")
            for client in waiting:
                client.sendall(b"GET / HTTP/1.1\r\n\r\n")  # not TLS
                assert client.recv(12) == b"HTTP/1.1 400"
            for _ in range(4):
                _echoes(tunnel)
            states = [(one["state"], one["tunnels"]) for one in tunnel.status()["processes"]]
            assert states == [("not responding", None), ("serving", 0)]
        tunnel.wait_record(lambda record: record["event"] == "process responds again")
        eventually(lambda: _states(tunnel) == ["serving", "serving"])
        assert tunnel.pids[0] == victim


@pytest.mark.parametrize("processes", [1, 2])
def test_a_reload_does_not_wait_for_a_process_that_hangs(
    origin: RawOrigin, certificate: Certificate, processes: int
) -> None:
    """The process is replaced when it responds again, because it has missed the reload."""
    text = f"processes = {processes}\n{config_for(origin.address, certificate)}"
    with Tunnel(None, certificate, config=text, environment=QUICKLY) as tunnel, ExitStack() as stack:
        victim = tunnel.pids[0]
        os.kill(victim, signal.SIGSTOP)
        stack.callback(os.kill, victim, signal.SIGCONT)
        tunnel.wait_record(lambda record: record["event"] == "process does not respond")
        (line,) = tunnel.reload(text.replace(str(certificate.cert), "none.pem"), status=1)
        assert "none.pem: cannot be read" in line  # checked by another process
        assert tunnel.reload(f"drain_removed = true\n{text}") == ["drain_removed: changed"]
        stack.close()
        eventually(lambda: victim not in tunnel.pids and len(tunnel.pids) == processes)
        assert tunnel.records("parent exited") == []


def test_a_process_that_stays_stopped_is_killed(origin: RawOrigin, certificate: Certificate) -> None:
    """Its place is taken, and clients that wait for it are served: it does not continue before it ends."""
    watch = {"TLSTUNNEL_WATCH": "0.1,0.5,1.2,600"}
    with Tunnel(origin.address, certificate, environment=watch, errors_expected=True) as tunnel:
        victim = tunnel.pid
        os.kill(victim, signal.SIGSTOP)
        with socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")  # not TLS
            assert client.recv(12) == b"HTTP/1.1 400"
        exited = tunnel.wait_record(lambda record: record["event"] == "process exited")
        assert exited["process"] == victim
        assert exited["reason"].startswith("it did not respond for ")
        events = [record["event"] for record in tunnel.records() if record.get("process") == victim]
        assert events == ["process does not respond", "process killed", "process exited"]


BACKTRACKING = (
    BY_PATH
    + """

async def backtrack(request, env):
    import re
    re.match("(a+)+$", "a" * 60 + "b")  # hours, in which nothing else of Python runs
"""
)


def test_a_process_that_keeps_hanging_is_killed(origin: RawOrigin, certificate: Certificate) -> None:
    """The log has the stacks of its threads."""
    watch = {"TLSTUNNEL_WATCH": "0.1,0.5,1.2,600"}
    with edged(origin.address, certificate, BACKTRACKING, environment=watch, errors_expected=True) as tunnel:
        victim = tunnel.pid
        with connect_tls(tunnel) as client:
            client.sendall(handshake_request("/backtrack"))
            with suppress(OSError):  # with or without a reset, it is lost with the process
                assert client.recv(1) == b""
        exited = tunnel.wait_record(lambda record: record["event"] == "process exited")
        assert exited["process"] == victim
        tunnel.wait_record(lambda record: record["event"] == "process stack" and "in backtrack" in str(record))
        events = [record["event"] for record in tunnel.records() if record.get("process") == victim]
        assert [event for event in events if event in ("process does not respond", "process killed")] == [
            "process does not respond",
            "process killed",
        ]
        _echoes(tunnel)


def test_a_pause_of_all_processes_is_not_a_hang(origin: RawOrigin, certificate: Certificate) -> None:
    """As in a virtual machine that was suspended."""
    watch = {"TLSTUNNEL_WATCH": "0.2,1,1.2,1"}
    with Tunnel(origin.address, certificate, arguments=TWO, environment=watch) as tunnel:
        before = tunnel.pids
        for pid in (tunnel.parent, *before):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.4)  # longer than any of the limits
        for pid in (tunnel.parent, *before):
            os.kill(pid, signal.SIGCONT)
        for _ in range(4):
            _echoes(tunnel)
        assert tunnel.pids == before


@pytest.mark.soak
def test_a_process_that_hangs_does_not_delay_the_exit(origin: RawOrigin, certificate: Certificate) -> None:
    settings = '[release]\ndrain_over = "0s"\n[timeouts]\nclose = "1s"\n'
    with Tunnel(origin.address, certificate, settings=settings, arguments=TWO) as tunnel:
        os.kill(tunnel.pids[0], signal.SIGSTOP)
        assert tunnel.stop(signal.SIGTERM, timeout=4 * TIMEOUT) == 0


def test_no_process_can_be_started(origin: RawOrigin, certificate: Certificate) -> None:
    """A tunnel that has run out of descriptors starts a process once it has some."""
    with Tunnel(origin.address, certificate, errors_expected=True) as tunnel:
        before = tunnel.pid
        resource.prlimit(tunnel.parent, resource.RLIMIT_NOFILE, (5, 20_000))
        os.kill(before, signal.SIGKILL)
        tunnel.wait_record(lambda record: record["event"] == "process not started")
        resource.prlimit(tunnel.parent, resource.RLIMIT_NOFILE, (20_000, 20_000))
        _echoes(tunnel)
