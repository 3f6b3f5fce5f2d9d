"""The steps of a client's connection to a ``wss://`` endpoint: the result of each, and why one failed.

`run` yields a `Step` for each of DNS, TCP, TLS, handshake, ping and close, and stops after the first that fails. All
share one time budget, and a hostile server can make them use only a bounded amount of memory. Nothing is printed here.
Text from the server is unchanged in the results and escaped in `Step.error`.
"""

import contextlib
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import h11
from cryptography import x509
from wsproto import ConnectionType
from wsproto.connection import Connection, ConnectionState
from wsproto.events import CloseConnection, Event, Ping, Pong
from wsproto.extensions import Extension, PerMessageDeflate
from wsproto.handshake import client_extensions_handshake
from wsproto.utilities import ProtocolError, generate_accept_token, generate_nonce

from tlstunnel import __version__
from tlstunnel.certificates.describe import CertificateDescription, describe
from tlstunnel.check.results import (
    CloseResult,
    DnsResult,
    PingResult,
    Result,
    Step,
    TcpResult,
    TlsResult,
    UpgradeResult,
)
from tlstunnel.check.target import Target, Trust
from tlstunnel.check.wire import Deadline, Wire, get_sent_chain
from tlstunnel.check.words import (
    CONNECT_ERRORS,
    DNS_ERRORS,
    describe_beginning,
    describe_close,
    describe_end,
    describe_refusal,
    explain_distrust,
    explain_tls_error,
)
from tlstunnel.errors import CertificateError
from tlstunnel.escaping import printable
from tlstunnel.tls.policy import apply_to_client_context
from tlstunnel.tls.server_hello import find_group
from tlstunnel.tls.truncation import is_truncation

# Bytes of a response's head. Servers usually send less than 8 KiB (node allows 16 KiB), so a larger head is reported as
# a fault; this leaves room for a very large number of cookies.
MAX_HEAD: Final = 65_536
# Bytes of a refusal's body that are kept.
MAX_BODY: Final = 1024
# Bytes read while waiting for a pong or a Close: a busy feed may send some, but not an endless stream.
MAX_UNSOLICITED: Final = 16_777_216


def run(
    target: Target,
    trust: Trust,
    *,
    fields: Sequence[tuple[str, str]] = (),
    subprotocols: Sequence[str] = (),
    timeout: float = 10.0,
) -> Iterator[Step]:
    """Connect as a client does and yield each step as it ends, up to the first that fails.

    `fields` are added to the request; a Host among them replaces the URL's. `timeout` is in seconds, for all steps
    together. Connections are closed when the iterator ends or is closed.
    """
    check = _Check(target, trust, tuple(fields), tuple(subprotocols), Deadline(timeout))
    steps: tuple[tuple[str, Callable[[], Result]], ...] = (
        ("dns", check.resolve),
        ("tcp", check.connect),
        ("tls", check.secure),
        ("handshake", check.upgrade),
        ("ping", check.ping),
        ("close", check.close),
    )
    with contextlib.closing(check.resources):
        for name, action in steps:
            step = _run_step(name, action)
            yield step
            if not step.ok:
                return


def _run_step(name: str, action: Callable[[], Result]) -> Step:
    started = time.perf_counter()
    try:
        found, error = action(), None
    except _StepError as failure:
        return Step(name, time.perf_counter() - started, failure.result, str(failure))
    return Step(name, time.perf_counter() - started, found, error)


class _StepError(Exception):
    def __init__(self, message: str, found: Result | None = None) -> None:
        super().__init__(message)
        self.result = found


class _Check:
    """One connection on its way through the steps, and what each step leaves for the next."""

    def __init__(
        self,
        target: Target,
        trust: Trust,
        fields: tuple[tuple[str, str], ...],
        subprotocols: tuple[str, ...],
        deadline: Deadline,
    ) -> None:
        self.target = target
        self.trust = trust
        self.fields = fields
        self.subprotocols = subprotocols
        self.deadline = deadline
        self.resources = contextlib.ExitStack()
        self.addresses: tuple[tuple[socket.AddressFamily, tuple[Any, ...]], ...] = ()
        self.unsolicited = 0
        self._connected: int | None = None  # the index of the address that accepted the connection
        self._sock: socket.socket | None = None
        self._wire: Wire | None = None
        self._ws: Connection | None = None

    @property
    def wire(self) -> Wire:
        """The TLS connection, from the step tls on."""
        assert self._wire is not None
        return self._wire

    @property
    def ws(self) -> Connection:
        """The WebSocket connection, from the step handshake on."""
        assert self._ws is not None
        return self._ws

    def resolve(self) -> DnsResult:
        """Resolve the name to all its addresses, in the system's order (RFC 6724)."""
        host, port = self.target.place
        results: list[Any] = []

        def look_up() -> None:
            try:
                results.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except OSError as error:
                results.append(error)

        # getaddrinfo() takes no timeout; a daemon thread may be left behind.
        resolver = threading.Thread(target=look_up, daemon=True)
        resolver.start()
        resolver.join(self.deadline.seconds)
        if not results:
            raise _StepError(
                f"{host}: the name server did not respond within {self.deadline.seconds:g} s", DnsResult(host)
            )
        if isinstance(results[0], OSError):
            error = results[0]
            raise _StepError(f"{host}: {DNS_ERRORS.get(error.errno or 0, error.strerror)}", DnsResult(host))
        self.addresses = tuple((family, address) for family, _, _, _, address in results[0])
        return DnsResult(host, tuple(address[0] for _, address in self.addresses))

    def connect(self) -> TcpResult:
        """Connect to the first address that accepts. Each may use an equal share of the remaining time."""
        failed: list[tuple[str, str]] = []
        for index, (_, address) in enumerate(self.addresses):
            endpoint = _format_endpoint(address)
            try:
                share = self.deadline.left() / (len(self.addresses) - index)
                self._sock = self._open(index, share)
            except TimeoutError:
                failed.append((endpoint, "no response in time; does a firewall drop the packets?"))
            except OSError as error:
                failed.append((endpoint, CONNECT_ERRORS.get(error.errno or 0, os.strerror(error.errno or 0))))
            else:
                self._connected = index
                return TcpResult(endpoint, tuple(failed))
        raise _StepError("; ".join(f"{address}: {why}" for address, why in failed), TcpResult(None, tuple(failed)))

    def _open(self, index: int, timeout: float) -> socket.socket:
        family, address = self.addresses[index]
        sock = self.resources.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.settimeout(timeout)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def secure(self) -> TlsResult:
        """Make the TLS handshake, and verify the certificate with the context and the URL's host."""
        assert self._sock is not None
        self._wire = wire = Wire(self._sock, self.trust.context, self.target.host, self.deadline)
        during = "during the TLS handshake"
        with self._explain_failures(during):
            try:
                wire.secure()
            except ssl.SSLCertVerificationError as error:
                found, why_not = self._fetch_untrusted()
                words = explain_distrust(error, found.chain, self.target.host, self.trust.ca)
                raise _StepError(words + why_not, found) from None
            except ssl.SSLError as error:
                if isinstance(error, ssl.SSLEOFError) or is_truncation(error):
                    raise _StepError(f"the server closed the connection {during}") from None
                presented = self.trust.presents
                raise _StepError(explain_tls_error(error, bytes(wire.captured), presented=presented)) from None
        return _make_tls_result(wire)

    def _fetch_untrusted(self) -> tuple[TlsResult, str]:
        # OpenSSL does not keep a chain that it does not trust. A second connection, on which nothing is sent, gets it.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        apply_to_client_context(context)
        try:
            assert self._connected is not None
            wire = Wire(self._open(self._connected, self.deadline.left()), context, self.target.host, self.deadline)
            wire.secure()
            found = _make_tls_result(wire)
            wire.end()
        except OSError:
            return TlsResult(), " (a second connection, to fetch the chain, failed)"
        return found, ""

    def upgrade(self) -> UpgradeResult:
        """Send the upgrade request; the response must be a valid ``101`` (RFC 6455 section 4.1)."""
        key = generate_nonce()
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        with self._explain_failures("while waiting for the response to the handshake"):
            self.wire.write((http.send(self._build_request(key)) or b"") + (http.send(h11.EndOfMessage()) or b""))
            response = self._read_response(http)
            found = _make_upgrade_result(response)
            if response.status_code != 101:
                found = replace(found, body=self._read_body(http))
                raise _StepError(describe_refusal(found), found)
            try:
                extensions = _check_upgrade(response, key, self.subprotocols)
            except ValueError as error:
                raise _StepError(f"101, but {printable(str(error))}", found) from None
        self._ws = Connection(ConnectionType.CLIENT, extensions, http.trailing_data[0])
        return found

    def _build_request(self, key: bytes) -> h11.Request:
        fields = [("Host", self.target.authority)] if "host" not in {name.lower() for name, _ in self.fields} else []
        fields += [
            ("Upgrade", "websocket"),
            ("Connection", "Upgrade"),
            ("Sec-WebSocket-Key", key.decode("ascii")),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"),
            ("User-Agent", f"tlstunnel/{__version__}"),
        ]
        if self.subprotocols:
            fields.append(("Sec-WebSocket-Protocol", ", ".join(self.subprotocols)))
        fields += self.fields
        encoded = [(name.encode("ascii"), value.encode()) for name, value in fields]
        return h11.Request(method=b"GET", target=self.target.resource.encode("ascii"), headers=encoded)

    def _read_response(self, http: h11.Connection) -> h11.Response | h11.InformationalResponse:
        seen = b""
        try:
            while True:
                event = http.next_event()
                if isinstance(event, h11.InformationalResponse) and event.status_code != 101:
                    continue
                if isinstance(event, h11.Response | h11.InformationalResponse):
                    return event
                data = self.wire.read()
                if not data:
                    raise _StepError(f"the server closed the connection {describe_end(seen)}")
                seen = seen or data
                http.receive_data(data)
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                raise _StepError(f"the response's head does not end within {MAX_HEAD} bytes") from None
            raise _StepError(
                f"the response is not HTTP/1.1: {describe_beginning(seen)} ({printable(str(error))})"
            ) from None

    def _read_body(self, http: h11.Connection) -> str:
        body = bytearray()
        # The status is known: a body that cannot be read is not another failure.
        with contextlib.suppress(h11.RemoteProtocolError, OSError):
            while len(body) < MAX_BODY:
                event = http.next_event()
                if isinstance(event, h11.Data):
                    body += event.data
                elif event is h11.NEED_DATA:
                    http.receive_data(self.wire.read())
                else:
                    break
        return body[:MAX_BODY].decode("utf-8", "replace").strip()

    def ping(self) -> PingResult:
        """Send a ping with a random payload and wait for its pong, whatever comes before it."""
        payload = secrets.token_bytes(8)
        started = time.perf_counter()
        with self._explain_failures("while waiting for the pong"):
            self.wire.write(self.ws.send(Ping(payload)))
            for event in self._receive_events("before the pong"):
                match event:
                    case Pong(payload=received) if received == payload:
                        return PingResult(time.perf_counter() - started)
                    case Ping():
                        self.wire.write(self.ws.send(event.response()))
                    case CloseConnection():
                        raise _StepError(f"the server closed the WebSocket before the pong, {describe_close(event)}")
                    case _:
                        pass
        raise AssertionError  # pragma: no cover

    def close(self) -> CloseResult:
        """Make the closing handshake (RFC 6455 section 7.1.2), and then send close_notify."""
        with self._explain_failures("while waiting for the server's Close"):
            self.wire.write(self.ws.send(CloseConnection(1000)))
            event = next(
                event for event in self._receive_events("without a Close") if isinstance(event, CloseConnection)
            )
            self.wire.end()
        return CloseResult(int(event.code), event.reason or "")

    def _receive_events(self, when: str) -> Iterator[Event]:
        while True:
            for event in self.ws.events():
                # wsproto reports a broken frame as a Close of its own; only a real one changes the state.
                if isinstance(event, CloseConnection) and self.ws.state in _STILL_OPEN:
                    raise _StepError(f"the server sent a broken frame {when}: {printable(event.reason or '')}")
                yield event
            data = self.wire.read()
            if not data:
                raise _StepError(f"the server closed the connection {when}")
            self.unsolicited += len(data)
            if self.unsolicited > MAX_UNSOLICITED:
                raise _StepError(f"the server sent {MAX_UNSOLICITED // 1_048_576} MiB {when}")
            self.ws.receive_data(data)

    @contextlib.contextmanager
    def _explain_failures(self, during: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise _StepError(f"the check timed out after {self.deadline.seconds:g} s, {during}") from None
        except ssl.SSLError as error:
            # In TLS 1.3 the server checks a client certificate after the client has completed the handshake.
            words = explain_tls_error(error, presented=self.trust.presents)
            raise _StepError(f"{words}, {during}") from None
        except OSError as error:
            raise _StepError(f"connection lost {during}: {os.strerror(error.errno or 0)}") from None


_STILL_OPEN: Final = frozenset({ConnectionState.OPEN, ConnectionState.LOCAL_CLOSING})


def _format_endpoint(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _make_tls_result(wire: Wire) -> TlsResult:
    cipher = wire.tls.cipher()
    chain: list[CertificateDescription] = []
    sent = get_sent_chain(wire.tls)
    for der in sent:
        # OpenSSL accepts certificates that `describe` does not.
        with contextlib.suppress(CertificateError, ValueError, x509.InvalidVersion):
            chain.append(describe(x509.load_der_x509_certificate(der)))
    return TlsResult(
        version=wire.tls.version(),
        cipher=cipher[0] if cipher else None,
        group=find_group(bytes(wire.captured)),
        alpn=wire.tls.selected_alpn_protocol(),
        chain=tuple(chain),
        unreadable=len(sent) - len(chain),
    )


def _make_upgrade_result(response: h11.Response | h11.InformationalResponse) -> UpgradeResult:
    fields = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers.raw_items())

    def value(name: str) -> str | None:
        return ", ".join(value for other, value in fields if other.lower() == name) or None

    return UpgradeResult(
        status=response.status_code,
        reason=response.reason.decode("latin-1"),
        fields=fields,
        subprotocol=value("sec-websocket-protocol"),
        extensions=value("sec-websocket-extensions"),
        request_id=value("x-request-id"),
    )


def _check_upgrade(
    response: h11.Response | h11.InformationalResponse, key: bytes, subprotocols: Sequence[str]
) -> list[Extension]:
    """Return the extensions of a ``101`` (RFC 6455 section 4.1). Raises ValueError if it is invalid."""

    def values(name: bytes) -> list[bytes]:
        return [value for other, value in response.headers if other == name]

    if [value.lower() for value in values(b"upgrade")] != [b"websocket"]:
        raise ValueError("without 'Upgrade: websocket'")
    if b"upgrade" not in {token.strip().lower() for value in values(b"connection") for token in value.split(b",")}:
        raise ValueError("without 'Connection: Upgrade'")
    tokens = values(b"sec-websocket-accept")
    if tokens != [generate_accept_token(key)]:
        raise ValueError("with a wrong Sec-WebSocket-Accept" if tokens else "without Sec-WebSocket-Accept")
    chosen = values(b"sec-websocket-protocol")
    if len(chosen) > 1 or (chosen and chosen[0].decode("latin-1") not in subprotocols):
        raise ValueError(f"with a subprotocol that was not requested: {b', '.join(chosen).decode('latin-1')}")
    offered = b", ".join(values(b"sec-websocket-extensions")).decode("latin-1")
    deflate = PerMessageDeflate()
    accepted = [extension for extension in offered.split(",") if extension.strip()]
    try:
        client_extensions_handshake(accepted, [deflate])
    except (ProtocolError, ValueError, IndexError):
        raise ValueError(f"with extensions that were not requested or are malformed: {offered}") from None
    return [deflate] if accepted else []
