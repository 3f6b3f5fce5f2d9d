"""A channel over a real socket: waiting, TLS on both sides, partial sends, and whether a peer is gone."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.harness import Certificate
from tlstunnel.sockets.channel import Channel, ClientGone
from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.sockets.readiness import readiness
from tlstunnel.tls.policy import apply_to_client_context, apply_to_server_context
from tlstunnel.tls.stream import Pair, TlsStream
from tlstunnel.tls.truncation import Truncated

SECONDS = 20.0


def run(test: Callable[["Sockets"], Awaitable[None]]) -> None:
    async def main() -> None:
        with Sockets.open() as sockets:
            async with asyncio.timeout(SECONDS):
                await test(sockets)

    asyncio.run(main())


class Sockets:
    """Two connected sockets, each with a channel and a wakeup of its own."""

    def __init__(self, watched: object, near: Channel, far: Channel) -> None:
        self.watched = watched
        self.near = near
        self.far = far

    @classmethod
    @contextmanager
    def open(cls) -> Iterator["Sockets"]:
        loop = asyncio.get_running_loop()
        watched = readiness(loop)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            far = socket.create_connection(listener.getsockname())
            near, _ = listener.accept()
        for sock in (near, far):
            sock.setblocking(False)
        channels = [Channel(sock, watched, Wakeup(loop, loop.time() + SECONDS)) for sock in (near, far)]
        try:
            yield cls(watched, *channels)
        finally:
            for channel in channels:
                channel.release()
                channel.sock.close()
            watched.close()


class Contexts:
    def __init__(self, certificate: Certificate, version: ssl.TLSVersion) -> None:
        self.server, self.client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        apply_to_server_context(self.server)
        apply_to_client_context(self.client)
        self.server.load_cert_chain(certificate.cert, certificate.key)
        self.client.load_verify_locations(certificate.ca)
        self.client.maximum_version = version

    async def begin(self, sockets: Sockets) -> None:
        async def serve() -> None:
            await sockets.near.buffer(1)
            await sockets.near.begin_tls(TlsStream(self.server))

        async def connect() -> None:
            await sockets.far.begin_tls(TlsStream(self.client, server_hostname="localhost"))
            await sockets.far.send(b"hello")

        async with asyncio.TaskGroup() as group:
            group.create_task(serve())
            group.create_task(connect())
        assert await sockets.near.recv() == b"hello"


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def contexts(request: pytest.FixtureRequest, certificate: Certificate) -> Contexts:
    return Contexts(certificate, request.param)


async def receive_exactly(channel: Channel, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = await channel.recv()
        assert data
        received += data
    return received


def test_what_was_received_before_tls_can_be_consumed_in_parts() -> None:
    async def test(sockets: Sockets) -> None:
        sockets.far.sock.send(b"PROXY")
        assert await sockets.near.buffer(1) == b"PROXY"
        waiting = asyncio.ensure_future(sockets.near.buffer(7))
        await asyncio.sleep(0)
        sockets.far.sock.send(b"hello")
        assert await waiting == b"PROXYhello"
        sockets.near.consume(5)
        assert await sockets.near.buffer(1) == b"hello"
        sockets.far.sock.shutdown(socket.SHUT_WR)
        with pytest.raises(ClientGone):
            await sockets.near.buffer(6)

    run(test)


def test_tls_in_both_directions(contexts: Contexts) -> None:
    async def test(sockets: Sockets) -> None:
        await contexts.begin(sockets)
        await sockets.near.send(b"response")
        assert await sockets.far.recv() == b"response"
        sockets.near.end()
        sockets.near.sock.shutdown(socket.SHUT_WR)
        assert await sockets.far.recv() == b""
        assert not sockets.far.check_gone(), "it may have ended its own side only"
        await sockets.far.send(b"still open")
        assert await sockets.near.recv() == b"still open"

    run(test)


def test_a_ticket_does_not_wait_for_the_request(contexts: Contexts) -> None:
    """A client with Nagle's algorithm sends its request after the acknowledgement, which comes with the ticket."""

    async def test(sockets: Sockets) -> None:
        async def serve() -> bytes:
            await sockets.near.buffer(1)
            await sockets.near.begin_tls(TlsStream(contexts.server))
            return await sockets.near.recv()

        serving = asyncio.ensure_future(serve())
        client = TlsStream(contexts.client, server_hostname="localhost", pair=Pair())
        await sockets.far.begin_tls(client)
        sockets.far.sock.send(client.output)
        client.output = b""
        sockets.far.tls = None
        received = await sockets.far.recv() if client.version == "TLSv1.3" else b"with the last flight"
        assert received
        sockets.far.tls = client
        await sockets.far.send(b"request")
        assert await serving == b"request"

    run(test)


def test_a_fin_without_close_notify_is_a_truncation(contexts: Contexts) -> None:
    async def test(sockets: Sockets) -> None:
        await contexts.begin(sockets)
        await sockets.far.send(b"last")
        sockets.far.sock.shutdown(socket.SHUT_WR)
        assert await sockets.near.recv() == b"last"
        with pytest.raises(Truncated):
            await sockets.near.recv()

    run(test)


def test_a_large_message_is_sent_in_parts(contexts: Contexts) -> None:
    async def test(sockets: Sockets) -> None:
        await contexts.begin(sockets)
        message = bytes(range(256)) * 20_000
        sending = asyncio.ensure_future(sockets.near.send(message))
        assert await receive_exactly(sockets.far, len(message)) == message
        await sending

    run(test)


def test_the_rest_of_a_partial_send_may_be_followed_by_more(contexts: Contexts) -> None:
    async def test(sockets: Sockets) -> None:
        await contexts.begin(sockets)
        sent = b""
        rest = bytes(range(256)) * 40_000
        sent += rest
        rest = sockets.near.send_now(rest)
        assert rest, "the peer reads nothing yet"
        assert sockets.near.send_now(rest) == rest, "the socket is full"
        rest += b"more"
        sent += b"more"

        async def send() -> None:
            nonlocal rest
            while rest := sockets.near.send_now(rest):
                await sockets.near.wakeup.wait()

        sending = asyncio.ensure_future(send())
        assert await receive_exactly(sockets.far, len(sent)) == sent
        await sending

    run(test)


def test_a_peer_that_left_is_gone(contexts: Contexts) -> None:
    async def test(sockets: Sockets) -> None:
        await contexts.begin(sockets)
        sockets.far.sock.close()
        while not sockets.near.gone:
            await sockets.near.wakeup.wait()
        assert sockets.near.check_gone()
        with pytest.raises(OSError):  # noqa: PT011 - Truncated, or a reset
            await sockets.near.recv()

    run(test)


def test_nothing_is_awaited_for_a_client_that_is_gone() -> None:
    async def test(sockets: Sockets) -> None:
        with Sockets.open() as others:
            others.far.sock.close()
            while not others.near.gone:
                await others.near.wakeup.wait()
            with pytest.raises(ClientGone):
                await sockets.near.recv(unless_gone=others.near)

    run(test)
