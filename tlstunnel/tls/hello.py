"""The hello stage: what a client says before any key exists, read from bytes that stay in the socket.

`read_client_hello` gets the whole peeked prefix each time. Its answer depends on these bytes alone: for any prefix it
is None or the final outcome, and more bytes never change an outcome. No I/O happens here.

Sources: RFC 8446 sections 4.1.2 (ClientHello), 4.2 (extensions), 5.1 (records) and 6 (alerts); RFC 6066 section 3
(server_name); RFC 7301 (ALPN). `ja4` has the fingerprint.
"""

import re
import struct
from dataclasses import dataclass
from functools import lru_cache

from tlstunnel.tls.ja4 import compute_ja4, list_codes

# Bytes, record headers included. Hellos with post-quantum key shares take 1.5 to 2 KiB. BoringSSL allows 16 384, Go
# 65 536, OpenSSL 131 396: the longest that the RFC's fields can make.
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

# RFC 8446 section 4.2.7: secp256r1, secp384r1, secp521r1, x25519, x448. Every OpenSSL has them and prefers each to a
# finite field. The hybrids of a curve and ML-KEM (11eb, 11ec, 11ed) do not count: OpenSSL before 3.5 lacks them, and
# takes the finite field of a client that offers nothing else.
_CURVES = frozenset(("0017", "0018", "0019", "001d", "001e"))
_FINITE_FIELDS = "01"  # the first byte of their numbers: ffdhe2048 to ffdhe8192, and those reserved for others

_KIND_AND_LENGTH = struct.Struct(">2sH").unpack_from

# The methods of browsers and health checks have at most 7 letters (OPTIONS, CONNECT), those of WebDAV a few more; 15
# with the space make 16 bytes, after which whatever still spells letters is none.
_HTTP_REQUEST = re.compile(rb"[A-Z]{1,15} ")
_MAYBE_HTTP_REQUEST = re.compile(rb"[A-Z]{0,15}")
# Visible ASCII: names are compared and logged as text, so what is no text at all goes no further.
_NAME = re.compile(rb"[!-~]{1,255}")


class HelloError(Exception):
    """The first bytes of a connection are not a ClientHello that can be served."""


class PlainHTTP(HelloError):
    """The first bytes are an HTTP request without TLS."""


class NotTLS(HelloError):
    """The first bytes are neither TLS nor HTTP: there is nobody to answer. SSL 2.0's hello is one of these."""


class BadHello(HelloError):
    """TLS, but not a ClientHello within the rules.

    Attributes:
        alert: the description to send with `alert`, RFC 8446 section 6.
        reason: what was wrong, for the log. It holds no byte of the client's.

    """

    def __init__(self, alert: int, reason: str) -> None:
        super().__init__(reason)
        self.alert = alert
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client asks for before any key exists. Nothing in it is proven.

    Attributes:
        server_name: the SNI host name (RFC 6066 section 3), visible ASCII in lower case without the trailing dot;
            None when the extension is absent. An address literal, which the RFC forbids, stands here as it was sent.
        alpn: the protocols offered, in order (RFC 7301); empty when the extension is absent.
        versions: the values of supported_versions in order without GREASE, else the legacy version alone, which then
            is the highest that the client speaks (RFC 8446 section 4.2.1).
        ja4: FoxIO's fingerprint of the client's TLS library and its settings, 36 ASCII characters.
        finite_field: it makes a key exchange over a finite field possible (RFC 7919), by a key share of one, or as it
            supports such groups and no curve that OpenSSL would rather ask for.

    """

    server_name: str | None
    alpn: tuple[bytes, ...]
    versions: tuple[int, ...]
    ja4: str
    finite_field: bool = False


def read_client_hello(data: bytes) -> ClientHello | None:
    """Return the ClientHello that `data` begins with, or None when more bytes are needed.

    What follows the hello is not looked at. Takes about 20 us for a browser's hello; while the hello is not whole,
    only the headers of its records are read.

    Raises:
        PlainHTTP: an HTTP request without TLS; decided within 16 bytes.
        NotTLS: something else; decided within 16 bytes.
        BadHello: malformed, or longer than MAX_HELLO.

    """
    message = _read_message(data)
    return None if isinstance(message, int) else _parse_hello(message)


def bytes_needed(data: bytes) -> int:
    """Return the length that `data` must at least grow to before it can hold a whole ClientHello.

    Reading again before that can only give None or BadHello. A caller that skips reading until then (it never asks for
    more than MAX_HELLO) reads a hello trickled in records of one byte each some forty times instead of thousands, at up
    to 1 ms each.

    Raises:
        HelloError: as `read_client_hello`, as far as the records and the message's header tell.

    """
    message = _read_message(data)
    return message if isinstance(message, int) else len(data)


def alert(description: int) -> bytes:
    """Return the record of a fatal alert (RFC 8446 section 6), to be sent before any key exists.

    Its version is TLS 1.2's: section 5.1 fixes it for every record but a first ClientHello, and older clients, which
    have agreed on no version yet, look at the major number only.
    """
    return bytes((_ALERT, 3, 3, 0, 2, _FATAL, description))


def _read_message(data: bytes) -> bytes | int:
    """Return the ClientHello without its header, joined from its records, or `bytes_needed`.

    Each check needs only bytes up to where it stands, and all happen in the order of the bytes: that is what makes the
    outcome independent of how they arrived.
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
            # RFC 8446 section 5.1: the keys may change after it, so a ClientHello ends with its record.
            raise BadHello(UNEXPECTED_MESSAGE, "bytes after the ClientHello in its last record")
        needed = end if joined == size else end + _RECORD_HEADER + size - joined
        if needed > MAX_HELLO:
            # The alert that OpenSSL and BoringSSL send for an excessive message size.
            raise BadHello(ILLEGAL_PARAMETER, f"the ClientHello takes more than {MAX_HELLO} bytes")
        if len(data) < end:
            return needed
        if joined == size:
            return bytes(message[_MESSAGE_HEADER:])


def _starts_tls(data: bytes) -> bool:
    """Return whether the bytes begin a TLS handshake record; False while they may still be the method of a request.

    Raises PlainHTTP or NotTLS as soon as they cannot.
    """
    if data[:1] == b"\x16":
        # RFC 8446 section 5.1 has the version ignored, and so is the minor number; another major is another protocol.
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
    """Return the length of the handshake message, its header included (RFC 8446 section 4)."""
    if message[0] != _CLIENT_HELLO:
        raise BadHello(UNEXPECTED_MESSAGE, "the first handshake message is not a ClientHello")
    return _MESSAGE_HEADER + int.from_bytes(message[1:_MESSAGE_HEADER])


def _parse_hello(message: bytes) -> ClientHello:
    """Return the ClientHello (RFC 8446 section 4.1.2; TLS 1.2 and before differ in meaning, not in form)."""
    session_id, at = _read_vector(message, 2 + 32, 1)
    ciphers, at = _read_vector(message, at, 2)
    compressions, at = _read_vector(message, at, 1)
    if len(session_id) > 32 or not ciphers or len(ciphers) % 2 or not compressions:
        raise BadHello(DECODE_ERROR, "session id, cipher suites or compression methods of a length they cannot have")
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
    """Return ALPN, versions, JA4 and whether the groups hold finite fields and no curve, from the vectors as they came.

    It is what all clients of one program have in common.
    """
    alpn = () if protocols is None else _read_protocols(protocols)
    versions = tuple(int(code, 16) for code in list_codes(legacy if supported is None else _read_numbers(supported, 1)))
    algorithms = b"" if signatures is None else _read_numbers(signatures, 2)
    offered = [] if groups is None else list_codes(_read_numbers(groups, 2))
    finite = any(code.startswith(_FINITE_FIELDS) for code in offered) and _CURVES.isdisjoint(offered)
    return alpn, versions, compute_ja4(max(versions, default=0), ciphers, kinds, alpn, algorithms), finite


# Most clients of a site are of a few programs, each saying the same again but for random bytes. Bounded: 1 MiB.
_MAX_CACHED = 2_048
_parse_common_cached = lru_cache(512)(_parse_common)


def _has_finite_field_share(data: bytes) -> bool:
    """Return whether key_share (RFC 8446 section 4.2.8) has a share of a finite field, the first or another.

    Which of several shares OpenSSL takes differs between its releases.
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
    """Return the vector at `at`, which begins with its length in `width` bytes, and where it ends."""
    start = at + width
    end = start + int.from_bytes(data[at:start])
    if end > len(data):
        raise BadHello(DECODE_ERROR, "a length that points past its end")
    return data[start:end], end


def _read_single_vector(data: bytes, width: int) -> bytes:
    """Return the vector that is all of `data`; none of those that we read may be empty."""
    vector, end = _read_vector(data, 0, width)
    if end != len(data) or not vector:
        raise BadHello(DECODE_ERROR, "a list that is empty or does not fill its extension")
    return vector


def _read_numbers(data: bytes, width: int) -> bytes:
    """Return the vector of two-byte numbers that is all of `data`."""
    numbers = _read_single_vector(data, width)
    if len(numbers) % 2:
        raise BadHello(DECODE_ERROR, "a list of two-byte numbers of odd length")
    return numbers


def _read_extensions(data: bytes) -> dict[bytes, bytes]:
    """Return the extensions by their type (RFC 8446 section 4.2); clients before TLS 1.2 may send no such block."""
    extensions: dict[bytes, bytes] = {}
    if not data:
        return extensions
    block, end = _read_vector(data, 0, 2)
    if end != len(data):
        raise BadHello(DECODE_ERROR, "bytes after the extensions")
    end = count = 0
    size = len(block)
    try:
        # As in _read_vector, without a call for each of them.
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
        # host_name is the only type there is, and a type occurs once.
        raise BadHello(ILLEGAL_PARAMETER, "a server_name that is not one host name")
    if not _NAME.fullmatch(name):
        raise BadHello(ILLEGAL_PARAMETER, "a host name that is empty, over 255 bytes or not visible ASCII")
    text = name.decode("ascii").lower().removesuffix(".")
    if not text:
        raise BadHello(ILLEGAL_PARAMETER, "a host name that is only a dot")
    return text


def _read_protocols(data: bytes) -> tuple[bytes, ...]:
    """Return the protocol names of ALPN in order (RFC 7301 section 3.1)."""
    names = _read_single_vector(data, 2)
    protocols = []
    at = 0
    while at < len(names):
        protocol, at = _read_vector(names, at, 1)
        if not protocol:
            raise BadHello(DECODE_ERROR, "an empty ALPN protocol name")
        protocols.append(protocol)
    return tuple(protocols)
