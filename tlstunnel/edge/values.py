"""What an edge worker gets and returns. No I/O.

Whatever a worker may not do raises an exception at once, so that the traceback names its line.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import ClassVar
from urllib.parse import quote, urlencode

from multidict import CIMultiDict, CIMultiDictProxy, MultiDict, MultiDictProxy

from tlstunnel.addresses import OriginAddress, quoted
from tlstunnel.config import FIELD_NAME, KEPT_FIELD
from tlstunnel.edge.limits import LogFields, LogValue, join_log, join_tags, parse_log, parse_tags, parse_until
from tlstunnel.firewall.facts import Facts, normalise_path
from tlstunnel.handshake import request as handshake
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.fields import group_by_name
from tlstunnel.handshake.forwarding import NO_EDITS, Edits, apply_edits
from tlstunnel.handshake.refusal import Fields, Refusal
from tlstunnel.journal.events import Reason

FieldValue = str | Sequence[str]
"""The value of a field, or several values, each sent as a field of its own."""

_PATH_SAFE = "/!$&'()*+,;=:@~"
"""Characters that a path has unescaped (RFC 3986 section 3.3), besides letters, digits, ``-``, ``.`` and ``_``."""

_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_PROTOCOL = b"sec-websocket-protocol"
_ENDPOINT = "an edge worker cannot be a WebSocket endpoint, nor respond in place of the origin"
_BODILESS = 304


class EdgeError(ValueError):
    """An edge worker did something that is not allowed. This is a bug in the worker; the client gets a 500."""


class InvalidReply(EdgeError):
    """A `Reply` is invalid. The worker meant to refuse, so ``worker_on_error`` does not forward the request."""


class InvalidLimit(InvalidReply):
    """`until` or `tags` are invalid. Without them nobody could end the tunnel, so the request is not forwarded."""


@dataclass(frozen=True, slots=True)
class TLS:
    """The client's TLS: version and cipher as OpenSSL names them, `server_name` (SNI) and `ja4`, or ""."""

    version: str
    cipher: str
    server_name: str
    ja4: str


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The client's certificate, verified as the site requires: its subject (RFC 4514, visible ASCII), and its DER."""

    subject: str
    der: bytes


@dataclass(frozen=True, eq=False)
class WorkerRequest:
    """An upgrade request that has passed the firewall. Immutable: `forward` returns a changed one.

    `id` is the id of the log record, and of ``X-Request-Id``. `origin` is the one passed to `forward`, None if the
    tunnel chooses.
    """

    method: ClassVar[str] = "GET"
    id: str
    client_certificate: ClientCertificate | None = None
    origin: str | None = None
    _facts: Facts = dataclasses.field(kw_only=True, repr=False)
    _edits: Edits = dataclasses.field(kw_only=True, repr=False, default=NO_EDITS)
    _address: OriginAddress | None = dataclasses.field(kw_only=True, repr=False, default=None)
    _original: handshake.UpgradeRequest = dataclasses.field(kw_only=True, repr=False)
    _until: float | None = dataclasses.field(kw_only=True, repr=False, default=None)
    _tags: tuple[str, ...] = dataclasses.field(kw_only=True, repr=False, default=())
    _log: LogFields = dataclasses.field(kw_only=True, repr=False, default=())

    @property
    def until(self) -> float | None:
        """The Unix time that was passed to `forward`, None if there is none."""
        return self._until

    @property
    def tags(self) -> dict[str, str]:
        """The tags that were passed to `forward`, by name."""
        return dict(tag.split("=", 1) for tag in self._tags)

    @cached_property
    def tls(self) -> TLS:
        """The client's TLS."""
        known = self._facts.connection
        return TLS(known.tls_version, known.tls_cipher, known.tls_sni, known.tls_ja4)

    @property
    def path(self) -> str:
        """The path, decoded and normalised as for rules (docs/firewall.md). Use this one for comparisons."""
        return self._facts.path

    @property
    def raw_path(self) -> str:
        """The path as sent, without the query."""
        return self._facts.raw_path

    @cached_property
    def query(self) -> MultiDictProxy[str]:
        """The query's values by name, decoded: ``query["room"]`` is the first, ``query.getall("room")`` all of them."""
        return MultiDictProxy(MultiDict([(k, v) for k, values in self._facts.query.items() for v in values]))

    @cached_property
    def headers(self) -> CIMultiDictProxy[str]:
        """The fields by name, in any case: ``headers["origin"]`` is the first, ``getall("origin")`` returns all.

        They are in order, and bytes beyond ASCII are decoded as latin-1.
        """
        return CIMultiDictProxy(
            CIMultiDict([(n.decode("ascii"), v.decode("latin-1")) for n, v in self._facts.request.fields])
        )

    @cached_property
    def cookies(self) -> MultiDictProxy[str]:
        """The cookies by name: ``cookies["sid"]`` is the first, ``cookies.getall("sid")`` all different ones."""
        return MultiDictProxy(MultiDict([(k, v) for k, values in self._facts.cookie_values.items() for v in values]))

    @property
    def subprotocols(self) -> tuple[str, ...]:
        """The subprotocols that the client offers, in order."""
        return self._facts.subprotocols

    @property
    def host(self) -> str:
        """The host of the Host field, in lower case, without port and brackets."""
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

    def forward(  # noqa: PLR0913 - everything that can be changed
        self,
        *,
        origin: str | None = None,
        path: str | None = None,
        query: str | Mapping[str, FieldValue] | None = None,
        headers: Mapping[str, FieldValue] | None = None,
        remove_headers: Iterable[str] = (),
        subprotocols: Iterable[str] | None = None,
        until: datetime | float | None = None,
        tags: Mapping[str, str] | None = None,
        log: Mapping[str, LogValue] | None = None,
    ) -> "WorkerRequest":
        """Return a changed copy of this request. If the worker returns it, it is sent to the origin.

        - `origin`: ``host:port``, ``ws://...``, ``wss://...`` or ``unix:...``. If it is neither an origin of the site
          nor in ``worker_origins``, the client gets a 502.
        - `path`: another path, decoded like `path`; it is escaped where necessary. The query stays.
        - `query`: as it appears after the ``?``, or values by name; ``""`` or ``{}`` for none.
        - `headers`: fields to set. Each replaces the fields of that name that the client sent or the tunnel would set.
          A value, or a list for several fields. ``Host`` is the only field of the handshake that can be set.
        - `remove_headers`: names of fields to remove, whether the client or the tunnel set them.
        - `subprotocols`: some of those that the client offers, in its order. An empty list removes the field.
        - `until`: when the tunnel ends: a datetime with a time zone, or a Unix time in seconds. If it is over when the
          worker returns, the client gets a 403.
        - `tags`: up to 8 names and values, such as ``{"user": "42"}``, by which the tunnel is listed and ended.
        - `log`: up to 8 names and values, such as ``{"room": "7"}``, for the field ``edge_log`` of the record.

        What is not passed stays as it is. Raises EdgeError.
        """
        request = self._facts.request
        assert isinstance(request, handshake.UpgradeRequest)
        address = self._address if origin is None else _parse_origin(origin)
        edits = _build_edits(headers or {}, remove_headers)
        fields = tuple(apply_edits(request.fields, edits))  # as the worker sees them in the changed request
        offered = request.subprotocols
        if subprotocols is not None:
            if isinstance(subprotocols, str) or not isinstance(subprotocols, Iterable):
                raise EdgeError('subprotocols must be a list such as ["chat"]')
            kept = _select(tuple(subprotocols), self.subprotocols)
            fields, offered = _offer(fields, kept), frozenset(kept)
        changed = dataclasses.replace(
            request,
            target=_build_target(request.target, path, query),
            fields=fields,
            subprotocols=offered,
            by_name=group_by_name(fields),
        )
        facts = self._facts
        try:
            ends = self._until if until is None else parse_until(until)
            joined = self._tags if tags is None else join_tags(self._tags, parse_tags(tags))
        except ValueError as error:
            raise InvalidLimit(str(error)) from None
        logged = self._log if log is None else _join_log(self._log, log)
        return dataclasses.replace(
            self,
            origin=self.origin if origin is None else origin,
            _until=ends,
            _tags=joined,
            _log=logged,
            _facts=Facts(changed, facts.connection, normalise_path(changed.target.partition(b"?")[0]), facts.seconds),
            _edits=self._edits.then(edits),
            _address=address,
        )


@dataclass(frozen=True)
class Reply:
    """A refusal: a `status` from 300 to 599, and a `body` of bytes, or of text, which is sent as UTF-8.

    A list as a value in `headers` makes several fields of that name. ``Content-Type`` is plain text unless `headers`
    set it. The tunnel adds ``Content-Length``, ``Connection`` and ``X-Request-Id``. `log` is for the record, as that of
    `WorkerRequest.forward`. Raises EdgeError.
    """

    status: int
    body: str | bytes = b""
    headers: Mapping[str, FieldValue] = dataclasses.field(default_factory=dict)
    log: Mapping[str, LogValue] = dataclasses.field(default_factory=dict, kw_only=True)
    _refusal: Refusal = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.status, int) or isinstance(self.status, bool):
            raise InvalidReply(f"the status of a reply must be a number from 300 to 599, not {_describe(self.status)}")
        if self.status < 300:
            raise InvalidReply(f"{_ENDPOINT}: the status of a reply must be from 300 to 599, not {self.status}")
        if self.status > 599:
            raise InvalidReply(f"the status of a reply must be from 300 to 599, not {self.status}")
        if not isinstance(self.body, str | bytes):
            raise InvalidReply(f"the body of a reply must be text or bytes, not {_describe(self.body)}")
        if self.status == _BODILESS and self.body:
            raise InvalidReply("a reply with the status 304 has no body")
        body = self.body if isinstance(self.body, bytes) else self.body.encode("utf-8", "backslashreplace")
        # Built now, so that changing `headers` later has no effect.
        refusal = Refusal(int(self.status), Reason.WORKER_REPLY, "", self._build_fields(), body=bytes(body))
        refusal.log = _join_log((), self.log)
        object.__setattr__(self, "_refusal", refusal)

    def _build_fields(self) -> Fields:
        """Return the fields to send, including Content-Type."""
        try:
            fields = _encode_fields(self.headers, host=False)
        except EdgeError as error:
            raise InvalidReply(str(error)) from None
        names = {name.lower() for name, _ in fields}
        if b"x-request-id" in names:
            raise InvalidReply("a reply cannot set X-Request-Id: the tunnel sets it to the id of the request")
        typed = b"content-type" in names or self.status == _BODILESS
        return fields if typed else ((b"Content-Type", b"text/plain; charset=utf-8"), *fields)


def to_worker_request(request: handshake.UpgradeRequest, connection: Connection, now: float) -> WorkerRequest:
    """Return what a worker sees of `request` at the time `now` (``time.time()``)."""
    der = connection.certificate
    return WorkerRequest(
        id=connection.request_id,
        client_certificate=ClientCertificate(connection.client_subject, der) if der is not None else None,
        _facts=Facts(request, connection, normalise_path(request.target.partition(b"?")[0]), now),
        _original=request,
    )


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A worker's decision to forward: the changed request, the edits of its head, and the origin, if it chose one.

    `until` is the Unix time at which the tunnel ends. `tags` are each "name=value". `log` is for the record.
    """

    request: handshake.UpgradeRequest
    edits: Edits
    address: OriginAddress | None
    until: float | None = None
    tags: tuple[str, ...] = ()
    log: LogFields = ()


def to_outcome(result: object, request: WorkerRequest) -> Forwarded | Refusal:
    """Convert what a worker returned to values that hold no object of the worker. Raises EdgeError."""
    if isinstance(result, Reply):
        refusal = getattr(result, "_refusal", None)
        if type(refusal) is not Refusal:
            raise InvalidReply("create a reply with Reply(status, body, headers)")
        return refusal
    if type(result) is not WorkerRequest:
        kind = "None" if result is None else f"a {type(result).__name__}"
        raise EdgeError(f"a worker must return the request, request.forward(...) or a Reply, not {kind}")
    if result._original is not request._original:
        raise EdgeError("a worker must return the request that it was called with; this one is another client's")
    changed = result._facts.request
    assert isinstance(changed, handshake.UpgradeRequest)
    return Forwarded(changed, result._edits, result._address, result._until, result._tags, result._log)


def _join_log(before: LogFields, log: Mapping[str, LogValue]) -> LogFields:
    try:
        return join_log(before, parse_log(log))
    except ValueError as error:
        raise EdgeError(str(error)) from None


def _parse_origin(origin: str) -> OriginAddress:
    if not isinstance(origin, str):
        raise EdgeError(f'an origin must be text such as "shard-1.internal:3000", not {_describe(origin)}')
    try:
        return OriginAddress.parse(origin)
    except ValueError as error:
        raise EdgeError(str(error)) from None


def _build_target(target: bytes, path: str | None, query: str | Mapping[str, FieldValue] | None) -> bytes:
    """Return the request target with another path or query. Raises EdgeError."""
    old_path, mark, old_query = target.partition(b"?")
    if path is not None:
        if not isinstance(path, str) or not path.startswith("/"):
            raise EdgeError(
                f'a path must begin with "/", got {quoted(path) if isinstance(path, str) else _describe(path)}'
            )
        if "\0" in path:
            raise EdgeError("a path must not contain NUL")
        old_path = quote(path, safe=_PATH_SAFE, errors="surrogatepass").encode("ascii")
    if query is None:
        return old_path + mark + old_query
    if not isinstance(query, str | Mapping):
        raise EdgeError(f'a query must be text such as "room=1" or a mapping, not {_describe(query)}')
    if isinstance(query, str):
        if not re.fullmatch(r"[!\"$-~]*", query):
            raise EdgeError("a query must be visible ASCII without #; pass a mapping to have its values escaped")
        new_query = query.encode("ascii")
    else:
        new_query = urlencode(query, doseq=True, errors="surrogatepass").encode("ascii")
    return old_path + b"?" + new_query if new_query else old_path


def _build_edits(headers: Mapping[str, FieldValue], remove_headers: Iterable[str]) -> Edits:
    if isinstance(remove_headers, str) or not isinstance(remove_headers, Iterable):
        raise EdgeError('remove_headers must be a list of names such as ["X-Debug"]')
    added = _encode_fields(headers, host=True)
    hosts = [value for name, value in added if name.lower() == b"host"]
    if hosts and (len(hosts) > 1 or not handshake.is_authority(hosts[0])):
        raise EdgeError("Host must be one host, with or without a port")
    return Edits(
        hosts[0] if hosts else None,
        tuple(field for field in added if field[0].lower() != b"host"),
        frozenset(_encode_name(name, host=False).lower() for name in remove_headers),
    )


def _select(kept: tuple[str, ...], offered: tuple[str, ...]) -> tuple[bytes, ...]:
    """Return the subprotocols to keep. Raises EdgeError unless they are some of `offered`, in order."""
    rest = iter(offered)
    for protocol in kept:
        if protocol not in rest:  # `in` consumes the iterator up to the match
            raise EdgeError("subprotocols must be some of those that the client offers, in its order")
    return tuple(protocol.encode("latin-1") for protocol in kept)


def _offer(fields: Fields, protocols: tuple[bytes, ...]) -> Fields:
    """Return `fields` with these subprotocols, in the place of the first field that had any."""
    encoded: list[tuple[bytes, bytes]] = []
    value = b", ".join(protocols)
    for field in fields:
        if field[0].lower() != _PROTOCOL:
            encoded.append(field)
        elif value:
            encoded.append((field[0], value))
            value = b""
    return tuple(encoded)


def _encode_fields(headers: Mapping[str, FieldValue], *, host: bool) -> Fields:
    if not isinstance(headers, Mapping):
        raise EdgeError(f'headers must be a mapping such as {{"X-User": "7"}}, not {_describe(headers)}')
    encoded = []
    for name, value in headers.items():
        written = _encode_name(name, host=host)
        several = value if isinstance(value, list | tuple) else (value,)
        encoded += [(written, _encode_value(name, one)) for one in several]
    return tuple(encoded)


def _encode_name(name: object, *, host: bool) -> bytes:
    """Encode the name of a field that a worker may set or remove. Raises EdgeError."""
    if not isinstance(name, str) or not FIELD_NAME.fullmatch(name):
        shown = quoted(name) if isinstance(name, str) else _describe(name)
        raise EdgeError(f"expected the name of a field, such as X-User, got {shown}")
    lower = name.lower()
    if KEPT_FIELD.fullmatch(lower.replace("_", "-")) and not (host and lower == "host"):
        hint = "; use subprotocols=" if lower == "sec-websocket-protocol" else ""
        raise EdgeError(f"{name} cannot be changed: it belongs to the handshake or to the connection{hint}")
    return name.encode("ascii")


def _encode_value(name: str, value: object) -> bytes:
    """Encode the value of a field (RFC 9110 section 5.5). Raises EdgeError."""
    if not isinstance(value, str):
        hint = "; use remove_headers to remove a field" if value is None else ""
        raise EdgeError(f"the value of {name} must be text or a list of text, not {_describe(value)}{hint}")
    if not _VALUE.fullmatch(value):
        # The value is not part of the error: it may be a secret of the client.
        raise EdgeError(f"the value of {name} contains a control character or one outside latin-1: escape it")
    return value.strip(" \t").encode("latin-1")


def _describe(value: object) -> str:
    return f"{value!r}"[:100] if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"
