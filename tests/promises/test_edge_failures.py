"""A worker that fails, is late or returns nonsense affects only its own request: a 500 or 504 with an id.

The log has the rest. With `worker_on_error = "forward"` the request is forwarded unchanged, but not if the worker meant
to refuse it with an invalid reply.
"""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.harness import (
    PROGRAM,
    TIMEOUT,
    Certificate,
    Record,
    Tunnel,
    assert_below,
    child_environment,
    connect_tls,
    eventually,
    handshake_request,
    reset,
)
from tests.promises.edged import BY_PATH, attempt, edged, reply_json
from tests.promises.firewalled import Outcome, Servers, config_for
from tests.promises.scripted_origin import ScriptedOrigin
from tests.promises.wire import MemoryTlsClient

WORKER = (
    BY_PATH
    + '''
events = []


class Broken(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Own(BaseException):
    pass


def inner():
    raise LookupError("no such shard: secret-of-the-worker")


async def raises(request, env):
    request = request.forward(headers={"X-Late": "1"})
    inner()


async def says(request, env):
    raise ValueError(request.query["text"])


async def broken(request, env):
    raise Broken


async def own(request, env):
    raise Own


async def recurses(request, env):
    return await recurses(request, env)


async def group(request, env):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(raises(request, env))
        tasks.create_task(says(request, env))


async def cancels_itself(request, env):
    asyncio.current_task().cancel()
    await asyncio.sleep(0)


async def exits(request, env):
    sys.exit(3)


async def interrupts(request, env):
    raise KeyboardInterrupt


async def stops_the_loop(request, env):
    asyncio.get_running_loop().stop()
    return request


async def exits_beside(request, env):
    async def beside():
        sys.exit(3)

    task = asyncio.create_task(beside())
    task.add_done_callback(lambda task: task.exception())
    await asyncio.sleep(0.01)
    return request


async def endpoint(request, env):
    return Reply(int(request.query["status"]), "hello")


async def spoilt(request, env):
    return Reply(403, request.query["text"], {"X-Said": request.query["text"]})


async def changed_afterwards(request, env):
    headers = {"X-Said": "well"}
    reply = Reply(403, "no", headers)
    headers["X-Said"] = "a\\r\\nX-Injected: 1"
    return reply


async def value(request, env):
    return {"none": None, "int": 401, "true": True, "text": "401", "class": Reply, "pair": (401, "no")}[
        request.query["of"]
    ]


async def coroutine(request, env):
    return request.forward


first = []


async def anothers(request, env):
    """Return another client's request, which it has kept."""
    first.append(request)
    return first[0]


async def late(request, env):
    await asyncio.sleep(3600)


async def stubborn(request, env):
    """Ignores cancellation until it is released."""
    events.append("begun " + request.query["id"])
    while "let go" not in events:
        try:
            await asyncio.sleep(0.02)
        except asyncio.CancelledError:
            events.append("cancelled " + request.query["id"])
    events.append("through " + request.query["id"])
    return Reply(403, "late")


async def waits(request, env):
    events.append("begun " + request.query["id"])
    try:
        await asyncio.sleep(3600)
    finally:
        events.append("cancelled " + request.query["id"])


async def let_go(request, env):
    events.append("let go")
    return request


async def said(request, env):
    return Reply(400, json.dumps(events))
'''
)
SECRET = "secret-of-the-worker"
WORKER_TIMEOUT = 0.3


@pytest.fixture(scope="module")
def refusing(certificate: Certificate) -> Iterator[Servers]:
    site = f'worker_timeout = "{int(WORKER_TIMEOUT * 1000)}ms"\n'
    with (
        ScriptedOrigin() as origin,
        edged(origin.address, certificate, WORKER, site=site, errors_expected=True) as tunnel,
    ):
        yield origin, tunnel


@pytest.fixture(scope="module")
def forwarding(certificate: Certificate) -> Iterator[Servers]:
    site = f'worker_timeout = "{int(WORKER_TIMEOUT * 1000)}ms"\nworker_on_error = "forward"\n'
    with (
        ScriptedOrigin() as origin,
        edged(origin.address, certificate, WORKER, site=site, errors_expected=True) as tunnel,
    ):
        yield origin, tunnel


def _logged(tunnel: Tunnel, outcome: Outcome, event: str = "edge worker failed") -> Record:
    return tunnel.wait_record(lambda record: record["event"] == event and record["id"] == outcome.record["id"])


def _works(stage: Servers) -> bool:
    return attempt(stage, "/asis").status == 101


# --- exceptions -------------------------------------------------------------------------------------------------------


def test_an_exception_is_a_500_with_the_id_and_a_traceback_in_the_log_alone(refusing: Servers) -> None:
    tunnel = refusing[1]
    outcome = attempt(refusing, "/raises")
    assert (outcome.status, outcome.reason) == (500, "edge: worker failed")
    assert outcome.body == f"500 Internal Server Error: the edge worker failed\nid: {outcome.record['id']}\n"
    logged = _logged(tunnel, outcome)
    assert logged["worker"] == f"{tunnel.folder}/worker.py:fetch"
    lines = logged["exception"].splitlines()
    assert lines[0].strip() == "Traceback (most recent call last):"
    assert lines[-1].endswith(f"LookupError: no such shard: {SECRET}")
    line = 1 + WORKER.splitlines().index('    raise LookupError("no such shard: secret-of-the-worker")')
    assert f'worker.py", line {line}, in inner' in logged["exception"]
    assert "tlstunnel/edge" not in logged["exception"], "the tunnel's own frames do not help"
    assert SECRET not in str(outcome.record)
    assert _works(refusing)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("broken", "Broken: <exception str() failed>"),
        ("own", "Own"),
        ("recurses", "RecursionError"),
        ("group", "ExceptionGroup"),
        ("cancels_itself", "CancelledError"),
        ("unknown", "KeyError"),
        ("exits", "SystemExit: 3"),
        ("interrupts", "KeyboardInterrupt"),
    ],
)
def test_any_exception_is_a_500(refusing: Servers, how: str, named: str) -> None:
    """Also SystemExit and KeyboardInterrupt: the process stays."""
    tunnel = refusing[1]
    pid = tunnel.pid
    outcome = attempt(refusing, f"/{how}?text=other")
    assert (outcome.status, outcome.reason) == (500, "edge: worker failed")
    assert named in _logged(tunnel, outcome)["exception"]
    assert _works(refusing)
    assert tunnel.pid == pid


@pytest.mark.parametrize("how", ["stops_the_loop", "exits_beside"])
def test_its_loop_survives_anything_that_stops_it(refusing: Servers, how: str) -> None:
    pid = refusing[1].pid
    assert attempt(refusing, f"/{how}").status == 101
    assert _works(refusing)
    assert refusing[1].pid == pid


NASTY = "a\x1b[2Jb\nTraceback\r\n{}\x07\x9b\u2028\u202e\x85\\x"


def test_client_text_in_an_exception_is_escaped(refusing: Servers) -> None:
    outcome = attempt(refusing, f"/says?text={quote(NASTY)}")
    assert outcome.status == 500
    exception = _logged(refusing[1], outcome)["exception"]
    assert re.fullmatch(r"[\n -~]*", exception)
    assert "\\x1b[2Jb" in exception
    assert "\\u202e" in exception


def test_a_long_exception_is_cut(refusing: Servers) -> None:
    outcome = attempt(refusing, f"/says?text={'x' * 9000}&{'y' * 5000}")
    assert len(_logged(refusing[1], outcome)["exception"]) < 17_000


class _Text:
    """A tunnel that logs in text, and its log."""

    def __init__(self, folder: Path, config: str) -> None:
        (folder / "t.toml").write_text(config)
        self._process = subprocess.Popen(
            [*PROGRAM, "start", "--config", "t.toml", "--log-format", "text"],
            cwd=folder,
            env=child_environment() | {"RUNTIME_DIRECTORY": str(folder)},
            stderr=subprocess.PIPE,
        )
        self.raw = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        eventually(lambda: b"ready" in self.raw)
        found = re.search(rb"127\.0\.0\.1:([0-9]+)", self.raw)
        assert found
        self.port = int(found[1])

    def _read(self) -> None:
        assert self._process.stderr is not None
        while some := os.read(self._process.stderr.fileno(), 65536):
            self.raw += some

    def stop(self) -> bytes:
        self._process.send_signal(signal.SIGINT)
        try:
            assert self._process.wait(TIMEOUT) == 0
        finally:
            self._process.kill()
            self._reader.join(TIMEOUT)
            assert self._process.stderr is not None
            self._process.stderr.close()
        return self.raw


FORGED = "2026-01-01 00:00:00 [info     ] connection                     client=forged"


@pytest.fixture(scope="module")
def in_text(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return what a tunnel that logs in text wrote about an exception with a hostile text."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "worker.py").write_text(WORKER)
    text = _Text(folder, config_for("127.0.0.1:1", certificate, site='worker = "worker.py:fetch"\n'))
    try:
        tls = MemoryTlsClient()
        with socket.create_connection(("127.0.0.1", text.port), TIMEOUT) as client:
            client.sendall(tls.step())
            tls.finish(client)
            client.sendall(tls.encrypt(handshake_request(f"/says?text={quote(NASTY + chr(10) + FORGED)}")))
            assert b"HTTP/1.1 500 " in tls.read_all(client)
    finally:
        raw = text.stop()
    return raw


def test_exceptions_in_the_text_log(in_text: bytes) -> None:
    assert re.fullmatch(rb"[\n\x20-\x7e]*", in_text), re.findall(rb".{0,80}[^\n\x20-\x7e].{0,80}", in_text)[:3]
    assert rb"\x1b[2Jb" in in_text


def test_no_line_of_the_text_log_can_be_forged(in_text: bytes) -> None:
    """No line of an exception's text starts a line of the log: it could look like a record."""
    assert FORGED.encode() in in_text
    assert FORGED not in in_text.decode().splitlines()


# --- invalid results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [101, 100, 200, 204, 299, 0, -1, 600, 1000])
def test_a_reply_with_a_status_of_an_endpoint_is_an_error(refusing: Servers, status: int) -> None:
    outcome = attempt(refusing, f"/endpoint?status={status}")
    assert (outcome.status, outcome.reason) == (500, "edge: worker failed")
    assert "hello" not in outcome.body
    exception = _logged(refusing[1], outcome)["exception"]
    assert ("an edge worker cannot be a WebSocket endpoint" in exception) == (status < 300)
    assert str(status) in exception
    assert "in endpoint" in exception, "the line of the worker"


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("none", "None"),
        ("int", "a int"),
        ("true", "a bool"),
        ("text", "a str"),
        ("class", "a type"),
        ("pair", "a tuple"),
    ],
)
def test_other_return_values_are_errors(refusing: Servers, of: str, said: str) -> None:
    outcome = attempt(refusing, f"/value?of={of}")
    assert (outcome.status, outcome.reason) == (500, "edge: worker failed")
    assert (
        f"a worker must return the request, request.forward(...) or a Reply, not {said}"
        in (_logged(refusing[1], outcome)["exception"])
    )


def test_changing_the_headers_of_a_reply_later(certificate: Certificate) -> None:
    """A reply keeps its original headers, or is an error of the worker; the client gets a response in any case."""
    with ScriptedOrigin() as origin, edged(origin.address, certificate, WORKER) as tunnel:
        outcome = attempt((origin, tunnel), "/changed_afterwards")
        assert outcome.status in (403, 500)
        assert "X-Injected" not in outcome.headers


def test_the_request_of_another_client_is_not_forwarded(certificate: Certificate) -> None:
    """A worker may keep a request by mistake: its cookies and its key are not this client's."""
    with ScriptedOrigin() as origin, edged(origin.address, certificate, WORKER) as tunnel:
        attempt((origin, tunnel), "/anothers", [("Cookie", "sid=first")])
        assert attempt((origin, tunnel), "/anothers", [("Cookie", "sid=second")]).status == 500


# --- late -------------------------------------------------------------------------------------------------------------


def test_a_late_worker_is_a_504_in_time(refusing: Servers) -> None:
    def measure() -> float:
        began = time.monotonic()
        outcome = attempt(refusing, "/late")
        took = time.monotonic() - began
        assert (outcome.status, outcome.reason) == (504, "edge: worker timed out")
        assert outcome.body.startswith("504 Gateway Timeout: the edge worker did not respond within 0.3 s\nid: ")
        assert _logged(refusing[1], outcome, "edge worker timed out")["seconds"] == WORKER_TIMEOUT
        assert took > WORKER_TIMEOUT * 0.9
        return took

    assert_below(WORKER_TIMEOUT + 1, measure)


def test_a_worker_that_ignores_its_cancellation(refusing: Servers) -> None:
    """The client still gets a response in time, and a later result is discarded."""
    assert attempt(refusing, "/stubborn?id=s").status == 504
    eventually(lambda: "cancelled s" in reply_json(refusing, "/said"))
    assert _works(refusing)
    assert attempt(refusing, "/let_go").status == 101
    eventually(lambda: "through s" in reply_json(refusing, "/said"))
    assert _works(refusing)


def test_late_calls_are_cancelled(refusing: Servers) -> None:
    assert attempt(refusing, "/waits?id=w").status == 504
    eventually(lambda: "cancelled w" in reply_json(refusing, "/said"))


@pytest.fixture(scope="module")
def patient(certificate: Certificate) -> Iterator[Servers]:
    with (
        ScriptedOrigin() as origin,
        edged(origin.address, certificate, WORKER, site='worker_timeout = "1h"\n') as tunnel,
    ):
        yield origin, tunnel


@pytest.mark.parametrize("leave", [reset, socket.socket.close], ids=["reset", "end"])
def test_a_client_that_leaves_cancels_its_worker(patient: Servers, leave: Callable[[socket.socket], None]) -> None:
    """At once, not at the deadline; it does not count as a failure of the worker."""
    tunnel, name = patient[1], leave.__name__
    client = connect_tls(tunnel)
    client.sendall(handshake_request(f"/waits/{name}?id={name}"))
    eventually(lambda: f"begun {name}" in reply_json(patient, "/said"))
    leave(client)
    eventually(lambda: f"cancelled {name}" in reply_json(patient, "/said"))
    record = tunnel.wait_record(lambda record: record.get("path") == f"/waits/{name}")
    assert (record["ended_by"], record["reason"]) == ("client", "closed during the handshake")
    assert not tunnel.records("edge worker failed")
    assert not tunnel.records("edge worker timed out")


# --- worker_on_error = "forward" --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "saw", "event"),
    [
        ("raises", "failed", "edge worker failed"),
        ("exits", "failed", "edge worker failed"),
        ("value?of=none", "failed", "edge worker failed"),
        ("late", "timed out", "edge worker timed out"),
    ],
)
def test_on_error_forward_sends_the_request_unchanged(forwarding: Servers, how: str, saw: str, event: str) -> None:
    """Without any change that the worker had made by then."""
    outcome = attempt(forwarding, f"/{how}", [("Cookie", "a=1")])
    assert (outcome.status, outcome.record["edge"]) == (101, saw)
    assert outcome.target.decode() == f"/{how}"
    assert b"\r\nCookie: a=1\r\n" in outcome.head
    assert b"X-Late" not in outcome.head
    assert _logged(forwarding[1], outcome, event)["forwarded"] is True


@pytest.mark.parametrize("how", ["endpoint?status=101", "endpoint?status=200", f"spoilt?text={quote(chr(10))}"])
def test_on_error_forward_does_not_apply_to_an_invalid_reply(forwarding: Servers, how: str) -> None:
    """The worker meant to refuse."""
    outcome = attempt(forwarding, f"/{how}")
    assert (outcome.status, outcome.reason) == (500, "edge: worker failed")
    assert "forwarded" not in _logged(forwarding[1], outcome)


def test_on_error_forward_changes_nothing_for_a_working_worker(forwarding: Servers) -> None:
    assert attempt(forwarding, "/spoilt?text=well").status == 403
    assert attempt(forwarding, "/asis").record["edge"] == "forwarded"


# --- starting with one ------------------------------------------------------------------------------------------------


def test_a_worker_that_cannot_be_loaded_is_one_line_of_error(certificate: Certificate, tmp_path: Path) -> None:
    """At start and in `config check`: the file, the line and the problem."""
    (tmp_path / "t.toml").write_text(config_for("127.0.0.1:1", certificate, site='worker = "worker.py:fetch"\n'))
    (tmp_path / "worker.py").write_text("import json\n\nraise ValueError('no \\x1b[2J settings')\n")
    done = subprocess.run(
        [*PROGRAM, "start", "--config", "t.toml"],
        cwd=tmp_path,
        env=child_environment() | {"RUNTIME_DIRECTORY": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tlstunnel: ")]
    assert "sites[0].worker: the edge worker" in line
    assert f"{tmp_path}/worker.py:3: cannot be imported: ValueError: no \\x1b[2J settings" in line
    assert "Traceback" not in done.stderr
