"""Which children hang: the watch without I/O, and the thread that responds."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.processes.children import Child, Identity, Role
from tlstunnel.processes.guard import Guard, parse_stacks
from tlstunnel.processes.pulse import Pulse, Responder
from tlstunnel.processes.watch import VARIABLE, Finding, Watch, WatchTimes

TIMES = WatchTimes(every=1.0, silent=5.0, kill=30.0)


def check(watch: Watch[str], first: int, last: int) -> list[tuple[float, str, Finding]]:
    """Check each second; return when there was which finding."""
    return [(now, key, finding) for now in range(first, last + 1) for key, finding, _ in watch.check(float(now))]


def test_a_child_that_responds() -> None:
    watch = Watch[str](TIMES, 0.0)
    watch.add("a", 0.0)
    for now in range(1, 100):
        assert watch.check(float(now)) == []
        assert list(watch.note_response("a", now + 0.1)) == []


def test_a_child_that_hangs() -> None:
    watch = Watch[str](TIMES, 0.0)
    watch.add("a", 0.0)
    assert check(watch, 1, 100) == [(5, "a", Finding.SILENT), (30, "a", Finding.HUNG)]
    assert list(watch.note_response("a", 100.0)) == []  # it is being killed
    watch.discard("a")
    assert check(watch, 101, 200) == []


def test_a_child_that_responds_again() -> None:
    watch = Watch[str](TIMES, 0.0)
    watch.add("a", 0.0)
    assert check(watch, 1, 29) == [(5, "a", Finding.SILENT)]
    assert list(watch.note_response("a", 29.0)) == [Finding.RESPONDS]
    assert check(watch, 30, 59) == [(34, "a", Finding.SILENT), (59, "a", Finding.HUNG)]


def test_a_pause_of_the_parent_does_not_count() -> None:
    watch = Watch[str](TIMES, 0.0)
    watch.add("a", 0.0)
    assert check(watch, 1, 4) == []
    assert check(watch, 100, 104) == []
    assert check(watch, 105, 129) == [(105, "a", Finding.SILENT)]
    assert check(watch, 1000, 1029) == []
    assert check(watch, 1030, 1030) == [(1030, "a", Finding.HUNG)]


@given(st.lists(st.floats(0.5, 20.0), max_size=100), st.data())
def test_no_child_is_killed_unless_the_parent_polled_it_on_schedule(steps: list[float], data: st.DataObject) -> None:
    """Whatever the times: 30 s of silence before it is killed, in which no two checks were over 2 s apart."""
    watch = Watch[str](TIMES, 0.0)
    watch.add("a", 0.0)
    now = began = 0.0
    for step in steps:
        began = now + step if step > 2.0 else began
        now += step
        for _, finding, silence in watch.check(now):
            assert silence == pytest.approx(now - began)
            assert silence >= (30.0 if finding is Finding.HUNG else 5.0)
            if finding is Finding.HUNG:
                return
        if data.draw(st.booleans()):
            list(watch.note_response("a", now))
            began = now


@pytest.mark.parametrize("text", ["", "1,2,3", "a,b,c,d", "0,1,2,3", "1,2,nan,3", "1,inf,2,3"])
def test_malformed_times_are_ignored(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert WatchTimes.from_environment() == WatchTimes()
    monkeypatch.setenv(VARIABLE, "1,2,3,4")
    assert WatchTimes.from_environment() == WatchTimes(1, 2, 3, 4)


def test_a_busy_loop_responds() -> None:
    """Whether it computes in Python or waits in a library; but not if it does nothing else for long."""

    async def run() -> None:
        responses: list[float] = []
        pulse, theirs = Pulse.create(lambda: responses.append(time.monotonic()))
        responder = Responder(theirs, pulse.stacks, 0.2)
        previous = signal.getsignal(signal.SIGUSR1)
        responder.start()
        try:
            pulse.poll()
            while not responses:
                await asyncio.sleep(0.001)
            pulse.poll()
            await asyncio.sleep(0)
            deadline = time.monotonic() + 0.1
            while time.monotonic() < deadline:  # busy
                sum(range(1000))
            while len(responses) < 2:
                await asyncio.sleep(0.001)
            time.sleep(0.3)  # blocks the loop, longer than it may
            pulse.poll()
            time.sleep(0.1)
            assert len(responses) == 2
            while len(responses) < 3:  # it runs again
                pulse.poll()
                await asyncio.sleep(0.01)
        finally:
            responder.close()
            pulse.close()
            signal.signal(signal.SIGUSR1, previous)

    asyncio.run(run())


def test_a_child_is_watched_however_long_it_takes_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes may be paused between the request and the reply."""

    async def watch() -> bool:
        ours, theirs = socket.socketpair()
        pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"], {})
        child = Child(pid, Identity(Role.SERVING, 1, 1), ours, {})
        try:
            guard = Guard(TIMES, lambda _: None, lambda _: None)
            watching = asyncio.ensure_future(guard.watch(child))
            await asyncio.sleep(0)
            await asyncio.wait([watching], timeout=0.1)
            number = json.loads(theirs.recv(4096))["ask"]
            theirs.send(json.dumps({"answer": number, "ok": True, "fds": 0}).encode() + b"\n")
            await watching
            return child.pulse is not None
        finally:
            child.kill()
            await child.process.wait()
            theirs.close()

    monkeypatch.setattr(Child.request, "__defaults__", (0.01, ()))
    assert asyncio.run(watch())


def test_stacks_are_written_before_a_stopped_process_ends() -> None:
    """By a signal that it gets while it is stopped; it does not run on."""
    stacks = os.memfd_create("test")
    script = f"""
import faulthandler, signal, sys, threading, time
faulthandler.register(signal.SIGUSR1, {stacks}, all_threads=True, chain=True)
threading.Thread(target=lambda: time.sleep(100), daemon=True).start()
def wait_here():
    print("ready", flush=True)
    time.sleep(100)
wait_here()
"""
    process = subprocess.Popen([sys.executable, "-c", script], pass_fds=(stacks,), stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == -signal.SIGUSR1
    found = dict(parse_stacks(os.pread(stacks, 65_536, 0).decode()))
    os.close(stacks)
    assert len(found) == 2
    assert any("wait_here" in frame for frames in found.values() for frame in frames)


def test_stacks_are_limited_and_escaped() -> None:
    text = "Current thread 0x01 (most recent call first):\n" + '  File "\x1b", line 1 in f\n' * 100 + "\nThread 0x02:\n"
    [(thread, frames)] = parse_stacks(text)
    assert thread == "Current thread 0x01"
    assert len(frames) == 20
    assert frames[0] == 'File "\\x1b", line 1 in f'
