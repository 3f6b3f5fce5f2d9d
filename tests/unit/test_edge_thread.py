"""The workers' thread and its watchdog, the calls of a worker, and what is kept at a reload."""

import asyncio
import gc
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.handshakes import FIELDS, request
from tlstunnel.addresses import OriginAddress
from tlstunnel.config import OriginConfig, SiteConfig, Timeout, WorkerTable
from tlstunnel.edge import stage as stages
from tlstunnel.edge import worker as worker_module
from tlstunnel.edge import workers as workers_module
from tlstunnel.edge.stage import Directions, Edge
from tlstunnel.edge.thread import EdgeThread, TooLate, _CallQueue
from tlstunnel.edge.values import Forwarded, WorkerRequest, to_worker_request
from tlstunnel.edge.worker import Call, Worker
from tlstunnel.edge.workers import Workers
from tlstunnel.errors import ConfigurationError
from tlstunnel.handshake import request as handshake
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.metrics.families import EDGE_REQUESTS
from tlstunnel.metrics.registry import Registry
from tlstunnel.sockets.channel import Channel, ClientGone
from tlstunnel.sockets.deadlines import Wakeup

CONNECTION = Connection(
    ip="198.51.100.7",
    tls_version="TLSv1.3",
    tls_cipher="c",
    tls_sni="localhost",
    tls_ja4="t",
    site="localhost",
    request_id="id",
)
Logged = list[Any]

NOTES = "import asyncio, threading, time\nnotes = []\nlet_go = threading.Event()\n"
HOLDS = "async def fetch(request, env):\n    let_go.wait(20)\n    return request\n"
KEEPS = (
    "async def setup(config):\n    notes.append('setup')\n    return object()\n"
    "async def teardown(env):\n    notes.append('teardown')\n"
    "async def fetch(request, env):\n    notes.append(env)\n    return request\n"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "RESPONSE_SECONDS", 0.3)


@pytest.mark.parametrize("alone", [True, False])
def test_a_call_after_close_is_dropped(alone: bool) -> None:
    """As when a worker finishes after its tunnels are gone; an exception would be raised in its task."""
    calls: list[None] = []
    faults: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: faults.append(context))
        post = _CallQueue(loop, loop, lambda: alone)
        post.close()
        post.send(calls.append, None)
        for _ in range(3):
            await asyncio.sleep(0)

    asyncio.run(main())
    assert calls == faults == []


@pytest.fixture
def logged() -> Iterator[Logged]:
    with capture_logs() as logged:
        yield logged


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of workers' files and modules; at the end, blocked workers are released."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("edge_module_", "tlstunnel.edge.file")):
            if (held := getattr(sys.modules[name], "let_go", None)) is not None:
                held.set()
            del sys.modules[name]


def written(folder: Path, name: str, code: str) -> str:
    """Write a worker's file and return its reference."""
    (folder / f"{name}.py").write_text(NOTES + code)
    return f"{folder}/{name}.py:fetch" if name.startswith("file") else f"{name}:fetch"


def site(reference: str | None, name: str = "localhost", **more: Any) -> SiteConfig:
    return SiteConfig(
        names=(name,), worker=reference, origins=(OriginConfig(address=OriginAddress("localhost", 1)),), **more
    )


def workers(*sites: SiteConfig, before: Workers | None = None) -> Workers:
    return Workers(sites, Registry(), before)


def only(of: Workers) -> Worker:
    (worker,) = of._by_key.values()
    return worker


def globals_of(worker: Worker) -> dict[str, Any]:
    """Return the globals of the worker's module, even after it was removed from `sys.modules`."""
    return worker.code.fetch.__globals__


def upgrade() -> tuple[handshake.UpgradeRequest, WorkerRequest]:
    found = handshake.RequestReader().feed(request(FIELDS))
    assert found is not None
    return found, to_worker_request(found, CONNECTION, 0.0)


def alive(edge: EdgeThread) -> bool:
    return edge._thread.is_alive()


async def until(condition: Callable[[], object], seconds: float = 8.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.01)


async def answered(worker: Worker, seconds: float = 5.0) -> Call:
    """Call the worker, and wait for its result."""
    done = asyncio.Event()
    call = worker.call(upgrade()[1], done.set)
    try:
        async with asyncio.timeout(seconds):
            await done.wait()
    finally:
        call.close()
    return call


async def switched(of: Workers, before: Workers) -> Workers:
    """Switch to other workers, as a reload does."""
    await of.start()
    of.adopt()
    await before.close()
    return of


@asynccontextmanager
async def thread() -> AsyncIterator[EdgeThread]:
    made = EdgeThread()
    try:
        yield made
    finally:
        await made.stop()


def threads() -> int:
    return sum(one.name == "edge workers" for one in threading.enumerate())


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)
    assert threads() == 0


# --- the thread -------------------------------------------------------------------------------------------------------


def test_work_runs_there_and_calls_back_here() -> None:
    async def work() -> None:
        async with thread() as edge:
            assert alive(edge)

            async def where() -> str:
                await asyncio.sleep(0)
                return threading.current_thread().name

            assert await edge.run(where(), 5) == "edge workers"
            names: list[str] = []
            edge.send(lambda: edge.send_back(lambda: names.append(threading.current_thread().name)))
            await until(lambda: names)
            assert names == [threading.main_thread().name]
            assert await edge.responds(5)
        assert not alive(edge)

    run(work())


def test_an_exception_there_is_raised_here() -> None:
    async def fails() -> None:
        raise LookupError("there")

    async def work() -> None:
        async with thread() as edge:
            with pytest.raises(LookupError, match="there"):
                await edge.run(fails(), 5)
            began = time.monotonic()
            with pytest.raises(TooLate):
                await edge.run(asyncio.sleep(60), 0.1)
            assert time.monotonic() - began < 30

    run(work())


def test_the_switch_interval_is_shorter_once_it_runs() -> None:
    async def work() -> None:
        before = sys.getswitchinterval()
        try:
            sys.setswitchinterval(0.005)
            async with thread():
                assert sys.getswitchinterval() == pytest.approx(0.0005)
        finally:
            sys.setswitchinterval(before)

    run(work())


@pytest.mark.parametrize("how", ["exit", "interrupt", "stop", "exit in a callback"])
def test_it_survives_anything_that_stops_its_loop(logged: Logged, how: str) -> None:
    async def ends() -> None:
        loop = asyncio.get_running_loop()
        match how:
            case "exit":
                asyncio.create_task(exits(SystemExit(3))).add_done_callback(lambda task: task.exception())
            case "interrupt":
                asyncio.create_task(exits(KeyboardInterrupt())).add_done_callback(lambda task: task.exception())
            case "stop":
                loop.stop()
            case "exit in a callback":
                loop.call_soon(sys.exit, 3)

    async def exits(error: BaseException) -> None:
        raise error

    async def work() -> None:
        async with thread() as edge:
            await edge.run(ends(), 5)
            assert await edge.responds(5)
            assert alive(edge)

    run(work())
    said = [record for record in logged if record["event"] == "edge task tried to exit the process"]
    assert len(said) == (how != "stop")


def test_stop_cancels_what_runs_there() -> None:
    ended: list[str] = []

    async def for_ever(stubborn: bool) -> None:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                ended.append("cancelled")
                if not stubborn:
                    raise

    async def work() -> None:
        edge = EdgeThread()
        tasks = [asyncio.ensure_future(edge.run(for_ever(stubborn), 60)) for stubborn in (False, True)]
        assert await edge.responds(5)
        began = time.monotonic()
        await edge.stop()
        assert time.monotonic() - began < 30
        assert not alive(edge)
        assert len(ended) == 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(work())


def test_stop_does_not_wait_for_a_blocked_loop() -> None:
    let_go = threading.Event()

    async def holds() -> None:
        let_go.wait(20)

    async def work() -> None:
        edge = EdgeThread()
        held = asyncio.ensure_future(edge.run(holds(), 60))
        await asyncio.sleep(0.05)
        assert not await edge.responds(0.1)
        began = time.monotonic()
        await edge.stop()
        assert time.monotonic() - began < 10
        assert alive(edge)
        let_go.set()
        await until(lambda: not alive(edge))
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)

    run(work())


# --- the watchdog -----------------------------------------------------------------------------------------------------

BLOCKS = "edge worker blocks the event loop"
LOCKS = "edge worker holds the GIL"


async def _watched(reference: str, logged: Logged, event: str, seconds: float = 8.0) -> Any:
    """Call this worker until the watchdog has logged `event`, and return that line."""
    of = workers(site(reference))
    await of.start()
    try:
        await answered(only(of), 30)
        await until(lambda: [record for record in logged if record["event"] == event], seconds)
    finally:
        await of.close()
    (said,) = [record for record in logged if record["event"] == event]
    return said


def _line(folder: Path, name: str) -> int:
    lines = (folder / f"{name}.py").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith("# here"))


FETCH = "async def fetch(request, env):\n"
RETURNS = "    return request\n"
SLEEPS = "    time.sleep(0.6)  # here\n"
BLOCKING = {
    "sleep": FETCH + SLEEPS + RETURNS,
    "in a function": "def inner():\n    let_go.wait(0.6)  # here\n" + FETCH + "    inner()\n" + RETURNS,
    "in a coroutine": "async def inner():\n" + SLEEPS + FETCH + "    await inner()\n" + RETURNS,
    "busy": FETCH + "    end = time.monotonic() + 0.6\n    while time.monotonic() < end: pass  # here\n" + RETURNS,
    "in a library": "import subprocess\n" + FETCH + "    subprocess.run(['sleep', '0.6'])  # here\n" + RETURNS,
    "decorated": (
        "import functools\ndef logged(f):\n    @functools.wraps(f)\n    async def g(*a):\n        return await f(*a)\n"
        "    return g\n@logged\n" + FETCH + SLEEPS + RETURNS
    ),
}


@pytest.mark.parametrize("code", BLOCKING.values(), ids=BLOCKING)
def test_a_worker_that_blocks_the_loop_is_named_with_its_line(folder: Path, logged: Logged, code: str) -> None:
    async def work() -> None:
        reference = written(folder, "file", code)
        said = await _watched(reference, logged, BLOCKS)
        assert said["worker"] == reference
        assert said["line"] == f"{folder}/file.py:{_line(folder, 'file')}"
        assert said["code"].endswith("# here")
        assert said["log_level"] == "warning"
        assert 0.25 <= said["seconds"] < 20

    run(work())


def test_blocking_under_a_decorator_of_a_library_is_named_with_its_own_line(folder: Path, logged: Logged) -> None:
    (folder / "edge_module_library.py").write_text(
        "import functools\ndef checked(f):\n    @functools.wraps(f)\n    async def g(*a):\n"
        "        return await f(*a)\n    return g\n"
    )
    code = (
        "from edge_module_library import checked\n@checked\nasync def fetch(request, env):\n"
        "    time.sleep(0.6)  # here\n    return request\n"
    )

    async def work() -> None:
        said = await _watched(written(folder, "file", code), logged, BLOCKS)
        assert said["line"] == f"{folder}/file.py:{_line(folder, 'file')}"

    run(work())


def test_blocking_in_a_task_of_its_own_is_named(folder: Path, logged: Logged) -> None:
    code = (
        "async def beside():\n    time.sleep(0.6)  # here\n"
        "async def fetch(request, env):\n    await asyncio.create_task(beside())\n    return request\n"
    )

    async def work() -> None:
        reference = written(folder, "file", code)
        said = await _watched(reference, logged, BLOCKS)
        assert said["line"] == f"{folder}/file.py:{_line(folder, 'file')}"
        assert said["worker"] == reference

    run(work())


@pytest.mark.parametrize(
    "call", ["re.fullmatch('(a|aa)+b', 'a' * 34)", "sum(range(10 ** 8))", "re.fullmatch('(a+)+b', 'a' * 24)"]
)
def test_computing_in_c_is_named_once_it_is_over(folder: Path, logged: Logged, call: str) -> None:
    code = f"import re\nasync def fetch(request, env):\n    {call}  # here\n    return request\n"

    async def work() -> None:
        reference = written(folder, "file", code)
        said = await _watched(reference, logged, LOCKS)
        assert (said["worker"], said["line"]) == (reference, f"{folder}/file.py:{_line(folder, 'file')}")
        assert said["code"].endswith("# here")

    run(work())


def test_computing_in_c_is_named_despite_a_newer_thread(folder: Path, logged: Logged) -> None:
    """Such as one of `asyncio.to_thread`: faulthandler writes the newest thread first."""
    code = (
        "import re\nasync def fetch(request, env):\n    await asyncio.to_thread(time.sleep, 0)\n"
        "    re.fullmatch('(a+)+b', 'a' * 24)  # here\n    return request\n"
    )

    async def work() -> None:
        said = await _watched(written(folder, "file", code), logged, LOCKS, 2)
        assert said["line"] == f"{folder}/file.py:{_line(folder, 'file')}"

    run(work())


def test_blocking_is_logged_once_and_so_is_its_end(folder: Path, logged: Logged) -> None:
    async def work() -> None:
        reference = written(folder, "file", "async def fetch(request, env):\n    time.sleep(1)\n    return request\n")
        await _watched(reference, logged, "edge worker resumed")

    run(work())
    events = [record["event"] for record in logged]
    assert events == [BLOCKS, "edge worker resumed"]
    assert 0.8 < logged[1]["seconds"] < 20


def test_setup_is_watched_too(folder: Path, logged: Logged) -> None:
    async def work() -> None:
        code = "async def setup(config):\n" + SLEEPS + FETCH + RETURNS
        of = workers(site(written(folder, "file", code)))
        await of.start()
        await until(lambda: "edge worker resumed" in [record["event"] for record in logged])
        await of.close()

    run(work())
    assert logged[0]["line"] == f"{folder}/file.py:{_line(folder, 'file')}"


def test_awaiting_does_not_block_and_an_idle_thread_is_not_watched(folder: Path, logged: Logged) -> None:
    async def work() -> None:
        code = "async def fetch(request, env):\n    await asyncio.sleep(0.6)\n    return request\n"
        of = workers(site(written(folder, "file", code)))
        await of.start()
        edge = only(of).thread
        assert edge is not None
        await answered(only(of))
        await until(lambda: edge._timer is None)
        await of.close()

    run(work())
    assert logged == []


# --- a request's way --------------------------------------------------------------------------------------------------


def test_setup_gets_a_dict_and_returns_env(folder: Path) -> None:
    code = (
        "async def setup(config):\n    assert type(config) is dict\n    return config\n"
        "async def fetch(request, env):\n    notes.append((env, threading.current_thread().name))\n    return request\n"
    )

    async def work() -> None:
        of = workers(site(written(folder, "file", code), worker_config=WorkerTable(a=1)))
        await of.start()
        call = await answered(only(of))
        assert isinstance(call.outcome, Forwarded)
        assert globals_of(only(of))["notes"] == [({"a": 1}, "edge workers")]
        await of.close()

    run(work())


def test_its_exception_is_rendered_in_its_own_thread(folder: Path) -> None:
    """The text of an exception may be computed by the worker's code."""
    code = (
        "class Own(Exception):\n    def __str__(self):\n        notes.append(threading.current_thread().name)\n"
        "        return 'told'\n"
        "async def fetch(request, env):\n    raise Own\n"
    )

    async def work() -> None:
        of = workers(site(written(folder, "file", code)))
        await of.start()
        call = await answered(only(of))
        assert call.outcome is None
        assert "Own: told" in call.failure
        assert set(globals_of(only(of))["notes"]) == {"edge workers"}
        await of.close()

    run(work())


def test_a_failure_keeps_nothing_of_the_worker_alive(folder: Path) -> None:
    """The frames of a traceback refer to all local variables."""
    code = (
        "import weakref\nclass Big: ...\n"
        "async def fetch(request, env):\n    big = Big()\n    notes.append(weakref.ref(big))\n    raise ValueError\n"
    )

    async def work() -> None:
        of = workers(site(written(folder, "file", code)))
        await of.start()
        call = await answered(only(of))
        assert "ValueError" in call.failure
        await until(lambda: gc.collect() is not None and globals_of(only(of))["notes"][0]() is None)
        await of.close()

    run(work())


class _Client:
    """The part of a client's channel that the stage uses."""

    gone = False

    def check_gone(self) -> bool:
        return self.gone


def _edge(of: Workers, timeout: float, on_error: Any = "refuse", metrics: Registry | None = None) -> Edge:
    configured = site("x:fetch", worker_timeout=Timeout(timeout), worker_on_error=on_error)
    return Edge(
        only(of),
        None,  # type: ignore[arg-type]
        timeout=configured.worker_timeout,
        on_error=configured.worker_on_error,
        metrics=metrics if metrics is not None else Registry(),
    )


async def _ask(edge: Edge, client: Any = None, seconds: float = 0.1) -> Directions:
    """Call the stage as a connection does, with a deadline."""
    loop = asyncio.get_running_loop()
    wakeup = Wakeup(loop, loop.time() + seconds)
    timer = loop.call_later(seconds, wakeup.expire)
    if client is not None:
        client.fire = wakeup.fire
    channel: Any = client or _Client()
    channel.wakeup = wakeup
    try:
        return await edge.call(upgrade()[0], CONNECTION, channel)
    finally:
        timer.cancel()


def test_late_calls_are_bounded_and_counted_down(folder: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    """A worker that ignores cancellation is not called again until some of its calls have ended."""
    monkeypatch.setattr(stages, "MAX_LATE", 5)
    code = (
        "async def fetch(request, env):\n    notes.append('asked')\n    while not let_go.is_set():\n        try:\n"
        "            await asyncio.sleep(0.01)\n        except asyncio.CancelledError:\n            pass\n"
        "    return request\n"
    )

    async def work() -> None:
        of = workers(site(written(folder, "file", code)))
        await of.start()
        metrics = Registry()
        edge, module = _edge(of, 0.05, metrics=metrics), globals_of(only(of))
        for _ in range(5):
            with pytest.raises(Refusal) as late:
                await _ask(edge, seconds=0.05)
            assert late.value.status == 504
        assert only(of).late == 5
        with pytest.raises(Refusal) as busy:
            await _ask(edge)
        assert (busy.value.status, busy.value.reason) == (503, "edge: worker busy")
        assert len(module["notes"]) == 5
        forwarded = await _ask(_edge(of, 0.05, "forward", metrics))
        assert (forwarded.outcome, forwarded.pool) == ("busy", None)
        module["let_go"].set()
        await until(lambda: only(of).late == 0)
        assert (await _ask(edge, seconds=5)).outcome == "forwarded"
        outcomes = {outcome: count for (_, outcome), count in metrics[EDGE_REQUESTS].values.items()}
        assert outcomes == {"timed out": 5, "busy": 2, "forwarded": 1}
        await of.close()

    run(work())
    assert [record["late"] for record in logged if record["event"] == "edge worker busy"] == [5, 5]


def test_a_call_that_is_cancelled_before_it_starts_never_starts(folder: Path) -> None:
    """The thread is blocked meanwhile: requests that timed out do not start once it is released."""
    code = "async def fetch(request, env):\n    notes.append('asked')\n    let_go.wait(20)\n    return request\n"

    async def work() -> None:
        of = workers(site(written(folder, "file", code)))
        await of.start()
        edge = _edge(of, 0.05)
        for _ in range(3):
            with pytest.raises(Refusal):
                await _ask(edge, seconds=0.05)
        assert only(of).late == 3
        globals_of(only(of))["let_go"].set()
        await until(lambda: only(of).late == 0)
        assert globals_of(only(of))["notes"] == ["asked"]
        await of.close()

    run(work())


def test_a_client_that_leaves_cancels_its_call(folder: Path) -> None:
    code = (
        "async def fetch(request, env):\n    notes.append('asked')\n    try:\n        await asyncio.sleep(60)\n"
        "    finally:\n        notes.append('cancelled')\n"
    )

    async def work() -> None:
        of = workers(site(written(folder, "file", code)))
        await of.start()
        client: Any = _Client()
        asking = asyncio.ensure_future(_ask(_edge(of, 60), client, seconds=60))
        module = globals_of(only(of))
        await until(lambda: module["notes"])
        client.gone = True
        client.fire()
        with pytest.raises(ClientGone):
            await asking
        await until(lambda: module["notes"] == ["asked", "cancelled"])
        await until(lambda: only(of).late == 0)
        await of.close()

    run(work())


def test_nothing_is_kept_of_finished_requests(folder: Path) -> None:
    async def work() -> None:
        of = workers(site(written(folder, "file", "async def fetch(request, env):\n    return request\n")))
        await of.start()
        edge = _edge(of, 5)
        await _ask(edge, seconds=5)
        found = upgrade()[0]
        gone = weakref.ref(to_worker_request(found, CONNECTION, 0.0))
        assert gone() is None
        gc.collect()
        # Not isinstance: it would run the code of foreign objects that have a __class__ of their own.
        kept = Call, WorkerRequest
        before = sum(type(one) in kept for one in gc.get_objects())
        for _ in range(50):
            await _ask(edge, seconds=5)
        await asyncio.sleep(0)
        gc.collect()
        assert sum(type(one) in kept for one in gc.get_objects()) <= before + 2
        await of.close()

    run(work())


# --- setup and teardown -----------------------------------------------------------------------------------------------


def test_setup_and_teardown_are_called_once(folder: Path) -> None:
    """Also if several sites have the same worker with the same settings; other settings make another worker."""
    reference = written(folder, "file", KEEPS)

    async def work() -> None:
        of = workers(site(reference), site(reference, "b"), site(reference, "c", worker_config=WorkerTable(a=1)))
        assert len(of._by_key) == 2
        await of.start()
        notes = globals_of(next(iter(of._by_key.values())))["notes"]
        assert notes == ["setup", "setup"]
        await of.close()
        await of.close()
        assert notes == ["setup", "setup", "teardown", "teardown"]

    run(work())


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise LookupError('no such key')", "its setup failed: {file}:5: LookupError: no such key"),
        ("import sys; sys.exit(1)", "its setup failed: {file}:5: SystemExit: 1"),
        ("raise KeyboardInterrupt", "its setup failed: {file}:5: KeyboardInterrupt"),
        ("raise asyncio.CancelledError", "its setup failed: "),
        ("asyncio.current_task().cancel(); await asyncio.sleep(0)", "its setup failed: "),
        ("config['none']", "its setup failed: {file}:5: KeyError: 'none'"),
        ("raise ValueError('\\x1b[2J\\n')", "ValueError: \\x1b[2J"),
    ],
)
def test_a_failed_setup_leaves_nothing_behind(folder: Path, code: str, said: str) -> None:
    reference = written(folder, "file", f"async def setup(config):\n    {code}\nasync def fetch(request, env): ...\n")

    async def work() -> None:
        for _ in range(3):
            with pytest.raises(ConfigurationError) as caught:
                await workers(site(reference)).start()
        message = str(caught.value)
        assert message.startswith(f"the edge worker {reference}: ")
        assert said.format(file=f"{folder}/file.py") in message
        assert message.isprintable()
        await until(lambda: threads() == 0)

    run(work())
    assert [name for name in sys.modules if name.startswith("tlstunnel.edge.file")] == []


def test_a_setup_that_raises_a_timeout_of_its_own(folder: Path) -> None:
    """As from a database that does not respond."""
    code = "async def setup(config):\n    raise TimeoutError('no database')\nasync def fetch(request, env): ...\n"

    async def work() -> None:
        with pytest.raises(ConfigurationError) as caught:
            await workers(site(written(folder, "file", code))).start()
        assert "no database" in str(caught.value)
        assert "took longer" not in str(caught.value)

    run(work())


def test_a_setup_that_takes_too_long_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "SETUP_SECONDS", 0.3)

    async def work() -> None:
        for name, line in (("file_a", "await asyncio.sleep(60)"), ("file_b", "time.sleep(1)  # here")):
            code = f"async def setup(config):\n    {line}\nasync def fetch(request, env): ...\n"
            began = time.monotonic()
            with pytest.raises(ConfigurationError, match=r"its setup took longer than 0.3 s; it is at ") as caught:
                await workers(site(written(folder, name, code))).start()
            assert time.monotonic() - began < 30
            if "here" in line:
                assert f"{folder}/file_b.py:5" in str(caught.value)
        await until(lambda: threads() == 0)

    run(work())


def test_if_the_second_setup_fails_the_first_is_torn_down(folder: Path) -> None:
    good = written(folder, "file_a", KEEPS)
    bad = written(
        folder, "file_b", "async def setup(config):\n    raise ValueError\nasync def fetch(request, env): ...\n"
    )

    async def work() -> None:
        of = workers(site(good), site(bad, "b"))
        notes = globals_of(next(iter(of._by_key.values())))["notes"]
        with pytest.raises(ConfigurationError, match="ValueError"):
            await of.start()
        assert notes == ["setup", "teardown"]
        await until(lambda: threads() == 0)

    run(work())


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("raise ValueError('no')", "edge worker teardown failed"),
        ("import sys; sys.exit(1)", "edge worker teardown failed"),
        ("await asyncio.sleep(60)", "edge worker teardown timed out"),
        ("time.sleep(0.6)", "edge worker teardown timed out"),
        ("raise asyncio.CancelledError", "edge worker teardown failed"),
    ],
)
def test_a_failed_teardown_does_not_block_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, logged: Logged, code: str, event: str
) -> None:
    monkeypatch.setattr(worker_module, "TEARDOWN_SECONDS", 0.3)
    bad = written(folder, "file_a", f"async def teardown(env):\n    {code}\nasync def fetch(request, env): ...\n")
    good = written(folder, "file_b", KEEPS)

    async def work() -> None:
        of = workers(site(bad), site(good, "b"))
        notes = globals_of(list(of._by_key.values())[1])["notes"]
        await of.start()
        try:
            await of.close()
        except asyncio.CancelledError:
            for one in threading.enumerate():
                if one.name == "edge workers":
                    edge = list(of._by_key.values())[1].thread
                    assert edge is not None
                    await edge.stop()
            pytest.fail("CancelledError")
        assert notes[0] == "setup"
        await until(lambda: threads() == 0)

    run(work())
    assert event in [record["event"] for record in logged]


# --- over a reload ----------------------------------------------------------------------------------------------------


def test_a_module_keeps_its_env_and_a_file_does_not(folder: Path) -> None:
    module, file = written(folder, "edge_module_t1", KEEPS), written(folder, "file", KEEPS)

    async def work() -> None:
        one = workers(site(module), site(file, "b"))
        await one.start()
        kept, old = one._by_key.values()
        first = await answered(kept)
        assert isinstance(first.outcome, Forwarded)
        two = await switched(workers(site(module), site(file, "b"), before=one), one)
        again, new = two._by_key.values()
        assert new is not old
        assert again is not kept
        await answered(again)
        setup, env, same = globals_of(kept)["notes"]
        assert (setup, env) == ("setup", same)
        assert globals_of(old)["notes"] == ["setup", "teardown"]
        assert globals_of(new)["notes"] == ["setup"]
        # The third has other settings for the module, so it is set up again, and the old one is torn down.
        changed = site(module, worker_config=WorkerTable(a=1))
        three = await switched(workers(changed, before=two), two)
        assert globals_of(kept)["notes"][3:] == ["setup", "teardown"]
        assert globals_of(new)["notes"] == ["setup", "teardown"]
        await three.close()
        assert globals_of(kept)["notes"][3:] == ["setup", "teardown", "teardown"]

    run(work())


def test_an_abandoned_configuration_changes_nothing(folder: Path) -> None:
    module, file = written(folder, "edge_module_t2", KEEPS), written(folder, "file", KEEPS)

    async def work() -> None:
        one = workers(site(module), site(file, "b"))
        await one.start()
        prepared = workers(site(module), site(file, "b"), before=one)
        await prepared.start()
        new = list(prepared._by_key.values())[1]
        await prepared.close()
        assert globals_of(new)["notes"] == ["setup", "teardown"]
        for worker in one._by_key.values():
            call = await answered(worker)
            assert call.outcome is not None
            assert "teardown" not in globals_of(worker)["notes"]
        await one.close()

    run(work())


def test_a_removed_worker_is_torn_down_and_the_thread_ends(folder: Path) -> None:
    module = written(folder, "edge_module_t3", KEEPS)

    async def work() -> None:
        one = workers(site(module))
        await one.start()
        notes = globals_of(only(one))["notes"]
        two = await switched(workers(site(None), before=one), one)
        assert notes == ["setup", "teardown"]
        await until(lambda: threads() == 0)
        three = await switched(workers(site(module), before=two), two)
        assert notes == ["setup", "teardown", "setup"]
        assert (await answered(only(three))).outcome is not None
        await three.close()

    run(work())


def test_many_reloads_leave_nothing(folder: Path) -> None:
    module, file = written(folder, "edge_module_t4", KEEPS), written(folder, "file", KEEPS)

    async def work() -> None:
        of = workers(site(module), site(file, "b"))
        await of.start()
        gone = weakref.ref(list(of._by_key.values())[1])
        for _ in range(10):
            of = await switched(workers(site(module), site(file, "b"), before=of), of)
        assert threads() == 1
        await until(lambda: gc.collect() is not None and gone() is None)
        assert len([name for name in sys.modules if name.startswith("tlstunnel.edge.file")]) == 1
        await of.close()

    run(work())
    assert [name for name in sys.modules if name.startswith("tlstunnel.edge.file")] == []


def test_a_blocked_thread_is_replaced(folder: Path, logged: Logged) -> None:
    """Modules are set up again in the new thread, because their environment belongs to the blocked loop."""
    module = written(folder, "edge_module_t5", KEEPS)
    file = written(folder, "file", HOLDS)

    async def work() -> None:
        one = workers(site(module), site(file, "b"))
        await one.start()
        kept, holder = one._by_key.values()
        with pytest.raises(TimeoutError):
            await answered(holder, 0.2)
        old = kept.thread
        written(folder, "file", KEEPS)
        two = await switched(workers(site(module), site(file, "b"), before=one), one)
        moved = next(iter(two._by_key.values()))
        assert moved.thread is not old
        for worker in two._by_key.values():
            assert (await answered(worker)).outcome is not None
        assert globals_of(moved)["notes"].count("setup") == 2
        globals_of(holder)["let_go"].set()
        assert old is not None
        await until(lambda: not alive(old))
        await two.close()

    run(work())
    assert "edge thread replaced" in [record["event"] for record in logged]


def test_a_request_in_flight_when_the_thread_is_replaced(folder: Path) -> None:
    """The watchdog of the new thread counts its own calls only."""
    module = written(folder, "edge_module_t6", HOLDS)

    async def work() -> None:
        one = workers(site(module))
        await one.start()
        worker = only(one)
        holding = asyncio.ensure_future(answered(worker, 20))
        await asyncio.sleep(0.05)
        two = await switched(workers(site(module), before=one), one)
        globals_of(worker)["let_go"].set()
        await holding
        edge = worker.thread
        assert edge is not None
        try:
            assert edge._watchers == 0
        finally:
            await two.close()

    run(work())


def test_late_calls_of_an_abandoned_thread_do_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that was blocked until it was no longer called is called again in the new thread."""
    monkeypatch.setattr(stages, "MAX_LATE", 3)
    module = written(
        folder,
        "edge_module_t7",
        "async def fetch(request, env):\n    let_go.wait(env)\n    return request\n"
        "async def setup(config):\n    return None if not notes and not notes.append(1) else 0\n",
    )

    async def work() -> None:
        one = workers(site(module))
        await one.start()
        for _ in range(3):
            with pytest.raises(Refusal):
                await _ask(_edge(one, 0.05), seconds=0.05)
        two = await switched(workers(site(module), before=one), one)
        try:
            assert (await _ask(_edge(two, 5), seconds=5)).outcome == "forwarded"
        finally:
            globals_of(only(two))["let_go"].set()
            await until(lambda: threads() == 1)
            await two.close()

    run(work())


REFUSED = "async def setup(config):\n    raise ValueError\nasync def fetch(request, env): ...\n"


@pytest.mark.parametrize("name", ["file", "edge_module_t8"])
def test_a_blocked_thread_and_a_refused_reload(folder: Path, name: str) -> None:
    """The old workers work again once the thread is released."""
    old, bad = written(folder, name, HOLDS), written(folder, "file_bad", REFUSED)

    async def work() -> None:
        one = workers(site(old))
        await one.start()
        worker = only(one)
        with pytest.raises(TimeoutError):
            await answered(worker, 0.1)
        with pytest.raises(ConfigurationError, match="ValueError"):
            await workers(site(bad), before=one).start()
        globals_of(worker)["let_go"].set()
        try:
            await until(lambda: threads() <= 1, 3)
            assert (await answered(worker, 2)).outcome is not None
        finally:
            await one.close()

    run(work())


@pytest.mark.filterwarnings("ignore:coroutine 'sleep' was never awaited")
def test_a_refused_first_worker_and_then_a_valid_one(folder: Path) -> None:
    good, bad = written(folder, "file", KEEPS), written(folder, "file_bad", REFUSED)

    async def work() -> None:
        none = workers(site(None))
        await none.start()
        with pytest.raises(ConfigurationError, match="ValueError"):
            await workers(site(bad), before=none).start()
        try:
            two = await switched(workers(site(good), before=none), none)
        except RuntimeError as error:
            said = str(error)
        else:
            assert (await answered(only(two))).outcome is not None
            return await two.close()
        pytest.fail(said)

    run(work())


def test_the_channel_has_what_the_stage_uses() -> None:
    """`_Client` above is its substitute."""
    assert "gone" in Channel.__slots__
