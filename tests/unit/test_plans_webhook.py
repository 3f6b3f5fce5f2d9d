"""Webhooks: signatures that the library of Standard Webhooks verifies, and servers that do what they like."""

import asyncio
import base64
import contextlib
import json
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook as Receiver

from tests.harness import Certificate
from tests.unit.test_plans_templates import make_notice
from tlstunnel.plans.connection import connect, make_context
from tlstunnel.plans.credentials import derive_secret
from tlstunnel.plans.notices import Outcome, Result
from tlstunnel.plans.templates import Text
from tlstunnel.plans.values import Standing
from tlstunnel.plans.webhook import Webhook, make_body, sign

SECRET = bytes(range(32))
NOTICE = make_notice()
TEXT = Text("A subject", "A body.\n")

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def encode(secret: bytes) -> str:
    return f"whsec_{base64.b64encode(secret).decode()}"


@contextlib.asynccontextmanager
async def serving(serve: Serve, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serve connections, and return the port."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await serve(reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, str], bytes]:
    line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
    headers = dict(field.split(": ", 1) for field in fields)
    return line, headers, await reader.readexactly(int(headers["Content-Length"]))


def respond(head: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(head)
        await writer.drain()
        await reader.read()

    return serve


def deliver(serve: Serve, timeout: float = 10.0, now: float = 1_800_000_000.0) -> Result:
    """Deliver a notice to such a server."""

    async def run() -> Result:
        async with serving(serve) as port:
            webhook = Webhook([SECRET], timeout=timeout, clock=lambda: now)
            return await webhook.deliver(f"http://127.0.0.1:{port}/notices?to=1", NOTICE, TEXT)

    return asyncio.run(run())


# Signatures


def test_a_signature_is_that_of_the_specification() -> None:
    """The example of the libraries of Standard Webhooks."""
    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@given(st.binary(min_size=24, max_size=64), st.text(), st.integers(0, 2**33))
def test_a_signature_is_that_of_the_library(secret: bytes, body: str, timestamp: int) -> None:
    body = body.encode(errors="replace").decode()
    expected = Receiver(encode(secret)).sign("notice-1", datetime.fromtimestamp(timestamp, UTC), body)
    assert sign([secret], "notice-1", timestamp, body.encode()) == expected


@pytest.mark.parametrize("secret", [SECRET, b"n" * 64])
def test_a_request_is_verified_by_the_library(secret: bytes) -> None:
    """During a rotation, too: it is signed with both."""
    requests: list[tuple[str, dict[str, str], bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()

    async def run() -> list[Result]:
        async with serving(serve) as port:
            webhook = Webhook([SECRET, b"n" * 64])
            url = f"http://127.0.0.1:{port}/notices?to=1"
            own = await webhook.deliver(url, NOTICE, TEXT, b"\x89PNG", contact=True)
            return [own, await webhook.deliver(url, NOTICE, TEXT)]

    assert asyncio.run(run()) == [Result(Outcome.ACCEPTED, "204")] * 2
    line, headers, body = requests[1]
    assert line == "POST /notices?to=1 HTTP/1.1"
    assert headers["webhook-id"] == NOTICE.id
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    payload = Receiver(encode(secret)).verify(body, headers)
    assert payload["type"] == "notice.sustained"
    assert payload["timestamp"] == "2027-01-16T08:00:00.000Z"
    assert payload["data"]["id"] == NOTICE.id
    assert payload["data"]["figures"]["peak"] == 56_789
    assert payload["data"]["text"] == "A body.\n"
    # A contact has a secret of its own.
    line, headers, body = requests[0]
    with pytest.raises(Exception, match="No matching signature"):
        Receiver(encode(secret)).verify(body, headers)
    own = derive_secret(secret, f"http://{headers['Host']}/notices?to=1")
    data = payload["data"] | {"plot": "iVBORw=="}
    assert Receiver(encode(own)).verify(body, headers) == payload | {"data": data}


def test_a_type_has_no_space() -> None:
    body = json.loads(make_body(make_notice(Standing.SUSPECTED_ABUSE), TEXT))
    assert body["type"] == "notice.suspected_abuse"
    assert body["data"]["standing"] == "suspected abuse"


def test_a_body_is_the_same_each_time() -> None:
    assert make_body(NOTICE, TEXT) == make_body(make_notice(), TEXT)


# Responses


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_is_accepted(status: int) -> None:
    assert deliver(respond(f"HTTP/1.1 {status} X\r\n\r\n".encode())) == Result(Outcome.ACCEPTED, str(status))


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 502, 503, 504, 599])
def test_others_are_tried_again(status: int) -> None:
    assert deliver(respond(f"HTTP/1.1 {status} X\r\n\r\n".encode())) == Result(Outcome.FAILED, str(status))


def test_410_ends_it() -> None:
    assert deliver(respond(b"HTTP/1.1 410 Gone\r\n\r\n")).outcome is Outcome.GONE


def test_a_redirect_is_not_followed() -> None:
    followed: list[None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        followed.append(None)

    async def run() -> Result:
        async with serving(serve) as other:
            head = f"HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:{other}/\r\nContent-Length: 0\r\n\r\n"
            async with serving(respond(head.encode())) as port:
                return await Webhook([SECRET]).deliver(f"http://127.0.0.1:{port}/", NOTICE, TEXT)

    result = asyncio.run(run())
    assert (result.outcome, result.reason[:33]) == (Outcome.FAILED, "307: redirects are not followed; ")
    assert not followed


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("120", 120.0),
        (" 120 ", 120.0),
        (format_datetime(datetime.fromtimestamp(1_800_000_090, UTC), usegmt=True), 90.0),
        (format_datetime(datetime.fromtimestamp(1_700_000_000, UTC), usegmt=True), 0.0),
        ("9" * 300, 999_999_999_999.0),
        ("-1", 0.0),
        ("1e9", 0.0),
        ("soon", 0.0),
        ("Mon, 99 Foo 99999 99:99:99 GMT", 0.0),
        ("", 0.0),
    ],
)
def test_retry_after_is_read(value: str, wait: float) -> None:
    head = f"HTTP/1.1 503 X\r\nRetry-After: {value}\r\n\r\n".encode()
    assert deliver(respond(head)) == Result(Outcome.FAILED, "503", wait)


# Servers that misbehave


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def say_little(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    await reader.read(-1)
    await asyncio.Event().wait()


async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("serve", [say_nothing, say_little, trickle])
def test_one_deadline_holds_for_all(serve: Serve) -> None:
    began = time.monotonic()
    assert deliver(serve, timeout=0.3) == Result(Outcome.FAILED, "no response within 0.3 s")
    assert time.monotonic() - began < 5


async def close_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.close()


async def close_in_the_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-")
    await writer.drain()
    writer.close()


async def inform_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)
        await writer.drain()


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (close_at_once, "closed without a response"),
        (close_in_the_head, "closed without a response"),
        (inform_for_ever, "its response has too many heads"),
        (respond(b"\x1b[2J\r\n\r\n"), "illegal status line: bytearray(b'\\\\x1b[2J')"),
        (respond(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000), "Receive buffer too long"),
        (respond(b"HTTP/1.1 200 OK\r\nX y: z\r\n\r\n"), "illegal header line"),
    ],
)
def test_what_is_no_response_is_a_failure(serve: Serve, reason: str) -> None:
    result = deliver(serve)
    assert result.outcome is Outcome.FAILED
    assert result.reason.startswith(reason)
    assert result.reason.isprintable()


def test_a_huge_body_is_not_read() -> None:
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(10_000):
            writer.write(b"x" * 100_000)
            await writer.drain()
            sent += 100_000

    assert deliver(serve) == Result(Outcome.ACCEPTED, "200")
    assert sent < 20_000_000


def test_a_port_that_nothing_listens_on() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        result = asyncio.run(Webhook([SECRET]).deliver(url, NOTICE, TEXT))
    assert result.outcome is Outcome.FAILED
    assert result.reason == "Connection refused"


def test_a_name_that_is_not_there() -> None:
    result = asyncio.run(Webhook([SECRET], timeout=8).deliver("https://nowhere.invalid/", NOTICE, TEXT))
    assert result.outcome is Outcome.FAILED


def test_the_next_address_of_a_name_is_tried() -> None:
    """A server that listens on ::1 or on 127.0.0.1 only is found under localhost."""

    async def run() -> str:
        async with serving(say_nothing) as port:
            with await connect("localhost", port) as sock:
                return str(sock.getpeername()[0])

    assert asyncio.run(run()) == "127.0.0.1"


# TLS


@pytest.fixture
def server_context(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    return context


def deliver_tls(server_context: ssl.SSLContext, host: str, context: ssl.SSLContext) -> Result:
    async def run() -> Result:
        async with serving(respond(b"HTTP/1.1 200 OK\r\n\r\n"), server_context) as port:
            return await Webhook([SECRET], context=context).deliver(f"https://{host}:{port}/", NOTICE, TEXT)

    return asyncio.run(run())


def test_a_certificate_is_verified(server_context: ssl.SSLContext, certificate: Certificate) -> None:
    trusting = make_context()
    trusting.load_verify_locations(certificate.ca)
    assert deliver_tls(server_context, "localhost", trusting) == Result(Outcome.ACCEPTED, "200")
    result = deliver_tls(server_context, "localhost", make_context())
    assert result.outcome is Outcome.FAILED
    assert result.reason.startswith("certificate not trusted: ")


def test_a_certificate_for_another_name_is_refused(server_context: ssl.SSLContext, certificate: Certificate) -> None:
    trusting = make_context()
    trusting.load_verify_locations(certificate.ca)
    result = deliver_tls(server_context, "127.0.0.2", trusting)
    assert result.outcome is Outcome.FAILED


def test_a_server_without_tls_is_a_failure() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await writer.drain()

    async def run() -> Result:
        async with serving(serve) as port:
            return await Webhook([SECRET]).deliver(f"https://127.0.0.1:{port}/", NOTICE, TEXT)

    assert asyncio.run(run()).outcome is Outcome.FAILED


def test_a_delivery_does_not_block_the_loop() -> None:
    """Another coroutine goes on while ten servers say nothing."""

    async def run() -> int:
        turns = 0
        async with serving(say_nothing) as port:
            webhook = Webhook([SECRET], timeout=0.5)
            url = f"http://127.0.0.1:{port}/"
            deliveries = asyncio.gather(*(webhook.deliver(url, NOTICE, TEXT) for _ in range(10)))
            while not deliveries.done():
                await asyncio.sleep(0.005)
                turns += 1
            assert {result.outcome for result in await deliveries} == {Outcome.FAILED}
        return turns

    assert asyncio.run(run()) > 20
