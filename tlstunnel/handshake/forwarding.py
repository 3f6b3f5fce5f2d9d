"""The request head that is sent to the origin, and the client's address as trusted proxies report it."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from tlstunnel.addresses import Networks
from tlstunnel.handshake.fields import find_hop_by_hop
from tlstunnel.handshake.refusal import UPGRADE, Fields, render_head
from tlstunnel.handshake.request import PlainRequest, Request

_OURS = frozenset({b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"forwarded", b"x-request-id"})
_FORWARDING = re.compile(
    rb"^(?:x-forwarded-.*|forwarded|x-request-id|x-real-ip|x-client-subject)$".replace(b"-", rb"[^0-9a-z\n]"),
    re.MULTILINE,
)
"""Fields that origins believe to be a proxy's, in a list of names, one per line, in any spelling (`to_cgi_name`)."""

_UPGRADED: Fields = ((b"Connection", b"Upgrade"), *UPGRADE)
_FRAMING = frozenset({b"content-length", b"content_length", b"transfer_encoding"})
"""With an underscore too, as above; Transfer-Encoding itself is hop-by-hop."""

_FORWARDABLE = re.compile(rb"[A-Za-z0-9.:\[\]_-]{1,255}")
"""Schemes and hosts that need no escapes in a quoted string."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_PORT_BEHIND = re.compile(r"\[(?P<ipv6>[^]]*)\](?::[0-9]+)?|(?P<ipv4>[0-9.]+):[0-9]+")


@dataclass(frozen=True, slots=True)
class Forwarding:
    """What the origin learns about the client: the peer's address ("" for a Unix socket) and the request's id.

    `trusted` means that the peer is a trusted proxy: its own forwarding fields are kept and extended. `client` is then
    the client's address, if the proxy has named it.
    """

    peer: str
    request_id: str
    trusted: bool
    client: str = ""


_CGI = bytes(byte if chr(byte).isalnum() and byte < 0x80 else ord("_") for byte in range(256))


def to_cgi_name(name: bytes) -> bytes:
    """Return a field's name as CGI sees it: in lower case, with ``_`` for everything but letters and digits.

    WSGI and PHP replace ``-`` alone, but lighttpd and older versions of Apache every other character, too.
    """
    return name.lower().translate(_CGI)


@lru_cache(maxsize=256)  # a site's names are the same for every request, and may be a hundred
def _to_cgi_names(names: frozenset[bytes]) -> frozenset[bytes]:
    return frozenset(map(to_cgi_name, names))


SPOOFABLE_FIELDS = frozenset((
    # The client's address.
    b"true-client-ip", b"x-client-ip", b"x-cluster-client-ip", b"cf-connecting-ip", b"fastly-client-ip",
    b"x-originating-ip", b"x-remote-ip", b"x-remote-addr", b"x-appengine-user-ip", b"x-envoy-external-address",
    b"cf-connecting-ipv6", b"do-connecting-ip", b"client-ip", b"x-azure-clientip", b"x-azure-socketip",
    b"cf-pseudo-ipv4", b"x-forwarded", b"forwarded-for", b"proxy-client-ip", b"wl-proxy-client-ip", b"fly-client-ip",
    b"x-nf-client-connection-ip", b"x-vercel-forwarded-for", b"x-proxyuser-ip", b"incap-client-ip",
    b"x-sucuri-clientip",
    # The target, the host and the method.
    b"x-original-url", b"x-rewrite-url", b"x-original-host", b"x-original-uri", b"x-host", b"x-http-host-override",
    b"x-forwarded-server", b"x-forwarded-prefix", b"x-forwarded-path", b"x-forwarded-uri", b"x-script-name",
    b"x-http-method-override", b"x-http-method", b"x-method-override", b"x-envoy-original-path",
    # Where a server finds files, and what it has checked already (Rack's Sendfile, Next.js: CVE-2025-29927).
    b"x-sendfile-type", b"x-accel-mapping", b"x-middleware-subrequest",
    # The user, and the client's certificate.
    b"remote-user", b"x-remote-user", b"x-forwarded-user", b"x-forwarded-email", b"x-forwarded-groups",
    b"x-forwarded-access-token", b"x-forwarded-preferred-username", b"x-auth-request-user", b"x-auth-request-email",
    b"x-auth-request-groups", b"x-authenticated-user", b"x-webauth-user", b"remote-email", b"remote-groups",
    b"remote-name", b"x-auth-user", b"x-auth-username", b"x-auth-email", b"x-authentik-username", b"x-authentik-email",
    b"x-authentik-groups", b"x-authentik-name", b"x-authentik-uid", b"tailscale-user-login", b"tailscale-user-name",
    b"cf-access-authenticated-user-email", b"x-goog-authenticated-user-email", b"x-goog-authenticated-user-id",
    b"x-ms-client-principal", b"x-ms-client-principal-id", b"x-ms-client-principal-name", b"x-amzn-oidc-identity",
    b"x-authenticated-userid", b"x-consumer-id", b"x-consumer-custom-id", b"x-consumer-username",
    b"ssl-client-cert", b"ssl-client-verify",
    b"ssl-client-s-dn", b"x-ssl-cert", b"x-ssl-client-cert", b"x-ssl-client-verify", b"x-ssl-client-s-dn",
    b"x-ssl-client-dn", b"x-client-cert", b"client-cert", b"client-cert-chain", b"x-forwarded-client-cert",
    b"x-arr-clientcert", b"wl-proxy-client-cert", b"ssl-client-subject-dn", b"x-amzn-mtls-clientcert",
    b"x-amzn-mtls-clientcert-subject", b"x-amzn-mtls-clientcert-leaf",
    # A proxy for the origin's own requests (CVE-2016-5385, "httpoxy").
    b"proxy",
))  # fmt: skip
"""Names, in lower case, of fields that applications trust if a proxy in front sets them, and that any client can send.

The fields that the tunnel sets itself are not among them: it replaces those of clients anyway.
"""


@dataclass(frozen=True, slots=True)
class Edits:
    """What a site changes in a head: the value of Host, fields `added` at the end, names (lower case) `removed`.

    An added field replaces the client's fields of the same name.
    """

    host: bytes | None = None
    added: Fields = ()
    removed: frozenset[bytes] = frozenset()

    def then(self, later: "Edits") -> "Edits":
        """Return these edits followed by `later`, which takes precedence."""
        named = later.names
        kept = tuple(field for field in self.added if to_cgi_name(field[0]) not in named)
        return Edits(later.host or self.host, (*kept, *later.added), self.removed | later.removed)

    @property
    def names(self) -> frozenset[bytes]:
        """The names, in CGI's spelling, of which no field of the client is kept.

        Otherwise a client could send the same field in another spelling that the origin does not distinguish.
        """
        removed = _to_cgi_names(self.removed)
        return removed.union([to_cgi_name(name) for name, _ in self.added]) if self.added else removed


NO_EDITS = Edits()


def render_forwarded_head(request: Request, forwarding: Forwarding, edits: Edits = NO_EDITS) -> bytes:
    """Return the head for the origin: the client's fields, without hop-by-hop and forged ones, and then ours.

    A plain request is the only one on its connection, and the tunnel frames its body again.
    """
    dropped = find_hop_by_hop(request.by_name)
    last: Fields = _UPGRADED
    if isinstance(request, PlainRequest):
        dropped |= _FRAMING
        last = (*_framing_fields(request), (b"Connection", b"close"))
    ours = _forwarding_fields(request, forwarding)
    # One search over all names instead of one for each field: few clients send any of them.
    if forged := _FORWARDING.findall(b"\n".join(request.by_name)):
        dropped |= {name for name in forged if not (forwarding.trusted and _is_kept(name))}
    fields = [field for field in request.fields if field[0].lower() not in dropped]
    fields += (*last, *ours)
    if edits is not NO_EDITS:
        fields = apply_edits(fields, edits)
    return render_head(b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.target), fields)


def apply_edits(fields: Iterable[tuple[bytes, bytes]], edits: Edits) -> list[tuple[bytes, bytes]]:
    """Return the fields after `edits`. The tunnel's own fields may be edited too, such as X-Forwarded-Proto."""
    named = edits.names
    kept = [field for field in fields if to_cgi_name(field[0]) not in named]
    if edits.host is not None:
        kept = [(name, edits.host if name.lower() == b"host" else value) for name, value in kept]
    return [*kept, *edits.added]


def find_client_address(request: Request, peer: str, trusted: Networks) -> str:
    """Return the client's address for a trusted `peer`: the right-most untrusted entry of X-Forwarded-For.

    An entry that is not an address ends the search: the hop that wrote it is then the last one known. An IPv4-mapped
    address becomes the IPv4 address.
    """
    entries = b",".join(request.by_name.get(b"x-forwarded-for", ())).decode("latin-1").split(",")
    known = peer
    for entry in reversed(entries):
        text = entry.strip(" \t")
        with_port = _PORT_BEHIND.fullmatch(text)
        try:
            address = ipaddress.ip_address((with_port["ipv6"] or with_port["ipv4"]) if with_port else text)
        except ValueError:
            break
        if "%" in text:  # a zone is only valid on its own host (RFC 4007 section 6), and may contain anything
            break
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        known = str(mapped or address)
        if known not in trusted:
            break
    return known


def read_request_id(request: Request) -> str | None:
    """Return the X-Request-Id of a trusted proxy, if it can be forwarded and logged."""
    given = request.by_name.get(b"x-request-id", ())
    return given[0].decode("ascii") if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]) else None


def _framing_fields(request: PlainRequest) -> Fields:
    if request.chunked:
        return ((b"Transfer-Encoding", b"chunked"),)
    return () if request.length is None else ((b"Content-Length", b"%d" % request.length),)


def _is_kept(name: bytes) -> bool:
    """Return whether a trusted proxy's forwarding field is forwarded unchanged: not one of ours, in any spelling."""
    return name not in _OURS and name.replace(b"-", b"").isalnum()


def _forwarding_fields(request: Request, forwarding: Forwarding) -> Fields:
    client = forwarding.peer.encode() or b"unknown"
    forwarded = b'for=%b;proto=https;host="%b"' % (_render_node(forwarding.peer), request.authority)
    ours = [
        (b"X-Forwarded-For", client),
        (b"X-Forwarded-Proto", b"https"),
        (b"X-Forwarded-Host", request.authority),
        (b"Forwarded", forwarded),
        (b"X-Request-Id", forwarding.request_id.encode()),
    ]
    if not forwarding.trusted:
        return tuple(ours)
    if b"forwarded" not in request.by_name and forwarding.client not in {"", forwarding.peer}:
        ours[3] = (b"Forwarded", b"%b, %b" % (_render_first_hop(request, forwarding.client), forwarded))
    return tuple((name, _extend_field(request, name, value)) for name, value in ours)


def _render_node(address: str) -> bytes:
    """Return an address, or "" for an unknown one, as Forwarded has it (RFC 7239 section 6)."""
    return (f'"[{address}]"' if ":" in address else address or "unknown").encode()


def _render_first_hop(request: Request, client: str) -> bytes:
    """Return the element of Forwarded for a proxy that sends only X-Forwarded-* (RFC 7239 section 7.4).

    Without it, the first element would name the proxy, and origins take the first one for the client.
    """
    element = b"for=%b" % _render_node(client)
    for parameter, name in ((b"proto", b"x-forwarded-proto"), (b"host", b"x-forwarded-host")):
        value = request.by_name.get(name, (b"",))[0]
        if _FORWARDABLE.fullmatch(value):
            element += b';%b="%b"' % (parameter, value)
    return element


def _extend_field(request: Request, name: bytes, value: bytes) -> bytes:
    """Return a field behind a trusted proxy: lists of hops get `value` appended, others keep the proxy's value."""
    theirs = request.by_name.get(name.lower(), ())
    if not theirs or name == b"X-Request-Id":
        return value
    return b", ".join([*theirs, value]) if name in {b"X-Forwarded-For", b"Forwarded"} else theirs[0]
