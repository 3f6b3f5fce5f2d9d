"""A client's view of a ``wss://`` endpoint: the steps of a connection, what each found, and why one failed.

``probe()`` yields a ``Step`` for each of DNS, TCP, TLS, handshake, ping and close, as they end, and stops after the
first that fails. Everything shares one budget of time, and what a hostile server can make it hold is bounded. Nothing
is printed here. Text that a server chose stands in the facts as it came; in ``Step.error`` it has been through
``printable``.
"""

import contextlib
import errno
import ipaddress
import os
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import h11
import idna
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from wsproto import ConnectionType
from wsproto.connection import Connection, ConnectionState
from wsproto.events import CloseConnection, Event, Ping, Pong
from wsproto.extensions import Extension, PerMessageDeflate
from wsproto.handshake import client_extensions_handshake
from wsproto.utilities import ProtocolError, generate_accept_token, generate_nonce

from tlstunnel import __version__
from tlstunnel.certificates.describe import CertificateFacts, facts, read
from tlstunnel.errors import CertificateError
from tlstunnel.escaping import printable
from tlstunnel.tls.truncation import is_truncation

# Bytes of an answer's head. Servers send less than 8 KiB as a rule (node's limit for a head is 16 KiB), so a larger one
# is a fault worth naming; this leaves room to see the cookies of the worst.
MAX_HEAD: Final = 65_536
# Bytes of a refusal's body that are kept.
MAX_BODY: Final = 1024
# Bytes read while waiting for a pong or a Close: a busy feed sends some, an endless stream must end.
MAX_UNASKED: Final = 16_777_216
# Bytes of the server's TLS records kept to find the group: OpenSSL takes certificate messages of up to 100 KiB, and in
# TLS 1.2 the group stands behind them.
MAX_CAPTURED: Final = 131_072
# Bytes of plaintext taken at once: deflate swells up to 1032-fold, so this is some 4 MiB of memory at worst.
READ_SIZE: Final = 4096

# RFC 6455 section 4.1: these are the check's own; RFC 9112 section 6: a handshake has no body.
_OWN_FIELDS: Final = frozenset({"connection", "content-length", "transfer-encoding", "upgrade"})
# RFC 9110 section 5.6.2.
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# Underscores are no host name's by RFC 1123, but live in private zones, and getaddrinfo() takes them.
_ASCII_NAME: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*")

# RFC 3986 section 3.2, without the user.
_AUTHORITY: Final = re.compile(r"(?:\[(?P<six>[^\]]*)\]|(?P<name>[^:\[\]]+))(?::(?P<port>[0-9]{0,6}))?")

# IANA, TLS Supported Groups.
GROUPS: Final = {
    0x0017: "secp256r1",
    0x0018: "secp384r1",
    0x0019: "secp521r1",
    0x001A: "brainpoolP256r1",
    0x001B: "brainpoolP384r1",
    0x001C: "brainpoolP512r1",
    0x001D: "X25519",
    0x001E: "X448",
    0x0100: "ffdhe2048",
    0x0101: "ffdhe3072",
    0x0102: "ffdhe4096",
    0x0103: "ffdhe6144",
    0x0104: "ffdhe8192",
    0x11EB: "SecP256r1MLKEM768",
    0x11EC: "X25519MLKEM768",
    0x11ED: "SecP384r1MLKEM1024",
}
# RFC 8446 section 4.1.3: the random of a ServerHello that is a HelloRetryRequest.
_RETRY_RANDOM: Final = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")

# What a person can conclude from an alert (RFC 8446 section 6.2), where its name does not say it.
_ALERT_HINTS: Final = {
    "unrecognized_name": "the server has no site of this name",
    "no_application_protocol": "the server does not offer http/1.1 by ALPN",
    "handshake_failure": "no TLS version, cipher or group in common, or a client certificate is missing",
    "protocol_version": "the server takes neither TLS 1.2 nor TLS 1.3",
    "certificate_required": "the server asks for a client certificate",
    "bad_certificate": "the server asks for a client certificate, or for another",
    "internal_error": "the server failed; see its log",
}
# OpenSSL names alerts TLSV1_UNRECOGNIZED_NAME, SSLV3_ALERT_HANDSHAKE_FAILURE, TLSV13_ALERT_CERTIFICATE_REQUIRED.
_ALERT: Final = re.compile(r"(?:SSLV3|TLSV1|TLSV13)_(?:ALERT_)?([A-Z_]+)")

# X509_V_ERR_* of OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_SELF_SIGNED_LEAF, _SELF_SIGNED_IN_CHAIN = 18, 19
_NO_ISSUER: Final = frozenset({2, 20, 21})
_NAME_MISMATCH: Final = frozenset({62, 64})

_CONNECT_WORDS: Final = {
    errno.ECONNREFUSED: "connection refused; is it running on that port?",
    errno.EHOSTUNREACH: "no route to this address",
    errno.ENETUNREACH: "no route to this network",
}
_DNS_WORDS: Final = {
    socket.EAI_NONAME: "name not found",
    socket.EAI_NODATA: "the name has no addresses",
    socket.EAI_AGAIN: "the name server did not answer",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A ``wss://`` URL taken apart. ``host`` is an IP address, or a name in lower case as A-labels (RFC 5891)."""

    url: str
    host: str
    port: int
    resource: str
    """Path and query, as the request line has them (RFC 6455 section 3)."""

    @property
    def authority(self) -> str:
        """The Host field's value (RFC 9110 section 7.2): the port only where it is not 443."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == 443 else f"{host}:{self.port}"

    @classmethod
    def parse(cls, url: str) -> Self:
        """Check a URL against RFC 6455 section 3. Raises ValueError with one line that says what to change."""
        if not url.isprintable() or " " in url:
            raise ValueError("the URL holds spaces or control characters; write them percent-encoded")
        scheme, separator, rest = url.partition("://")
        if not separator or scheme.lower() != "wss":
            raise ValueError(f"check speaks wss; give a URL like wss://HOST[:PORT]/PATH, not {url!r}")
        if "#" in rest:
            raise ValueError("a WebSocket URL has no fragment; write # in a path as %23")
        end = next((at for at, char in enumerate(rest) if char in "/?"), len(rest))
        authority, resource = rest[:end], rest[end:]
        if "@" in authority:
            raise ValueError("a WebSocket URL has no user or password; use --header 'Authorization: ...'")
        parts = _AUTHORITY.fullmatch(authority)
        if parts is None:
            raise ValueError(f"{authority!r} is not HOST[:PORT]; an IPv6 address stands in brackets")
        port = int(parts["port"] or 443)
        if not 1 <= port <= 65_535:
            raise ValueError("the port must be a number from 1 to 65535")
        host = _name(parts["name"]) if parts["six"] is None else _ipv6(parts["six"])
        resource = resource if resource.startswith("/") else f"/{resource}"
        return cls(url, host, port, quote(resource, safe="!$%&'()*+,/:;=?@~[]"))


def _ipv6(host: str) -> str:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        raise ValueError(f"[{host}] is not an IPv6 address") from None
    if address.scope_id is not None:
        raise ValueError(f"[{host}] holds a zone, which means nothing in a URL that others read")
    return str(address)


def _name(host: str) -> str:
    name = host.removesuffix(".")
    try:
        ascii_name = name if name.isascii() else idna.encode(name, uts46=True).decode("ascii")
    except idna.IDNAError as error:
        raise ValueError(f"{host!r} is not a host name: {error}") from None
    if len(ascii_name) > 253 or not _ASCII_NAME.fullmatch(ascii_name):
        raise ValueError(f"{host!r} is not a host name")
    return ascii_name.lower()


def parse_field(text: str) -> tuple[str, str]:
    """Split ``N: V`` into a field for the request (RFC 9110 section 5). Raises ValueError naming what is wrong."""
    name, colon, value = text.partition(":")
    if not colon or not _TOKEN.fullmatch(name):
        raise ValueError(f"a header is written 'Name: value', not {text!r}")
    if name.lower() in _OWN_FIELDS or name.lower().startswith("sec-websocket-"):
        raise ValueError(f"{name} is set by the check itself")
    value = value.strip(" \t")
    if not value.isprintable():
        raise ValueError(f"the value of {name} holds control characters")
    return name, value


def check_subprotocols(names: Sequence[str]) -> tuple[str, ...]:
    """Check that each is a token and none is doubled (RFC 6455 section 4.1). Raises ValueError naming the one."""
    for index, name in enumerate(names):
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is not a subprotocol's name")
        if name in names[:index]:
            raise ValueError(f"{name!r} is given twice")
    return tuple(names)


@dataclass(frozen=True, slots=True)
class Trust:
    """A client's TLS context, and the file (if any) that says which authorities it trusts."""

    context: ssl.SSLContext
    ca: Path | None

    @classmethod
    def of(cls, ca: Path | None) -> Self:
        """TLS 1.2 or later, trusting the certificates in ``ca`` alone, or what this machine trusts.

        Raises CertificateError, naming the file, where it cannot be read or holds no certificate.
        """
        given = b"".join(certificate.public_bytes(Encoding.DER) for certificate in read(ca)) if ca else None
        # It writes keys to SSLKEYLOGFILE where that is set, which someone who looks at a connection may want.
        context = ssl.create_default_context(cadata=given)
        # Python 3.13 turned both on: the verdict must not depend on whose Python asks. No browser is strict about the
        # form of extensions, and a certificate given with --ca is trusted though it be no root.
        context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~ssl.VERIFY_X509_STRICT
        context.set_alpn_protocols(["http/1.1"])
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF  # on by default in Python 3.11.2
        return cls(context, ca)


@dataclass(frozen=True, slots=True)
class DnsFacts:
    """``addresses`` in the order in which they are tried."""

    host: str
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TcpFacts:
    """``address`` is the one connected to; ``failed`` the ones before it, each with the reason."""

    address: str | None
    failed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """``chain`` is what the server sent, leaf first, trusted or not. What is not known is None."""

    version: str | None = None
    cipher: str | None = None
    group: str | None = None
    alpn: str | None = None
    chain: tuple[CertificateFacts, ...] = ()
    unreadable: int = 0
    """How many further certificates of the chain could not be parsed."""


@dataclass(frozen=True, slots=True)
class HandshakeFacts:
    """The response. ``fields`` in the server's order and case, latin-1; ``body`` is a refusal's, its first 1 KiB."""

    status: int
    reason: str
    fields: tuple[tuple[str, str], ...]
    subprotocol: str | None = None
    extensions: str | None = None
    request_id: str | None = None
    body: str = ""


@dataclass(frozen=True, slots=True)
class PingFacts:
    """``round_trip`` in seconds, from before the ping is written to the pong's arrival."""

    round_trip: float


@dataclass(frozen=True, slots=True)
class CloseFacts:
    """The server's Close: 1005 where it held no code (RFC 6455 section 7.1.5)."""

    code: int
    reason: str


Facts = DnsFacts | TcpFacts | TlsFacts | HandshakeFacts | PingFacts | CloseFacts


@dataclass(frozen=True, slots=True)
class Step:
    """One step: ``name`` of dns, tcp, tls, handshake, ping, close; ``error`` is None where it went well."""

    name: str
    seconds: float
    facts: Facts | None
    error: str | None

    @property
    def ok(self) -> bool:
        """Whether it went well."""
        return self.error is None


def probe(
    target: Target,
    trust: Trust,
    *,
    fields: Sequence[tuple[str, str]] = (),
    subprotocols: Sequence[str] = (),
    timeout: float = 10.0,
) -> Iterator[Step]:
    """Connect as a client does and yield each step as it ends; the first that failed is the last.

    ``fields`` are added to the request; a Host among them takes the place of the URL's. ``timeout`` is in seconds, for
    all steps together. Connections are closed when the iterator ends or is closed.
    """
    run = _Run(target, trust, tuple(fields), tuple(subprotocols), _Deadline(timeout))
    stages: tuple[tuple[str, Callable[[], Facts]], ...] = (
        ("dns", run.resolve),
        ("tcp", run.connect),
        ("tls", run.secure),
        ("handshake", run.upgrade),
        ("ping", run.ping),
        ("close", run.close),
    )
    with contextlib.closing(run.resources):
        for name, stage in stages:
            step = _timed(name, stage)
            yield step
            if not step.ok:
                return


def _timed(name: str, stage: Callable[[], Facts]) -> Step:
    started = time.perf_counter()
    try:
        found, error = stage(), None
    except _StepError as failure:
        return Step(name, time.perf_counter() - started, failure.facts, str(failure))
    return Step(name, time.perf_counter() - started, found, error)


class _StepError(Exception):
    def __init__(self, message: str, found: Facts | None = None) -> None:
        super().__init__(message)
        self.facts = found


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds; raises TimeoutError where none are left, since 0 would make a socket non-blocking."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Wire:
    """TLS over a blocking socket, through memory BIOs, so that the server's plaintext records can be read too."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, host: str, deadline: _Deadline) -> None:
        self._sock = sock
        self._deadline = deadline
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.captured = bytearray()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def secure(self) -> None:
        """Do the TLS handshake. Raises ssl.SSLError, TimeoutError, or OSError for a lost connection."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
            except ssl.SSLError:
                # The alert says to the server why.
                self._flush()
                raise
            else:
                self._flush()
                return

    def read(self) -> bytes:
        """Take some bytes; none at the end, be it a clean one or not."""
        while True:
            # Endless records without a byte of content keep OpenSSL from asking for more.
            self._deadline.left()
            try:
                return self.tls.read(READ_SIZE)
            except ssl.SSLWantReadError:
                self._flush()
                self._fill()
            except ssl.SSLError as error:
                if isinstance(error, ssl.SSLZeroReturnError | ssl.SSLEOFError) or is_truncation(error):
                    return b""
                raise

    def write(self, data: bytes) -> None:
        self.tls.write(data)
        self._flush()

    def end(self) -> None:
        """Send ``close_notify``, for which nobody waits."""
        with contextlib.suppress(OSError):
            self.tls.unwrap()
        with contextlib.suppress(OSError):
            self._flush()

    def _flush(self) -> None:
        data = self._outgoing.read()
        if not data:
            # Sending nothing would take a reset's error from the read that should name it.
            return
        # A server that has refused and closed resets what comes after: what it said first is still to be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sock.settimeout(self._deadline.left())
            self._sock.sendall(data)

    def _fill(self) -> None:
        self._sock.settimeout(self._deadline.left())
        data = self._sock.recv(16_384)
        if not data:
            self._incoming.write_eof()
            return
        self.captured += data[: MAX_CAPTURED - len(self.captured)]
        self._incoming.write(data)


@dataclass
class _Run:
    """One connection on its way through the steps: what a step leaves for the next."""

    target: Target
    trust: Trust
    fields: tuple[tuple[str, str], ...]
    subprotocols: tuple[str, ...]
    deadline: _Deadline

    def __post_init__(self) -> None:
        self.resources = contextlib.ExitStack()
        self.addresses: tuple[tuple[socket.AddressFamily, tuple[Any, ...]], ...] = ()
        self.unasked = 0

    def resolve(self) -> DnsFacts:
        """Ask for all addresses of the name, in the system's order (RFC 6724)."""
        host = self.target.host
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(socket.getaddrinfo(host, self.target.port, type=socket.SOCK_STREAM))
            except OSError as error:
                answers.append(error)

        # getaddrinfo() takes no timeout; a daemon thread may be left behind.
        resolver = threading.Thread(target=ask, daemon=True)
        resolver.start()
        resolver.join(self.deadline.seconds)
        if not answers:
            raise _StepError(f"{host}: the name server did not answer in {self.deadline.seconds:g} s", DnsFacts(host))
        if isinstance(answers[0], OSError):
            error = answers[0]
            raise _StepError(f"{host}: {_DNS_WORDS.get(error.errno or 0, error.strerror)}", DnsFacts(host))
        self.addresses = tuple((family, address) for family, _, _, _, address in answers[0])
        return DnsFacts(host, tuple(address[0] for _, address in self.addresses))

    def connect(self) -> TcpFacts:
        """Connect to the first address that takes it; each may use its share of the time left."""
        failed: list[tuple[str, str]] = []
        for index, (_, address) in enumerate(self.addresses):
            shown = _endpoint(address)
            try:
                share = self.deadline.left() / (len(self.addresses) - index)
                self._open(index, share)
            except TimeoutError:
                failed.append((shown, "no answer in time; does a firewall drop it?"))
            except OSError as error:
                failed.append((shown, _CONNECT_WORDS.get(error.errno or 0, os.strerror(error.errno or 0))))
            else:
                self.connected = index
                return TcpFacts(shown, tuple(failed))
        raise _StepError("; ".join(f"{address}: {why}" for address, why in failed), TcpFacts(None, tuple(failed)))

    def _open(self, index: int, timeout: float) -> socket.socket:
        family, address = self.addresses[index]
        self.sock = self.resources.enter_context(socket.socket(family, socket.SOCK_STREAM))
        self.sock.settimeout(timeout)
        self.sock.connect(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.sock

    def secure(self) -> TlsFacts:
        """Do the TLS handshake, verified against the context's trust and the URL's host."""
        self.wire = wire = _Wire(self.sock, self.trust.context, self.target.host, self.deadline)
        during = "during the TLS handshake"
        with self._explained(during):
            try:
                wire.secure()
            except ssl.SSLCertVerificationError as error:
                found, why_not = self._untrusted()
                words = _distrust(error, found.chain, self.target.host, self.trust.ca)
                raise _StepError(words + why_not, found) from None
            except ssl.SSLError as error:
                if isinstance(error, ssl.SSLEOFError) or is_truncation(error):
                    raise _StepError(f"the server closed the connection {during}") from None
                raise _StepError(_tls_words(error, bytes(wire.captured))) from None
        return _tls_facts(wire)

    def _untrusted(self) -> tuple[TlsFacts, str]:
        # OpenSSL keeps no chain that it did not trust, so a second connection, on which nothing is sent, fetches it.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["http/1.1"])
        try:
            wire = _Wire(self._open(self.connected, self.deadline.left()), context, self.target.host, self.deadline)
            wire.secure()
            found = _tls_facts(wire)
            wire.end()
        except OSError:
            return TlsFacts(), " (a second connection, to fetch the chain, failed)"
        return found, ""

    def upgrade(self) -> HandshakeFacts:
        """Ask for the upgrade; the answer must be a ``101`` by RFC 6455 section 4.1's rules for clients."""
        key = generate_nonce()
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        with self._explained("while waiting for the answer to the handshake"):
            self.wire.write((http.send(self._request(key)) or b"") + (http.send(h11.EndOfMessage()) or b""))
            response = self._response(http)
            found = _handshake_facts(response)
            if response.status_code != 101:
                found = replace(found, body=self._body(http))
                raise _StepError(_refusal(found), found)
            try:
                extensions = _agreed(response, key, self.subprotocols)
            except ValueError as error:
                raise _StepError(f"101, but {printable(str(error))}", found) from None
        self.ws = Connection(ConnectionType.CLIENT, extensions, http.trailing_data[0])
        return found

    def _request(self, key: bytes) -> h11.Request:
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

    def _response(self, http: h11.Connection) -> h11.Response | h11.InformationalResponse:
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
                    raise _StepError(f"the server closed the connection {_in_its_answer(seen)}")
                seen = seen or data
                http.receive_data(data)
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                raise _StepError(f"the answer's head does not end within {MAX_HEAD} bytes") from None
            raise _StepError(f"the answer is not HTTP/1.1: {_beginning(seen)} ({printable(str(error))})") from None

    def _body(self, http: h11.Connection) -> str:
        body = bytearray()
        # The status is known: what cannot be read of the body is not worth another failure.
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

    def ping(self) -> PingFacts:
        """Send a ping with a payload nobody could guess and wait for its pong, whatever comes before it."""
        payload = secrets.token_bytes(8)
        started = time.perf_counter()
        with self._explained("while waiting for the pong"):
            self.wire.write(self.ws.send(Ping(payload)))
            for event in self._events("before the pong"):
                match event:
                    case Pong(payload=answer) if answer == payload:
                        return PingFacts(time.perf_counter() - started)
                    case Ping():
                        self.wire.write(self.ws.send(event.response()))
                    case CloseConnection():
                        raise _StepError(f"the server closed the WebSocket before the pong, {_close_words(event)}")
                    case _:
                        pass
        raise AssertionError  # pragma: no cover

    def close(self) -> CloseFacts:
        """Do the closing handshake (RFC 6455 section 7.1.2), then our half of the TLS one."""
        with self._explained("while waiting for the server's Close"):
            self.wire.write(self.ws.send(CloseConnection(1000)))
            event = next(event for event in self._events("without a Close") if isinstance(event, CloseConnection))
            self.wire.end()
        return CloseFacts(int(event.code), event.reason or "")

    def _events(self, when: str) -> Iterator[Event]:
        while True:
            for event in self.ws.events():
                # wsproto gives a broken frame as a Close of its own; only a real one changes the state.
                if isinstance(event, CloseConnection) and self.ws.state in _STILL_OPEN:
                    raise _StepError(f"the server sent a broken frame {when}: {printable(event.reason or '')}")
                yield event
            data = self.wire.read()
            if not data:
                raise _StepError(f"the server closed the connection {when}")
            self.unasked += len(data)
            if self.unasked > MAX_UNASKED:
                raise _StepError(f"the server sent {MAX_UNASKED // 1_048_576} MiB {when}")
            self.ws.receive_data(data)

    @contextlib.contextmanager
    def _explained(self, during: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise _StepError(f"the {self.deadline.seconds:g} s of this check ended {during}") from None
        except ssl.SSLError as error:
            # In TLS 1.3 the server judges a client certificate after the client's handshake is done.
            raise _StepError(f"{_tls_words(error)}, {during}") from None
        except OSError as error:
            raise _StepError(f"connection lost {during}: {os.strerror(error.errno or 0)}") from None


_STILL_OPEN: Final = frozenset({ConnectionState.OPEN, ConnectionState.LOCAL_CLOSING})


def _endpoint(address: tuple[Any, ...]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tls_facts(wire: _Wire) -> TlsFacts:
    cipher = wire.tls.cipher()
    chain: list[CertificateFacts] = []
    sent = sent_chain(wire.tls)
    for der in sent:
        # OpenSSL takes certificates that are too odd to describe.
        with contextlib.suppress(CertificateError, ValueError, x509.InvalidVersion):
            chain.append(facts(x509.load_der_x509_certificate(der)))
    return TlsFacts(
        version=wire.tls.version(),
        cipher=cipher[0] if cipher else None,
        group=group(bytes(wire.captured)),
        alpn=wire.tls.selected_alpn_protocol(),
        chain=tuple(chain),
        unreadable=len(sent) - len(chain),
    )


def sent_chain(tls: Any) -> list[bytes]:
    """Give the certificates that the server sent, leaf first, DER. ``tls`` is an ``ssl.SSLObject``.

    Public API from Python 3.13; before it, what Python 3.10 put beneath; the leaf alone where that is missing too.
    """
    if hasattr(tls, "get_unverified_chain"):
        return list(tls.get_unverified_chain())
    beneath: Any = getattr(tls, "_sslobj", None)
    if hasattr(beneath, "get_unverified_chain"):
        # 2 is _ssl.ENCODING_DER.
        return [certificate.public_bytes(2) for certificate in beneath.get_unverified_chain() or ()]
    leaf = tls.getpeercert(binary_form=True)
    return [leaf] if leaf else []


def group(captured: bytes) -> str | None:
    """Name the key exchange group, from the start of what the server sent: never raises, None where it is not there.

    In TLS 1.3 it is the ServerHello's key_share (RFC 8446 section 4.2.8), the last one if a HelloRetryRequest came
    first; in TLS 1.2 the ServerKeyExchange's named curve (RFC 8422 section 5.4).
    """
    for kind, body in _messages(captured):
        number: int | None = None
        if kind == 2 and body[2:34] != _RETRY_RANDOM:
            number = _key_share(body)
        elif kind == 12 and body[:1] == b"\x03":
            number = int.from_bytes(body[1:3])
        if number is not None:
            # 0x03 may also begin a finite-field prime's length: then this is no group's number.
            return GROUPS.get(number) if kind == 12 else GROUPS.get(number, f"0x{number:04x}")
    return None


def _messages(captured: bytes) -> Iterator[tuple[int, bytes]]:
    """TLS handshake messages of the plaintext records (RFC 8446 sections 4 and 5.1), as far as they go."""
    buffer, at = b"", 0
    # 22 is handshake; 20, change_cipher_spec, stands between the two ServerHellos of a HelloRetryRequest.
    while captured[at : at + 1] in {b"\x14", b"\x16"}:
        length = int.from_bytes(captured[at + 3 : at + 5])
        if captured[at] == 0x16:
            buffer += captured[at + 5 : at + 5 + length]
        at += 5 + length
        while len(buffer) >= 4 and len(buffer) >= 4 + int.from_bytes(buffer[1:4]):
            end = 4 + int.from_bytes(buffer[1:4])
            yield buffer[0], buffer[4:end]
            buffer = buffer[end:]


def _key_share(server_hello: bytes) -> int | None:
    # Version 2, random 32, session id with its length, cipher 2, compression 1, length of extensions 2.
    at = 35 + int.from_bytes(server_hello[34:35]) + 5
    while at + 4 <= len(server_hello):
        kind, length, named = (int.from_bytes(server_hello[at + i : at + i + 2]) for i in (0, 2, 4))
        if kind == 51:
            return named
        at += 4 + length
    return None


def _tls_words(error: ssl.SSLError, captured: bytes = b"") -> str:
    if captured.startswith(b"HTTP/"):
        return "the server speaks plain HTTP on this port, not TLS"
    if captured and captured[0] not in range(20, 25):
        return f"the server does not speak TLS on this port: {_beginning(captured)}"
    reason = error.reason or "unknown error"
    alert = _ALERT.fullmatch(reason)
    if alert is None:
        return f"TLS error: {reason.lower().replace('_', ' ')}"
    name = alert[1].lower()
    hint = _ALERT_HINTS.get(name)
    return f"TLS alert {name}: {hint}" if hint else f"TLS alert {name}"


def _distrust(
    error: ssl.SSLCertVerificationError, chain: Sequence[CertificateFacts], host: str, ca: Path | None
) -> str:
    code, now = error.verify_code, datetime.now(UTC)
    words = f"certificate not trusted: {error.verify_message}"
    if code in _NAME_MISMATCH:
        names = ", ".join(chain[0].names) if chain else ""
        words = f"name mismatch: certificate is for {names or 'no name'}, not for {host}"
    elif code == _EXPIRED:
        late = [certificate for certificate in chain if certificate.not_after < now]
        words = "; ".join(
            f"certificate {_subject(certificate)} expired {_days((now - certificate.not_after).days)} ago"
            for certificate in late
        )
        words = words or "certificate expired"
    elif code == _NOT_YET_VALID:
        words = f"certificate is not valid yet: {_first_validity(chain, now)} (is this machine's clock right?)"
    elif code == _SELF_SIGNED_LEAF:
        words = "certificate not trusted: it is self-signed; pass --ca with the certificate itself if you trust it"
    elif code == _SELF_SIGNED_IN_CHAIN:
        words = f"certificate not trusted: self-signed certificate in chain; {_ca_advice(chain, ca)}"
    elif code in _NO_ISSUER:
        words = (
            "certificate not trusted: its issuer is unknown, or the server leaves an intermediate certificate out; "
            f"{_ca_advice(chain, ca)}"
        )
    return words


def _ca_advice(chain: Sequence[CertificateFacts], ca: Path | None) -> str:
    issuer = chain[-1].issuer if chain else "its authority"
    return f"pass --ca with the certificate of {issuer}" if ca is None else f"{ca} does not hold that of {issuer}"


def _first_validity(chain: Sequence[CertificateFacts], now: datetime) -> str:
    early = [certificate for certificate in chain if certificate.not_before > now]
    return "; ".join(f"{_subject(certificate)} begins {certificate.not_before:%Y-%m-%d}" for certificate in early)


def _subject(certificate: CertificateFacts) -> str:
    return certificate.subject or ", ".join(certificate.names) or "without a name"


def _days(count: int) -> str:
    return f"{count} day" if count == 1 else f"{count} days"


def _handshake_facts(response: h11.Response | h11.InformationalResponse) -> HandshakeFacts:
    fields = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers.raw_items())

    def value(name: str) -> str | None:
        return ", ".join(value for other, value in fields if other.lower() == name) or None

    return HandshakeFacts(
        status=response.status_code,
        reason=response.reason.decode("latin-1"),
        fields=fields,
        subprotocol=value("sec-websocket-protocol"),
        extensions=value("sec-websocket-extensions"),
        request_id=value("x-request-id"),
    )


def _agreed(
    response: h11.Response | h11.InformationalResponse, key: bytes, subprotocols: Sequence[str]
) -> list[Extension]:
    """Give the extensions of a ``101`` (RFC 6455 section 4.1). Raises ValueError saying which rule it breaks."""

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
        raise ValueError(f"with a subprotocol that was not asked for: {b', '.join(chosen).decode('latin-1')}")
    answer = b", ".join(values(b"sec-websocket-extensions")).decode("latin-1")
    deflate = PerMessageDeflate()
    accepted = [extension for extension in answer.split(",") if extension.strip()]
    try:
        client_extensions_handshake(accepted, [deflate])
    except (ProtocolError, ValueError, IndexError):
        raise ValueError(f"with extensions that were not asked for or are malformed: {answer}") from None
    return [deflate] if accepted else []


def _refusal(found: HandshakeFacts) -> str:
    words = f"the server answered {found.status} {printable(found.reason)}".rstrip()
    location = next((value for name, value in found.fields if name.lower() == "location"), None)
    if location is not None and 300 <= found.status < 400:
        words += f", to {printable(location)}"
    if found.request_id is not None:
        words += f" (id {printable(found.request_id)})"
    return f"{words}: {printable(found.body)}" if found.body else words


def _in_its_answer(seen: bytes) -> str:
    return "in the middle of its answer to the handshake" if seen else "without an answer to the handshake"


def _beginning(data: bytes) -> str:
    return f"it begins with '{printable(data[:32].decode('latin-1'))}'"


def _close_words(event: CloseConnection) -> str:
    reason = f" ({printable(event.reason)})" if event.reason else ""
    return f"code {int(event.code)}{reason}"
