"""Find the server that counts, connect to it, and log in: directly, by sentinels, or in a cluster.

Tested by tests/unit/test_state_valkey_counters.py.
"""

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from tlstunnel.addresses import quoted
from tlstunnel.backoff import Backoff
from tlstunnel.certificates import describe
from tlstunnel.certificates.contexts import load_client_pair
from tlstunnel.errors import CertificateError
from tlstunnel.escaping import printable
from tlstunnel.state.valkey.address import Endpoint, ServerAddress
from tlstunnel.state.valkey.connection import (
    Connection,
    PasswordRequired,
    ServerUnavailable,
    explain_error,
    open_connection,
)
from tlstunnel.state.valkey.scripts import Script
from tlstunnel.tls.policy import apply_to_client_context

Result = TypeVar("Result")

_SENTINEL_PATIENCE: Final = 0.5
_LONGEST_PASSWORD = 4096


async def run_within(seconds: float, coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine as a task, and return its result. Raises TimeoutError, after the task was cancelled.

    `asyncio.wait_for` may lose the cancellation of who calls it (up to Python 3.11), and a task that is started once
    and lives as long as the process has to end when it is told to.
    """
    task = asyncio.create_task(coroutine)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
    if not task.done():
        raise TimeoutError
    return task.result()


def make_tls_context(address: ServerAddress) -> ssl.SSLContext | None:
    """Return the context for a server with TLS, whose certificate is always verified. Raises CertificateError."""
    if not address.tls:
        return None
    # Not create_default_context, which writes the keys of every session to the file that SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    apply_to_client_context(context)
    context.set_alpn_protocols([])
    if address.ca is None:
        context.load_default_certs()
    else:
        describe.read_certificates(address.ca)  # explains what is wrong; OpenSSL does not name the file
        try:
            context.load_verify_locations(address.ca)
        except OSError as error:
            raise CertificateError(f"{address.ca}: the TLS library refuses it: {error}") from error
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if address.cert is not None and address.key is not None:
        load_client_pair(context, address.cert, address.key)
    return context


class Servers:
    """Connects to the server that counts, which may be another one after a failover.

    `password_file` is read for each connection, so that the password can be changed. Its first line is the password.
    """

    def __init__(self, address: ServerAddress, tls: ssl.SSLContext | None, password_file: Path | None = None) -> None:
        self._address = address
        self._tls = tls
        self._password_file = password_file
        self._attempts = 0
        self._moved_to: Endpoint | None = None
        self._connected_to = address.endpoints[0]

    async def connect(self) -> Connection:
        """Return a new connection, logged in. Raises ServerUnavailable."""
        if self._address.kind == "sentinel":
            endpoint = await self._ask_sentinels()
        else:
            endpoint = self._moved_to or self._address.endpoints[self._attempts % len(self._address.endpoints)]
        connection = await open_connection(endpoint, self._tls)
        try:
            await self._log_in(connection)
            if self._address.database:
                await connection.call(b"SELECT", self._address.database)
        except BaseException:
            connection.close()
            raise
        self._connected_to = endpoint
        return connection

    async def connect_with(self, script: Script, on_lost: Callable[[], None]) -> Connection:
        """Return a new connection to a server that has loaded `script`. Raises ServerUnavailable."""
        connection = await self.connect()
        try:
            await connection.call(b"SCRIPT", b"LOAD", script.source)
        except BaseException:
            connection.close()
            raise
        connection.on_lost = on_lost
        return connection

    async def wait_after(self, error: ServerUnavailable, delay: float, retries: Backoff) -> float:
        """Learn from a failure, and wait before the next attempt. Return the delay, for the next failure.

        Where the cluster has moved our keys is tried at once, the first time.
        """
        if self.learn(error) and not delay:
            return retries.first
        delay = retries.after(delay)
        await asyncio.sleep(retries.spread(delay))
        return delay

    def learn(self, error: ServerUnavailable) -> bool:
        """Learn from a failure where to connect next. Return whether it is where the cluster has our keys."""
        moved_to = error.moved_to
        if moved_to is not None:
            # A node that does not know its own name leaves it out.
            self._moved_to = moved_to if moved_to.host else replace(moved_to, host=self._connected_to.host)
            return True
        self._moved_to = None
        self._attempts += 1
        return False

    async def _log_in(self, connection: Connection) -> None:
        user, password = self._address.user, self._address.password or self._read_password()
        if password or user:
            await connection.call(b"AUTH", *([user] if user else []), password)

    def _read_password(self) -> str:
        if self._password_file is None:
            return ""
        try:
            with self._password_file.open("rb") as file:
                first = file.readline(_LONGEST_PASSWORD).rstrip(b"\r\n")
            return first.decode()
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8" if isinstance(error, ValueError) else error.strerror or str(error)
            raise ServerUnavailable(f"{self._password_file} cannot be read: {printable(reason)}") from None

    async def _ask_sentinels(self) -> Endpoint:
        """Return where the primary is. The sentinels are asked one after another. Raises ServerUnavailable."""
        reasons = []
        for sentinel in self._address.endpoints:
            try:
                return await run_within(_SENTINEL_PATIENCE, self._ask_sentinel(sentinel))
            except (ServerUnavailable, TimeoutError) as error:
                reasons.append(f"{sentinel}: {explain_error(error)}")
        raise ServerUnavailable(f"no sentinel knows the primary ({', '.join(reasons)})")

    async def _ask_sentinel(self, sentinel: Endpoint) -> Endpoint:
        question = (b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._address.service)
        connection = await open_connection(sentinel, self._tls)
        try:
            try:
                reply = await connection.call(*question)
            except PasswordRequired:
                await self._log_in(connection)
                reply = await connection.call(*question)
        finally:
            connection.close()
        match reply:
            case [bytes(host), bytes(port)] if port.isdigit() and len(port) <= 5:
                return Endpoint(host.decode("utf-8", "replace"), int(port))
        raise ServerUnavailable(f"it watches no service {quoted(self._address.service)}")
