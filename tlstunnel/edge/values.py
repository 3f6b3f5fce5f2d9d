"""What an edge worker is given, and what it gives back. No I/O.

Whatever it may not do fails where it does it, so that its traceback names the line.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar
from urllib.parse import quote, urlencode

from multidict import CIMultiDict, CIMultiDictProxy, MultiDict, MultiDictProxy

from tlstunnel.addresses import OriginAddress, quoted
from tlstunnel.config import FIELD_NAME, KEPT_FIELD
from tlstunnel.firewall.facts import Facts, normal_path
from tlstunnel.handshake import request as handshake
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.fields import by_name
from tlstunnel.handshake.forwarding import NO_EDITS, Edits, edited
from tlstunnel.handshake.refusal import Fields, Refusal
from tlstunnel.journal.events import Reason

FieldValue = str | Sequence[str]
"""Of a field: its value, or several, each on a line of its own."""

_PATH_SAFE = "/!$&'()*+,;=:@~"
"""What stands in a path unescaped (RFC 3986 section 3.3), beside letters, digits, ``-``, ``.`` and ``_``."""

_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_PROTOCOL = b"sec-websocket-protocol"
_ENDPOINT = "an edge worker cannot be a WebSocket endpoint, nor answer in its origin's place"
_BODILESS = 304


class EdgeError(ValueError):
    """An edge worker asks for something that it cannot have. A fault in it, and a 500 for the client."""


class InvalidReply(EdgeError):
    """A refusal was meant, but this is none. So the request is not forwarded, whatever ``worker_on_error`` says."""


@dataclass(frozen=True, slots=True)
class TLS:
    """The client's TLS: version and cipher as OpenSSL names them; `server_name` (SNI) and `ja4` are "" without one."""

    version: str
    cipher: str
    server_name: str
    ja4: str


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The client's certificate, verified as its site demands: its subject (RFC 4514, visible ASCII), and it in DER."""

    subject: str
    der: bytes


@dataclass(frozen=True, eq=False)
class WorkerRequest:
    """An upgrade request that the firewall has let pass. Immutable: `forward` gives a changed one.

    `id` is that of the log and of ``X-Request-Id``. `origin` is what `forward` was told, None where the tunnel chooses.
    """

    method: ClassVar[str] = "GET"
    id: str
    client_certificate: ClientCertificate | None = None
    origin: str | None = None
    _facts: Facts = dataclasses.field(kw_only=True, repr=False)
    _edits: Edits = dataclasses.field(kw_only=True, repr=False, default=NO_EDITS)
    _address: OriginAddress | None = dataclasses.field(kw_only=True, repr=False, default=None)
    _original: handshake.UpgradeRequest = dataclasses.field(kw_only=True, repr=False)

    @cached_property
    def tls(self) -> TLS:
        """What is known of the client's TLS."""
        known = self._facts.connection
        return TLS(known.tls_version, known.tls_cipher, known.tls_sni, known.tls_ja4)

    @property
    def path(self) -> str:
        """The path, decoded and in the one form that rules compare too (docs/firewall.md): what to compare."""
        return self._facts.path

    @property
    def raw_path(self) -> str:
        """The path as sent, escapes and all, without the query."""
        return self._facts.raw_path

    @cached_property
    def query(self) -> MultiDictProxy[str]:
        """The query's values by name, decoded: ``query["room"]`` the first, ``query.getall("room")`` all."""
        return MultiDictProxy(MultiDict([(k, v) for k, values in self._facts.query.items() for v in values]))

    @cached_property
    def headers(self) -> CIMultiDictProxy[str]:
        """The fields by name, whatever its case: ``headers["cookie"]`` the first, ``headers.getall("cookie")`` all.

        In order, bytes beyond ASCII as latin-1.
        """
        return CIMultiDictProxy(
            CIMultiDict([(n.decode("ascii"), v.decode("latin-1")) for n, v in self._facts.request.fields])
        )

    @cached_property
    def cookies(self) -> Mapping[str, str]:
        """The cookies; the first of a name."""
        return MappingProxyType(self._facts.cookies)

    @property
    def subprotocols(self) -> tuple[str, ...]:
        """What ``Sec-WebSocket-Protocol`` offers, in order."""
        return self._facts.subprotocols

    @property
    def host(self) -> str:
        """The Host field's host: lower case, no port, no brackets."""
        return self._facts.host

    @property
    def client_address(self) -> str:
        """The client's IP address, also behind a trusted proxy; "" on a Unix socket."""
        return self._facts.ip

    @property
    def site(self) -> str:
        """The first of the site's names."""
        return self._facts.site

    def __repr__(self) -> str:
        return f"<WorkerRequest {self.id}: {self.raw_path!r} from {self.client_address or 'a Unix socket'}>"

    def forward(  # noqa: PLR0913 - all that may be changed
        self,
        *,
        origin: str | None = None,
        path: str | None = None,
        query: str | Mapping[str, FieldValue] | None = None,
        headers: Mapping[str, FieldValue] | None = None,
        remove_headers: Iterable[str] = (),
        subprotocols: Iterable[str] | None = None,
    ) -> "WorkerRequest":
        """Give this request changed; what is left out stays as it is. Return it, and it goes to the origin.

        - `origin`: ``host:port``, ``ws://``, ``wss://`` or ``unix:``, one of the site's or one that ``worker_origins``
          allows; any other is a 502 for the client.
        - `path`: decoded, as `path` of the request is; it is escaped where that is needed. The query stays.
        - `query`: as it stands behind the ``?``, or values by name; ``""`` or ``{}`` for none.
        - `headers`: each replaces the client's fields of that name, and the tunnel's own. A value, or several in a
          list. ``Host`` is the one of the handshake's that may be set.
        - `remove_headers`: the client's fields of these names, and the tunnel's own, are left out.
        - `subprotocols`: a part of those asked for, in order; none of them leaves the field out.

        Raises EdgeError.
        """
        request = self._facts.request
        assert isinstance(request, handshake.UpgradeRequest)
        address = self._address if origin is None else _parse_origin(origin)
        edits = _build_edits(headers or {}, remove_headers)
        fields = tuple(edited(request.fields, edits))  # as the worker would see them were it asked again
        offered = request.subprotocols
        if subprotocols is not None:
            if isinstance(subprotocols, str) or not isinstance(subprotocols, Iterable):
                raise EdgeError('subprotocols are a list, such as ["chat"]')
            kept = _select(tuple(subprotocols), self.subprotocols)
            fields, offered = _offer(fields, kept), frozenset(kept)
        changed = dataclasses.replace(
            request,
            target=_build_target(request.target, path, query),
            fields=fields,
            subprotocols=offered,
            by_name=by_name(fields),
        )
        facts = self._facts
        return dataclasses.replace(
            self,
            origin=self.origin if origin is None else origin,
            _facts=Facts(changed, facts.connection, normal_path(changed.target.partition(b"?")[0]), facts.seconds),
            _edits=self._edits.then(edits),
            _address=address,
        )


@dataclass(frozen=True)
class Reply:
    """A refusal: `status` from 300 to 599, and a `body` of bytes, or of text, which is then sent as UTF-8.

    A value in `headers` may be a list, for several fields of that name. ``Content-Type`` is text unless they say it;
    length, ``Connection`` and ``X-Request-Id`` are the tunnel's. Raises EdgeError.
    """

    status: int
    body: str | bytes = b""
    headers: Mapping[str, FieldValue] = dataclasses.field(default_factory=dict)
    _refusal: Refusal = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.status, int) or isinstance(self.status, bool):
            raise InvalidReply(f"the status of a reply is a number from 300 to 599, not {_describe(self.status)}")
        if self.status < 300:
            raise InvalidReply(f"{_ENDPOINT}: a reply has a status from 300 to 599, not {self.status}")
        if self.status > 599:
            raise InvalidReply(f"a reply has a status from 300 to 599, not {self.status}")
        if not isinstance(self.body, str | bytes):
            raise InvalidReply(f"the body of a reply is text or bytes, not {_describe(self.body)}")
        if self.status == _BODILESS and self.body:
            raise InvalidReply("a reply with the status 304 has no body")
        body = self.body if isinstance(self.body, bytes) else self.body.encode("utf-8", "backslashreplace")
        # Once, here: whoever changes what was given afterwards changes nothing of it.
        refusal = Refusal(int(self.status), Reason.WORKER_REPLY, "", self._build_fields(), body=bytes(body))
        object.__setattr__(self, "_refusal", refusal)

    def _build_fields(self) -> Fields:
        """The fields to send, the content's type among them."""
        try:
            fields = _encode_fields(self.headers, host=False)
        except EdgeError as error:
            raise InvalidReply(str(error)) from None
        names = {name.lower() for name, _ in fields}
        if b"x-request-id" in names:
            raise InvalidReply("X-Request-Id is set by the tunnel, to the id of the request")
        typed = b"content-type" in names or self.status == _BODILESS
        return fields if typed else ((b"Content-Type", b"text/plain; charset=utf-8"), *fields)


def to_worker_request(request: handshake.UpgradeRequest, connection: Connection, now: float) -> WorkerRequest:
    """Return what a worker sees of `request` at `now` (``time.time()``)."""
    der = connection.certificate
    return WorkerRequest(
        id=connection.request_id,
        client_certificate=ClientCertificate(connection.client_subject, der) if der is not None else None,
        _facts=Facts(request, connection, normal_path(request.target.partition(b"?")[0]), now),
        _original=request,
    )


@dataclass(frozen=True, slots=True)
class Forwarded:
    """What a worker has made of a request: the one for the origin, the edits of its head, where to if it says so."""

    request: handshake.UpgradeRequest
    edits: Edits
    address: OriginAddress | None


def to_outcome(result: object, request: WorkerRequest) -> Forwarded | Refusal:
    """What a worker's return value amounts to, in values that nothing of the worker's is in. Raises EdgeError."""
    if isinstance(result, Reply):
        refusal = getattr(result, "_refusal", None)
        if type(refusal) is not Refusal:
            raise InvalidReply("a reply is made by Reply(status, body, headers)")
        return refusal
    if type(result) is not WorkerRequest:
        kind = "None" if result is None else f"a {type(result).__name__}"
        raise EdgeError(f"a worker returns the request, request.forward(...) or a Reply, not {kind}")
    if result._original is not request._original:
        raise EdgeError("a worker returns the request that it was asked about, and this is another client's")
    changed = result._facts.request
    assert isinstance(changed, handshake.UpgradeRequest)
    return Forwarded(changed, result._edits, result._address)


def _parse_origin(origin: str) -> OriginAddress:
    if not isinstance(origin, str):
        raise EdgeError(f'an origin is a text such as "shard-1.internal:3000", not {_describe(origin)}')
    try:
        return OriginAddress.parse(origin)
    except ValueError as error:
        raise EdgeError(str(error)) from None


def _build_target(target: bytes, path: str | None, query: str | Mapping[str, FieldValue] | None) -> bytes:
    """The request target with another path or query. Raises EdgeError."""
    old_path, mark, old_query = target.partition(b"?")
    if path is not None:
        if not isinstance(path, str) or not path.startswith("/"):
            raise EdgeError(f'a path begins with "/"; got {quoted(path) if isinstance(path, str) else _describe(path)}')
        if "\0" in path:
            raise EdgeError("a path cannot hold NUL")
        old_path = quote(path, safe=_PATH_SAFE, errors="surrogatepass").encode("ascii")
    if query is None:
        return old_path + mark + old_query
    if not isinstance(query, str | Mapping):
        raise EdgeError(f'a query is a text such as "room=1", or a mapping, not {_describe(query)}')
    if isinstance(query, str):
        if not re.fullmatch(r"[!\"$-~]*", query):
            raise EdgeError("a query is visible ASCII without #; give a mapping to have its values escaped")
        new_query = query.encode("ascii")
    else:
        new_query = urlencode(query, doseq=True, errors="surrogatepass").encode("ascii")
    return old_path + b"?" + new_query if new_query else old_path


def _build_edits(headers: Mapping[str, FieldValue], remove_headers: Iterable[str]) -> Edits:
    if isinstance(remove_headers, str) or not isinstance(remove_headers, Iterable):
        raise EdgeError('remove_headers is a list of names, such as ["X-Debug"]')
    added = _encode_fields(headers, host=True)
    hosts = [value for name, value in added if name.lower() == b"host"]
    if hosts and (len(hosts) > 1 or not handshake.is_authority(hosts[0])):
        raise EdgeError("Host is one host, with a port or without")
    return Edits(
        hosts[0] if hosts else None,
        tuple(field for field in added if field[0].lower() != b"host"),
        frozenset(_encode_name(name, host=False).lower() for name in remove_headers),
    )


def _select(kept: tuple[str, ...], offered: tuple[str, ...]) -> tuple[bytes, ...]:
    """What is left of the subprotocols. Raises EdgeError where these are not some of them, in order."""
    rest = iter(offered)
    for protocol in kept:
        if protocol not in rest:  # takes what it passes over out of it
            raise EdgeError("subprotocols are some of those that the client asks for, in its order")
    return tuple(protocol.encode("latin-1") for protocol in kept)


def _offer(fields: Fields, protocols: tuple[bytes, ...]) -> Fields:
    """The fields with these subprotocols, where the first field of them stood."""
    made: list[tuple[bytes, bytes]] = []
    value = b", ".join(protocols)
    for field in fields:
        if field[0].lower() != _PROTOCOL:
            made.append(field)
        elif value:
            made.append((field[0], value))
            value = b""
    return tuple(made)


def _encode_fields(headers: Mapping[str, FieldValue], *, host: bool) -> Fields:
    if not isinstance(headers, Mapping):
        raise EdgeError(f'headers are a mapping such as {{"X-User": "7"}}, not {_describe(headers)}')
    made = []
    for name, value in headers.items():
        written = _encode_name(name, host=host)
        several = value if isinstance(value, list | tuple) else (value,)
        made += [(written, _encode_value(name, one)) for one in several]
    return tuple(made)


def _encode_name(name: object, *, host: bool) -> bytes:
    """The name of a field that a worker may set or remove. Raises EdgeError."""
    if not isinstance(name, str) or not FIELD_NAME.fullmatch(name):
        shown = quoted(name) if isinstance(name, str) else _describe(name)
        raise EdgeError(f"expected the name of a field, such as X-User, got {shown}")
    lower = name.lower()
    if KEPT_FIELD.fullmatch(lower.replace("_", "-")) and not (host and lower == "host"):
        hint = "; subprotocols= sets it" if lower == "sec-websocket-protocol" else ""
        raise EdgeError(f"{name} belongs to the handshake or to the connection, and cannot be changed{hint}")
    return name.encode("ascii")


def _encode_value(name: str, value: object) -> bytes:
    """A field's value (RFC 9110 section 5.5). Raises EdgeError."""
    if not isinstance(value, str):
        hint = "; remove_headers leaves a field out" if value is None else ""
        raise EdgeError(f"the value of {name} is text, or a list of texts, not {_describe(value)}{hint}")
    if not _VALUE.fullmatch(value):
        # The value itself is not said: it may be a secret, and the client's.
        raise EdgeError(f"the value of {name} holds a control character, or one beyond latin-1: escape it")
    return value.strip(" \t").encode("latin-1")


def _describe(value: object) -> str:
    return f"{value!r}"[:100] if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"
