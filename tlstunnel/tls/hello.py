"""Parse the ClientHello, which OpenSSL gets afterwards. Sans-IO.

`read_client_hello` gets all the received bytes each time. The result depends only on these bytes: for any prefix it is
None or the final result, which more bytes never change.

Sources: RFC 8446 sections 4.1.2 (ClientHello), 4.2 (extensions), 5.1 (records) and 6 (alerts); RFC 6066 section 3
(server_name); RFC 7301 (ALPN). The fingerprint is in `ja4`.
"""

import re
import struct
from dataclasses import dataclass
from functools import lru_cache

from tlstunnel.tls.ja4 import compute_ja4, list_codes

# In bytes, including record headers. Hellos with post-quantum key shares have 1.5 to 2 KiB. BoringSSL allows 16 384, Go
# 65 536, OpenSSL 131 396, the longest that the RFC's fields allow.
MAX_HELLO = 16_384

# Alerts, RFC 8446 section 6.
UNEXPECTED_MESSAGE = 10
RECORD_OVERFLOW = 22
HANDSHAKE_FAILURE = 40
ILLEGAL_PARAMETER = 47
DECODE_ERROR = 50
PROTOCOL_VERSION = 70
UNRECOGNIZED_NAME = 112
NO_APPLICATION_PROTOCOL = 120

_HANDSHAKE = 22
_ALERT = 21
_FATAL = 2
_CLIENT_HELLO = 1
_RECORD_HEADER = 5
_MESSAGE_HEADER = 4
_MAX_FRAGMENT = 2**14

_SERVER_NAME = b"\x00\x00"
_SUPPORTED_GROUPS = b"\x00\x0a"
_SIGNATURE_ALGORITHMS = b"\x00\x0d"
_ALPN = b"\x00\x10"
_SUPPORTED_VERSIONS = b"\x00\x2b"
_KEY_SHARE = b"\x00\x33"

# RFC 8446 section 4.2.7: secp256r1, secp384r1, secp521r1, x25519, x448. All versions of OpenSSL have them and prefer
# each to a finite field. The hybrids of a curve and ML-KEM (11eb, 11ec, 11ed) are not included: OpenSSL before 3.5 does
# not have them, and uses the finite field of a client that offers nothing else.
_CURVES = frozenset(("0017", "0018", "0019", "001d", "001e"))
_FINITE_FIELDS = "01"  # the first byte of their numbers: ffdhe2048 to ffdhe8192, and reserved ones

_KIND_AND_LENGTH = struct.Struct(">2sH").unpack_from

# The methods of browsers and health checks have at most 7 letters (OPTIONS, CONNECT), those of WebDAV a few more. With
# at most 15 letters and the space, 16 bytes are enough to decide.
_HTTP_REQUEST = re.compile(rb"[A-Z]{1,15} ")
_MAYBE_HTTP_REQUEST = re.compile(rb"[A-Z]{0,15}")
# Visible ASCII: names are compared and logged as text.
_NAME = re.compile(rb"[!-~]{1,255}")


class HelloError(Exception):
    """The first bytes of a connection are not a ClientHello that can be served."""


class PlainHTTP(HelloError):
    """The first bytes are an HTTP request without TLS."""


class NotTLS(HelloError):
    """The first bytes are neither TLS nor HTTP, so no response would be understood. Includes SSL 2.0's hello."""


class BadHello(HelloError):
    """TLS, but not a valid ClientHello.

    Attributes:
        alert: the description to send with `alert`, RFC 8446 section 6.
        reason: what was wrong, for the log. It contains nothing that the client sent.

    """

    def __init__(self, alert: int, reason: str) -> None:
        super().__init__(reason)
        self.alert = alert
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client offers and requests before any key exists. Nothing in it is authenticated.

    Attributes:
        server_name: the SNI host name (RFC 6066 section 3), visible ASCII in lower case without the trailing dot;
            None if the extension is absent. An address literal, which the RFC forbids, is kept as it was sent.
        alpn: the offered protocols in order (RFC 7301); empty if the extension is absent.
        versions: the values of supported_versions in order, without GREASE. Without that extension, only the legacy
            version, which is then the highest that the client supports (RFC 8446 section 4.2.1).
        ja4: FoxIO's fingerprint of the client's TLS library and its settings, 36 ASCII characters.
        finite_field: whether it allows a key exchange over a finite field (RFC 7919): it has a key share of one, or it
            supports such groups and no curve that OpenSSL prefers to them.

    """

    server_name: str | None
    alpn: tuple[bytes, ...]
    versions: tuple[int, ...]
    ja4: str
    finite_field: bool = False


def read_client_hello(data: bytes) -> ClientHello | None:
    """Return the ClientHello at the beginning of `data`, or None if more bytes are needed.

    Ignores what follows the hello. It takes about 20 us for a browser's hello. While the hello is incomplete, only the
    headers of its records are read.

    Raises:
        PlainHTTP: an HTTP request without TLS; decided within 16 bytes.
        NotTLS: something else; decided within 16 bytes.
        BadHello: malformed, or longer than MAX_HELLO.

    """
    message = _read_message(data)
    return None if isinstance(message, int) else _parse_hello(message)


def bytes_needed(data: bytes) -> int:
    """Return the minimum length of `data` that can contain a complete ClientHello, at most MAX_HELLO.

    With fewer bytes, `read_client_hello` can only return None or raise BadHello. If the caller waits for that many, a
    hello in records of one byte each is read some forty times instead of thousands of times, at up to 1 ms each.

    Raises:
        HelloError: as `read_client_hello`, if the records or the message's header show it.

    """
    message = _read_message(data)
    return message if isinstance(message, int) else len(data)


def alert(description: int) -> bytes:
    """Return the record of a fatal alert (RFC 8446 section 6), to send before any key exists.

    Its version is that of TLS 1.2, which section 5.1 requires for every record except a first ClientHello. Older
    clients check only the major number before a version has been negotiated.
    """
    return bytes((_ALERT, 3, 3, 0, 2, _FATAL, description))


def _read_message(data: bytes) -> bytes | int:
    """Return the ClientHello without its header, joined from its records, or `bytes_needed`.

    Each check needs only the bytes before it, and the checks are made in the order of the bytes. Therefore the result
    does not depend on how the bytes arrived.
    """
    if not _starts_tls(data):
        return len(data) + 1
    message = bytearray()
    size = end = 0
    while True:
        start = end + _RECORD_HEADER
        if len(data) < start:
            return start + (size or _MESSAGE_HEADER) - len(message)
        length = _read_fragment_length(data[end:start])
        end = start + length
        joined = len(message) + length
        message += data[start:end]
        if not size:
            if len(message) < _MESSAGE_HEADER:
                if len(data) < end:
                    return start + _MESSAGE_HEADER - (joined - length)
                continue
            size = _read_message_size(message)
        if joined > size:
            # RFC 8446 section 5.1: a ClientHello must end with its record, since the keys may change after it.
            raise BadHello(UNEXPECTED_MESSAGE, "bytes after the ClientHello in its last record")
        needed = end if joined == size else end + _RECORD_HEADER + size - joined
        if needed > MAX_HELLO:
            # The alert that OpenSSL and BoringSSL send for an excessive message size.
            raise BadHello(ILLEGAL_PARAMETER, f"the ClientHello has more than {MAX_HELLO} bytes")
        if len(data) < end:
            return needed
        if joined == size:
            return bytes(message[_MESSAGE_HEADER:])


def _starts_tls(data: bytes) -> bool:
    """Return whether `data` begins with a TLS handshake record; False while it may still be an HTTP method.

    Raises PlainHTTP or NotTLS once it is neither.
    """
    if data[:1] == b"\x16":
        # RFC 8446 section 5.1 says to ignore the version. Another major number would be another protocol.
        if data[1:2] not in {b"", b"\x03"}:
            raise NotTLS("not a TLS record")
        return True
    if _HTTP_REQUEST.match(data):
        raise PlainHTTP("an HTTP request without TLS")
    if not _MAYBE_HTTP_REQUEST.fullmatch(data):
        raise NotTLS("neither TLS nor HTTP")
    return False


def _read_fragment_length(header: bytes) -> int:
    """Return the length of the handshake record that begins with `header` (RFC 8446 section 5.1)."""
    if header[0] != _HANDSHAKE:
        raise BadHello(UNEXPECTED_MESSAGE, "a record of another type within the ClientHello")
    length = int.from_bytes(header[3:])
    if not length:
        raise BadHello(UNEXPECTED_MESSAGE, "an empty handshake record")
    if length > _MAX_FRAGMENT:
        raise BadHello(RECORD_OVERFLOW, "a record longer than 16384 bytes")
    return length


def _read_message_size(message: bytearray) -> int:
    """Return the length of the handshake message, including its header (RFC 8446 section 4)."""
    if message[0] != _CLIENT_HELLO:
        raise BadHello(UNEXPECTED_MESSAGE, "the first handshake message is not a ClientHello")
    return _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER])


def _parse_hello(message: bytes) -> ClientHello:
    """Return the ClientHello (RFC 8446 section 4.1.2). That of TLS 1.2 and earlier has the same form."""
    session_id, at = _read_vector(message, 2 + 32, 1)
    ciphers, at = _read_vector(message, at, 2)
    compressions, at = _read_vector(message, at, 1)
    if len(session_id) > 32 or not ciphers or len(ciphers) % 2 or not compressions:
        raise BadHello(DECODE_ERROR, "session id, cipher suites or compression methods of an invalid length")
    extensions = _read_extensions(message[at:])
    server_names = extensions.get(_SERVER_NAME)
    protocols = extensions.get(_ALPN)
    supported = extensions.get(_SUPPORTED_VERSIONS)
    signatures = extensions.get(_SIGNATURE_ALGORITHMS)
    common = _parse_common_cached if len(message) <= _MAX_CACHED else _parse_common
    groups = extensions.get(_SUPPORTED_GROUPS)
    alpn, versions, ja4, finite = common(
        message[:2], ciphers, b"".join(extensions), protocols, supported, signatures, groups
    )
    return ClientHello(
        server_name=None if server_names is None else _read_server_name(server_names),
        alpn=alpn,
        versions=versions,
        ja4=ja4,
        finite_field=finite or (_KEY_SHARE in extensions and _has_finite_field_share(extensions[_KEY_SHARE])),
    )


def _parse_common(  # noqa: PLR0913, PLR0917 - the key of a cache
    legacy: bytes,
    ciphers: bytes,
    kinds: bytes,
    protocols: bytes | None,
    supported: bytes | None,
    signatures: bytes | None,
    groups: bytes | None,
) -> tuple[tuple[bytes, ...], tuple[int, ...], str, bool]:
    """Return ALPN, versions, JA4, and whether the groups include finite fields and no curve, from unparsed vectors.

    All clients that run the same program have these in common.
    """
    alpn = () if protocols is None else _read_protocols(protocols)
    versions = tuple(int(code, 16) for code in list_codes(legacy if supported is None else _read_numbers(supported, 1)))
    algorithms = b"" if signatures is None else _read_numbers(signatures, 2)
    offered = [] if groups is None else list_codes(_read_numbers(groups, 2))
    finite = any(code.startswith(_FINITE_FIELDS) for code in offered) and _CURVES.isdisjoint(offered)
    return alpn, versions, compute_ja4(max(versions, default=0), ciphers, kinds, alpn, algorithms), finite


# Most clients of a site run one of a few programs, whose hellos differ only in random bytes. At most 1 MiB in total.
_MAX_CACHED = 2_048
_parse_common_cached = lru_cache(512)(_parse_common)


def _has_finite_field_share(data: bytes) -> bool:
    """Return whether any share in key_share (RFC 8446 section 4.2.8) is of a finite field.

    Versions of OpenSSL differ in which of several shares they use.
    """
    shares, end = _read_vector(data, 0, 2)
    if end != len(data):
        raise BadHello(DECODE_ERROR, "a list that does not fill its extension")
    found = False
    at = 0
    while at < len(shares):
        found |= shares[at : at + 1].hex() == _FINITE_FIELDS
        _, at = _read_vector(shares, at + 2, 2)
    return found


def _read_vector(data: bytes, at: int, width: int) -> tuple[bytes, int]:
    """Return the vector at `at`, whose length is encoded in `width` bytes, and where it ends."""
    start = at + width
    end = start + int.from_bytes(data[at:start])
    if end > len(data):
        raise BadHello(DECODE_ERROR, "a length that points past its end")
    return data[start:end], end


def _read_single_vector(data: bytes, width: int) -> bytes:
    """Return the vector that fills `data`. It must not be empty."""
    vector, end = _read_vector(data, 0, width)
    if end != len(data) or not vector:
        raise BadHello(DECODE_ERROR, "a list that is empty or does not fill its extension")
    return vector


def _read_numbers(data: bytes, width: int) -> bytes:
    """Return the vector of two-byte numbers that fills `data`."""
    numbers = _read_single_vector(data, width)
    if len(numbers) % 2:
        raise BadHello(DECODE_ERROR, "a list of two-byte numbers with an odd length")
    return numbers


def _read_extensions(data: bytes) -> dict[bytes, bytes]:
    """Return the extensions by type (RFC 8446 section 4.2). Clients before TLS 1.2 may leave out the whole block."""
    extensions: dict[bytes, bytes] = {}
    if not data:
        return extensions
    block, end = _read_vector(data, 0, 2)
    if end != len(data):
        raise BadHello(DECODE_ERROR, "bytes after the extensions")
    end = count = 0
    size = len(block)
    try:
        # As in _read_vector, but without a call for each extension.
        while end < size:
            kind, length = _KIND_AND_LENGTH(block, end)
            start = end + 4
            end = start + length
            extensions[kind] = block[start:end]
            count += 1
    except struct.error:
        end = size + 1
    if end > size:
        raise BadHello(DECODE_ERROR, "a length that points past its end")
    if len(extensions) != count:
        raise BadHello(ILLEGAL_PARAMETER, "an extension that occurs twice")
    return extensions


def _read_server_name(data: bytes) -> str:
    """Return the host name of server_name (RFC 6066 section 3)."""
    names = _read_single_vector(data, 2)
    name, end = _read_vector(names, 1, 2)
    if names[0] != 0 or end != len(names):
        # host_name is the only type, and each type occurs once.
        raise BadHello(ILLEGAL_PARAMETER, "a server_name that is not one host name")
    if not _NAME.fullmatch(name):
        raise BadHello(ILLEGAL_PARAMETER, "a host name that is empty, over 255 bytes or not visible ASCII")
    text = name.decode("ascii").lower().removesuffix(".")
    if not text:
        raise BadHello(ILLEGAL_PARAMETER, "a host name that is only a dot")
    return text


def _read_protocols(data: bytes) -> tuple[bytes, ...]:
    """Return the protocol names in ALPN in order (RFC 7301 section 3.1)."""
    names = _read_single_vector(data, 2)
    protocols = []
    at = 0
    while at < len(names):
        protocol, at = _read_vector(names, at, 1)
        if not protocol:
            raise BadHello(DECODE_ERROR, "an empty ALPN protocol name")
        protocols.append(protocol)
    return tuple(protocols)
