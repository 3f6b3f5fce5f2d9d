"""The `websockets` library on both ends: the tunnel does not change what its client and server agree on."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator

import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from tests.harness import Certificate, Tunnel, WebsocketsOrigin, client_context, eventually


@pytest.fixture(scope="module")
def echo(certificate: Certificate) -> Iterator[Tunnel]:
    """A tunnel before an echoing `websockets` server."""
    with WebsocketsOrigin() as origin, Tunnel(origin.address, certificate) as tunnel:
        yield tunnel


@pytest.mark.parametrize(
    "message",
    ["", "hello", "grüße, 世界 🚇", b"", bytes(range(256)), "x" * 125, "x" * 126, b"y" * 65535, b"z" * 65536],
    ids=["empty", "text", "unicode", "no-bytes", "bytes", "125", "126", "65535", "65536"],
)
def test_messages_come_back_as_they_were_sent(echo: Tunnel, message: str | bytes) -> None:
    with connect(echo.uri, ssl=client_context(echo)) as client:
        client.send(message)
        assert client.recv() == message


def test_a_large_message_comes_back_complete(echo: Tunnel) -> None:
    message = random.Random(6455).randbytes(8 << 20)  # random: permessage-deflate cannot shrink it
    with connect(echo.uri, ssl=client_context(echo), max_size=None) as client:
        client.send(message)
        assert client.recv() == message


def test_messages_keep_their_order(echo: Tunnel) -> None:
    messages = [f"{number} " * (number % 40) for number in range(500)]
    with connect(echo.uri, ssl=client_context(echo)) as client:
        for message in messages:
            client.send(message)
        assert [client.recv() for _ in messages] == messages


def test_many_clients_at_once_get_their_own_messages(echo: Tunnel) -> None:
    async def converse(number: int) -> None:
        async with connect_async(echo.uri, ssl=client_context(echo)) as client:
            for turn in range(20):
                await client.send(f"{number}.{turn}")
                assert await client.recv() == f"{number}.{turn}"

    async def converse_all() -> None:
        await asyncio.gather(*(converse(number) for number in range(30)))

    asyncio.run(converse_all())


def test_fragments_are_not_joined_or_split(certificate: Certificate) -> None:
    async def report_fragments(connection: ServerConnection) -> None:
        fragments = [fragment async for fragment in connection.recv_streaming(decode=True)]
        await connection.send("|".join(fragments))

        async def fragmented() -> AsyncIterator[str]:
            for part in ("one", "two", "three"):
                yield part

        await connection.send(fragmented())

    with (
        WebsocketsOrigin(report_fragments) as origin,
        Tunnel(origin.address, certificate) as tunnel,
        connect(tunnel.uri, ssl=client_context(tunnel)) as client,
    ):
        client.send(["a", "bc", "def"])
        assert client.recv() == "a|bc|def|"  # the library ends a fragmented message with an empty fragment
        assert list(client.recv_streaming()) == ["one", "two", "three", ""]


def test_pings_are_answered_both_ways(certificate: Certificate) -> None:
    async def ping_first(connection: ServerConnection) -> None:
        await (await connection.ping(b"from the origin"))
        await connection.send("you answered")
        await connection.wait_closed()

    with (
        WebsocketsOrigin(ping_first) as origin,
        Tunnel(origin.address, certificate) as tunnel,
        connect(tunnel.uri, ssl=client_context(tunnel)) as client,
    ):
        assert client.recv() == "you answered"
        assert client.ping(b"from the client").wait(10)


def test_the_clients_close_code_reaches_the_origin(certificate: Certificate) -> None:
    seen: list[tuple[int | None, str | None]] = []

    async def wait_for_close(connection: ServerConnection) -> None:
        await connection.wait_closed()
        seen.append((connection.close_code, connection.close_reason))

    with WebsocketsOrigin(wait_for_close) as origin, Tunnel(origin.address, certificate) as tunnel:
        with connect(tunnel.uri, ssl=client_context(tunnel)) as client:
            client.close(4001, "bye")
        assert client.close_code == 4001
        eventually(lambda: seen)
        record = tunnel.wait_records(1)[0]
    assert seen == [(4001, "bye")]
    assert record["status"] == 101


def test_the_origins_close_code_reaches_the_client(certificate: Certificate) -> None:
    async def close_at_once(connection: ServerConnection) -> None:
        await connection.send("last words")
        await connection.close(4002, "enough")

    with WebsocketsOrigin(close_at_once) as origin, Tunnel(origin.address, certificate) as tunnel:
        with connect(tunnel.uri, ssl=client_context(tunnel)) as client:
            assert client.recv() == "last words"
            with pytest.raises(ConnectionClosed):
                client.recv()
        assert (client.close_code, client.close_reason) == (4002, "enough")


def test_permessage_deflate_is_negotiated_with_the_origin(certificate: Certificate) -> None:
    message = "compress me " * 100_000
    with WebsocketsOrigin() as origin, Tunnel(origin.address, certificate) as tunnel:
        with connect(tunnel.uri, ssl=client_context(tunnel), max_size=None) as client:
            assert [extension.name for extension in client.protocol.extensions] == ["permessage-deflate"]
            assert client.response is not None
            agreed = client.response.headers["Sec-WebSocket-Extensions"]
            client.send(message)
            assert client.recv() == message
        record = tunnel.wait_records(1)[0]
    assert agreed.startswith("permessage-deflate; server_max_window_bits=12; client_max_window_bits=12")
    assert 0 < record["up"] < len(message) / 20
    assert 0 < record["down"] < len(message) / 20


def test_an_extension_is_not_made_up(certificate: Certificate) -> None:
    with (
        WebsocketsOrigin(compression=None) as origin,
        Tunnel(origin.address, certificate) as tunnel,
        connect(tunnel.uri, ssl=client_context(tunnel)) as client,
    ):
        assert client.protocol.extensions == []
        client.send("plain")
        assert client.recv() == "plain"
    assert origin.requests[0].headers["Sec-WebSocket-Extensions"].startswith("permessage-deflate")


def test_the_origin_chooses_the_subprotocol(certificate: Certificate) -> None:
    offered = [Subprotocol(name) for name in ("v2.chat", "v1.chat")]
    with (
        WebsocketsOrigin(subprotocols=["v1.chat"]) as origin,
        Tunnel(origin.address, certificate) as tunnel,
        connect(tunnel.uri, ssl=client_context(tunnel), subprotocols=offered) as client,
    ):
        assert client.subprotocol == "v1.chat"
    assert origin.requests[0].headers["Sec-WebSocket-Protocol"] == "v2.chat, v1.chat"


def test_path_query_and_fields_reach_the_origin(certificate: Certificate) -> None:
    with WebsocketsOrigin() as origin, Tunnel(origin.address, certificate) as tunnel:
        uri = f"{tunnel.uri}chat/r%C3%B6m?token=a%20b&x=1"
        headers = {"Authorization": "Bearer abc", "Cookie": "a=1; b=2"}
        with connect(
            uri, ssl=client_context(tunnel), additional_headers=headers, origin=Origin("https://example.com")
        ) as client:
            client.send("hello")
            assert client.recv() == "hello"
        record = tunnel.wait_records(1)[0]
    request = origin.requests[0]
    assert request.path == "/chat/r%C3%B6m?token=a%20b&x=1"
    assert request.headers["Authorization"] == "Bearer abc"
    assert request.headers["Cookie"] == "a=1; b=2"
    assert request.headers["Origin"] == "https://example.com"
    assert request.headers["Host"] == f"localhost:{tunnel.port}"
    assert request.headers["X-Forwarded-For"] == "127.0.0.1"
    assert request.headers["X-Forwarded-Proto"] == "https"
    assert request.headers["X-Request-Id"] == record["id"]


def test_the_embedded_echo_origin(certificate: Certificate) -> None:
    with (
        Tunnel(None, certificate) as tunnel,
        connect(tunnel.uri, ssl=client_context(tunnel)) as client,
    ):
        client.send("hello")
        assert client.recv() == "hello"
        client.send(b"\x00\x01")
        assert client.recv() == b"\x00\x01"


def test_without_a_certificate_it_makes_its_own() -> None:
    with Tunnel() as tunnel:
        with connect(tunnel.uri, ssl=client_context(tunnel)) as client:
            client.send("hello")
            assert client.recv() == "hello"
        key = tunnel.folder / "certs" / "localhost-key.pem"
        assert key.stat().st_mode & 0o777 == 0o600
