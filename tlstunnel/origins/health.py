"""Active health checks: check each member of a pool at an interval, even without traffic.

Tested by tests/promises/test_origins_several.py.
"""

import asyncio
import base64
import os
import random
from collections.abc import Sequence
from typing import Protocol

import h11
from wsproto.utilities import generate_accept_token

from tlstunnel.config import Health
from tlstunnel.handshake.malformed import describe_malformed_head
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.origins.members import Member

MAX_HEAD = 65_536
"""Maximum bytes of a response's head."""


class CheckedPool(Protocol):
    """The part of a pool that health checks use."""

    async def resolve(self) -> Sequence[Member]:
        """Return the members to check."""

    def record_check(self, member: Member, failure: str) -> None:
        """Record a result: what failed, or "" if the check succeeded."""


class Checks:
    """Checks all members of a pool concurrently, once per interval, which varies by 10 % to spread the checks."""

    def __init__(self, health: Health, pool: CheckedPool, preface: bytes = b"") -> None:
        self._health = health
        self._preface = preface
        self._pool = pool
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start checking."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop checking."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self) -> None:
        while True:
            try:
                members = list(await self._pool.resolve())
                results = await asyncio.gather(*(check(member, self._health, self._preface) for member in members))
                for member, failure in zip(members, results, strict=True):
                    self._pool.record_check(member, failure)
            except Exception:
                structlog.get_logger().exception(Event.HEALTH_CHECK_FAILED)
            await asyncio.sleep(self._health.interval * (0.95 + 0.1 * random.random()))  # noqa: S311


async def check(member: Member, health: Health, preface: bytes = b"") -> str:
    """Check one member, sending `preface` first; return what failed, or ""."""
    try:
        async with asyncio.timeout(health.timeout):
            return await _connect_and_check(member, health, preface)
    except TimeoutError:
        return f"no response within {health.timeout}"
    except OSError as error:
        return error.strerror or str(error)
    except h11.RemoteProtocolError as error:
        return f"the response is not HTTP: {describe_malformed_head(error)}"
    except ValueError:
        return "the response is not HTTP"


async def _connect_and_check(member: Member, health: Health, preface: bytes) -> str:
    address = member.address
    if isinstance(address, str):
        reader, writer = await asyncio.open_unix_connection(address)
        writer.write(preface)
    else:
        tls = member.tls
        reader, writer = await asyncio.open_connection(str(address[0]), int(address[1]))
        writer.write(preface)
        if tls is not None:
            await writer.start_tls(tls.context, server_hostname=tls.get_server_name(member.origin))
    try:
        if health.type == "tcp":
            return ""
        return await _send_request(reader, writer, member.text, health)
    finally:
        writer.close()


async def _send_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, health: Health) -> str:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    key = base64.b64encode(os.urandom(16))
    host = "localhost" if host.startswith("unix:") else host.removeprefix("wss://")
    fields = [("Host", host), ("User-Agent", "tlstunnel health check")]
    if health.type == "websocket":
        fields += [
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", key.decode()),
        ]
    else:
        fields.append(("Connection", "close"))
    request = h11.Request(method="GET", target=health.path, headers=fields)
    writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(MAX_HEAD))
            continue
        if isinstance(event, h11.InformationalResponse) and event.status_code != 101:
            continue
        if not isinstance(event, h11.Response | h11.InformationalResponse):
            return "no response"
        return _check_response(event, key, health)


def _check_response(response: h11.Response | h11.InformationalResponse, key: bytes, health: Health) -> str:
    if health.type == "http":
        return "" if 200 <= response.status_code < 400 else f"status {response.status_code}"
    if response.status_code != 101:
        return f"status {response.status_code} instead of 101"
    accept = [value for name, value in response.headers if name == b"sec-websocket-accept"]
    return "" if accept == [generate_accept_token(key)] else "a wrong Sec-WebSocket-Accept"
