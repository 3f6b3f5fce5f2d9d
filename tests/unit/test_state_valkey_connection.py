"""One connection to a server: replies in order, whatever their pieces, and a reason for each failure."""

import asyncio
import ssl
from pathlib import Path

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.state.valkey.address import Endpoint
from tlstunnel.state.valkey.connection import (
    Connection,
    PasswordRequired,
    ServerUnavailable,
    explain_error,
    open_connection,
)
from tlstunnel.state.valkey.replies import MAX_REPLY


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("LOADING Redis is loading the dataset in memory", "it is loading its data"),
        ("READONLY You can't write against a read only replica.", "it is a read-only replica"),
        ("OOM command not allowed when used memory > 'maxmemory'.", "its memory is full (maxmemory)"),
        ("NOPERM this user has no permissions", "its user lacks a permission (this user has no permissions)"),
        (
            "ERR ACL failure in script: User default has no permissions to run the 'rpush' command script: 37e0, on 1.",
            "its user lacks a permission (ACL failure in script: User default has no permissions to run the 'rpush'",
        ),
        ("WRONGPASS invalid", "it does not accept the user or the password"),
        ("MASTERDOWN Link with MASTER is down", "it is a replica that has lost its primary"),
        ("MISCONF Redis is configured to save RDB snapshots", "it cannot save its data"),
        ("CLUSTERDOWN Hash slot not served", "the cluster is down"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", "is moving our keys to another node"),
        ("BUSY Redis is busy running a script", "it is busy with another script"),
        ("NOSCRIPT No matching script", "it has forgotten our scripts"),
        ("MOVED 1", "it answers: MOVED 1"),
        ("MOVED 1 a:0", "it answers: MOVED 1 a:0"),
        ("\x1b[2Jstrange\nreply", "it answers: \\x1b[2Jstrange\\nreply"),
        ("x" * 999, "it answers: " + "x" * 197 + "..."),
    ],
)
def test_reasons_of_replies(reply: str, reason: str) -> None:
    assert reason in str(explain_error(hiredis.ReplyError(reply)))


def test_where_a_cluster_has_the_keys() -> None:
    assert explain_error(hiredis.ReplyError("MOVED 3999 127.0.0.1:6381")).moved_to == Endpoint("127.0.0.1", 6381)
    assert explain_error(hiredis.ReplyError("MOVED 3999 ::1:6381")).moved_to == Endpoint("::1", 6381)
    assert explain_error(hiredis.ReplyError("MOVED 3999 :6381")).moved_to == Endpoint("", 6381)


def test_reasons_of_failures() -> None:
    untrusted = ssl.SSLCertVerificationError(1, "certificate verify failed")
    untrusted.verify_message = "self-signed certificate"
    for error, reason in (
        (TimeoutError(), "it does not answer"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (OSError("Multiple exceptions: a, b"), "Multiple exceptions: a, b"),
        (untrusted, "its certificate is not trusted (self-signed certificate)"),
        (ssl.SSLError(1, "[SSL] wrong version number"), "TLS failed ([SSL] wrong version number)"),
        (RuntimeError("\n"), "\\n"),
    ):
        assert str(explain_error(error)) == reason or reason in str(explain_error(error))
    assert isinstance(explain_error(hiredis.ReplyError("NOAUTH Authentication required.")), PasswordRequired)
    known = ServerUnavailable("known")
    assert explain_error(known) is known


class Transport(asyncio.Transport):
    """Takes what is written, and ends the connection in the next turn as a socket's transport does."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.written = b""
        self._connection = connection
        self._aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def abort(self) -> None:
        if not self._aborted:
            self._aborted = True
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)


def make_connection() -> tuple[Connection, Transport]:
    connection = Connection()
    transport = Transport(connection)
    connection.connection_made(transport)
    return connection, transport


@given(st.lists(st.one_of(st.integers(-9, 9), st.binary(max_size=9)), min_size=1), st.data())
def test_replies_in_any_pieces(replies: list[int | bytes], data: st.DataObject) -> None:
    stream = b"".join(
        b":%d\r\n" % reply if isinstance(reply, int) else b"$%d\r\n%b\r\n" % (len(reply), reply) for reply in replies
    )
    cuts = data.draw(st.lists(st.integers(0, len(stream))).map(sorted))
    received: list[object] = []

    async def main() -> None:
        connection, transport = make_connection()
        for number, _ in enumerate(replies):
            connection.send((b"GET", number), received.append)
        assert transport.written == b""
        await asyncio.sleep(0)
        assert transport.written.count(b"GET") == connection.waiting == len(replies)
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            connection.data_received(stream[start:end])
        assert received == replies
        assert connection.waiting == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "is not the protocol"),
        (b"+OK\r\n+more than was asked for\r\n", "is not the protocol"),
        (b"$9999999\r\n" + b"x" * (MAX_REPLY + 1), "is not the protocol"),
    ],
)
def test_nonsense_ends_the_connection(stream: bytes, reason: str) -> None:
    async def main() -> None:
        connection, _ = make_connection()
        received: list[object] = []
        lost: list[None] = []
        connection.on_lost = lambda: lost.append(None)
        connection.send((b"GET", 1), received.append)
        connection.data_received(stream)
        assert reason in str(await connection.wait_lost())
        assert len(received) == 1
        assert lost == [None]
        # Later commands fail too, but not before the caller continues.
        connection.send((b"GET", 2), received.append)
        assert len(received) == 1
        await asyncio.sleep(0)
        assert received[-1] is connection.lost

    asyncio.run(main())


def test_call_that_was_cancelled_leaves_its_reply_to_nobody() -> None:
    async def main() -> None:
        connection, _ = make_connection()
        first = asyncio.create_task(connection.call(b"GET", 1))
        second = asyncio.create_task(connection.call(b"GET", 2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        connection.data_received(b":1\r\n:2\r\n")
        assert await second == 2
        third = asyncio.create_task(connection.call(b"GET", 3))
        await asyncio.sleep(0)
        connection.data_received(b"-OOM full\r\n")
        with pytest.raises(ServerUnavailable, match="its memory is full"):
            await third

    asyncio.run(main())


def test_server_that_is_not_there(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(ServerUnavailable, match="No such file or directory"):
            await open_connection(Endpoint(path=str(tmp_path / "nothing")), None)

    asyncio.run(main())
