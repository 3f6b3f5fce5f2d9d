"""Both ends of a tunnel to a ``wss://`` origin, controlled by one test, and certificates that are invalid."""

import contextlib
import hmac
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.harness import (
    TIMEOUT,
    Certificate,
    Request,
    Tunnel,
    client_context,
    handshake_request,
    switching_protocols,
)
from tests.harness import read_request as read_request_of
from tests.promises.both_ends import READ, BothEnds, TlsEnd
from tlstunnel.tls.truncation import is_truncation

DAY = timedelta(days=1)


class Authority:
    """A certificate authority for tests. It signs anything."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        self.folder = folder
        self.file = folder / f"{name.replace(' ', '-')}.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert = self._sign(self._name, self._key.public_key(), timedelta(0) - DAY, DAY, [], ca=True)
        self.file.write_bytes(cert.public_bytes(Encoding.PEM))

    def issue(
        self,
        *names: str,
        begins: timedelta = -DAY,
        ends: timedelta = DAY,
        self_signed: bool = False,
        common: str | None = None,
    ) -> Certificate:
        """A pair for ``names``, valid relative to the current time; ``ca`` is the file that makes it trusted."""
        key = ec.generate_private_key(ec.SECP256R1())
        common = common or (names[0] if names else "no name")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
        cert = self._sign(subject, key.public_key(), begins, ends, names, signer=key if self_signed else None)
        path = self.folder / f"{cert.serial_number:x}.pem"
        secret = self.folder / f"{cert.serial_number:x}-key.pem"
        path.write_bytes(cert.public_bytes(Encoding.PEM))
        secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return Certificate(path if self_signed else self.file, path, secret)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        begins: timedelta,
        ends: timedelta,
        names: Sequence[str],
        *,
        ca: bool = False,
        signer: ec.EllipticCurvePrivateKey | None = None,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if signer else self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_general, names))), critical=False)
        return builder.sign(signer or self._key, hashes.SHA256())


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def server_context(pair: Certificate) -> ssl.SSLContext:
    """An origin's context; narrow it further as the test needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.load_cert_chain(pair.cert, pair.key)
    return context


def site(certificate: Certificate, origin: str, settings: str = "", head: str = "") -> str:
    """Return a configuration with one site. ``settings`` are keys of the site, ``head`` comes before it."""
    return (
        f'listen = ["127.0.0.1:0"]\n{head}\n[[sites]]\ncert = "{certificate.cert}"\nkey = "{certificate.key}"\n'
        f'origins = ["{origin}"]\n{settings}\n'
    )


class OriginEnd(TlsEnd):
    """The server's end of a TLS connection, the counterpart of `TlsEnd`."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self._lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._ended = False
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                sock.sendall(self._outgoing.read())
                some = sock.recv(READ)
                if not some:
                    raise ssl.SSLEOFError(0, "ended within the TLS handshake") from None
                self._incoming.write(some)
            except ssl.SSLError:
                sock.sendall(self._outgoing.read())
                raise
        sock.sendall(self._outgoing.read())

    @property
    def resumed(self) -> bool:
        """Whether the TLS handshake resumed an earlier session."""
        return bool(self._tls.session_reused)

    @property
    def peer(self) -> str:
        """The common name in the certificate that the tunnel presented; "" if it presented none."""
        der = self._tls.getpeercert(binary_form=True)
        if not der:
            return ""
        common = x509.load_der_x509_certificate(der).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(common[0].value)

    def receive(self) -> bytes:
        """As `TlsEnd.receive`; the client's first bytes may have arrived with the end of its TLS handshake."""
        with self._lock:
            data = self._decrypt()
        return data or super().receive()

    def recv(self, _: int) -> bytes:
        """As the method of a socket, for functions that read heads."""
        return self.receive()

    def read_request(self) -> Request:
        """Read the head of one request."""
        return read_request_of(cast(socket.socket, self))  # it only needs recv


class SecurePair(NamedTuple):
    """The two ends of a tunnel, after its 101."""

    client: TlsEnd
    origin: OriginEnd


class SecureEnds(BothEnds):
    """As `BothEnds`, but the origin also uses TLS, with the certificate ``origin`` (None: the tunnel's own)."""

    def __init__(
        self,
        certificate: Certificate,
        *,
        origin: Certificate | None = None,
        settings: str = "",
        head: str = "",
        measured: bool = False,
    ) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.settimeout(TIMEOUT)
        self.origin_context = server_context(origin or certificate)
        address = f"wss://localhost:{self._listener.getsockname()[1]}"
        text = site(certificate, address, settings or f'origin_ca = "{certificate.ca}"', head)
        self.tunnel = Tunnel(certificate=certificate, config=text, measured=measured)
        self._sockets = []

    def open_secure(
        self, *, context: ssl.SSLContext | None = None, buffers: int | None = None, tls_1_2: bool = False
    ) -> SecurePair:
        """Open a tunnel; ``tls_1_2`` applies to TLS with the origin, ``context`` is the client's."""
        context = context or self.context
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        client = self.connect(context=context, buffers=buffers)
        client.path = f"/{len(self._sockets)}"
        client.send(handshake_request(client.path))
        sock = self.accept(buffers=buffers)
        self.origin_context.maximum_version = ssl.TLSVersion.TLSv1_2 if tls_1_2 else ssl.TLSVersion.TLSv1_3
        origin = OriginEnd(sock, self.origin_context)
        origin.send(switching_protocols(origin.read_request()))
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            some = client.receive()
            assert some, f"the connection ended after {answer!r}"
            answer += some
        assert answer.startswith(b"HTTP/1.1 101 ")
        return SecurePair(client, origin)


def truncated(receive: Callable[[], bytes]) -> None:
    """Check that a FIN without ``close_notify`` comes next."""
    with pytest.raises(ssl.SSLError) as caught:
        receive()
    assert is_truncation(caught.value)


class Sealing:
    """Seals TLS 1.3 records as ``end`` would, to send what OpenSSL never sends; ``end`` can only receive afterwards.

    ``secret`` is the traffic secret of its side, ``sent`` the number of records already sent with it.
    """

    def __init__(self, cipher: str, secret: bytes, sent: int) -> None:
        self._hash = hashes.SHA384() if cipher.endswith("SHA384") else hashes.SHA256()
        self._key_size = 16 if "AES_128" in cipher else 32
        self._chacha = "CHACHA20" in cipher
        self._secret, self._number = secret, sent
        self._derive_key()

    def record(self, content: bytes, kind: int, padding: int = 0) -> bytes:
        """Return a record with ``content`` and ``padding`` zeros behind it (RFC 8446 5.2).

        ``kind`` is 22 for a TLS handshake message, 23 for data.
        """
        inner = content + bytes([kind]) + bytes(padding)
        head = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2)
        nonce = (self._vector ^ self._number).to_bytes(12)
        self._number += 1
        return head + self._aead.encrypt(nonce, inner, head)

    def next_secret(self) -> None:
        """Use the key that follows a KeyUpdate (section 7.2)."""
        self._secret, self._number = self._expand(b"traffic upd", self._hash.digest_size), 0
        self._derive_key()

    def _derive_key(self) -> None:
        key = self._expand(b"key", self._key_size)
        self._vector = int.from_bytes(self._expand(b"iv", 12))
        self._aead: AESGCM | ChaCha20Poly1305 = ChaCha20Poly1305(key) if self._chacha else AESGCM(key)

    def _expand(self, label: bytes, size: int) -> bytes:
        label = b"tls13 " + label
        info = size.to_bytes(2) + bytes([len(label)]) + label + b"\0"
        return HKDFExpand(self._hash, size, info).derive(self._secret)


class OldSealing:
    """As `Sealing`, for TLS 1.2 with AES-128-GCM and SHA-256.

    ``master_secret`` and ``client_random`` are in the key log, ``server_random`` is in the ServerHello. ``sent`` is the
    number of records already sent with the key; the Finished is one.
    """

    def __init__(
        self, master_secret: bytes, client_random: bytes, server_random: bytes, *, server: bool, sent: int
    ) -> None:
        # RFC 5246 section 6.3: both sides' keys, then both sides' implicit parts of the nonce (RFC 5288 section 3).
        block = _expand_1_2(master_secret, b"key expansion" + server_random + client_random, 2 * 16 + 2 * 4)
        self._aead = AESGCM(block[16 * server :][:16])
        self._salt = block[32 + 4 * server :][:4]
        self._number = sent

    def record(self, content: bytes, kind: int) -> bytes:
        """Return a record with ``content`` (RFC 5246 section 6.2.3.3)."""
        number = self._number.to_bytes(8)
        self._number += 1
        kind_and_version = bytes([kind]) + b"\x03\x03"
        sealed = self._aead.encrypt(self._salt + number, content, number + kind_and_version + len(content).to_bytes(2))
        return kind_and_version + (8 + len(sealed)).to_bytes(2) + number + sealed


def _expand_1_2(secret: bytes, seed: bytes, size: int) -> bytes:
    """Return P_SHA256 of RFC 5246 section 5, which with label and seed is the PRF."""
    chained, expanded = seed, b""
    while len(expanded) < size:
        chained = hmac.digest(secret, chained, "sha256")
        expanded += hmac.digest(secret, chained + seed, "sha256")
    return expanded[:size]


def refused(tunnel: Tunnel) -> bytes:
    """Return the response that a client gets."""
    with socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT) as sock:
        client = TlsEnd(sock, client_context(tunnel))
        client.send(handshake_request())
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while some := client.receive():
                answer += some
        return answer
