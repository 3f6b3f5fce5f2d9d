"""Certificates for tests, and minimal TLS servers and clients."""

import contextlib
import re
import socket
import ssl
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
PREFERRED_GROUP = "X25519MLKEM768" if ssl.OPENSSL_VERSION_INFO >= (3, 5) else "X25519"
"""What this OpenSSL negotiates with itself, by its own list of groups."""

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key, encryption: KeySerializationEncryption | None = None) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def cert_pem(*certs: x509.Certificate) -> bytes:
    return b"".join(cert.public_bytes(Encoding.PEM) for cert in certs)


def subject_name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


class Authority:
    """A certificate authority, self-signed or signed by `issuer`."""

    def __init__(
        self, name: str = "Test CA", issuer: "Authority | None" = None, end: datetime = NOW + 90 * DAY
    ) -> None:
        self.key = new_key()
        self.name = subject_name(name)
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(issuer.name if issuer else self.name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(NOW, end) - DAY)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
        )
        self.cert = builder.sign(issuer.key if issuer else self.key, hashes.SHA256())

    def sign(
        self,
        key: Key,
        name: x509.Name | str = "localhost",
        names: Sequence[x509.GeneralName] = (x509.DNSName("localhost"),),
        start: datetime = NOW - DAY,
        end: datetime = NOW + 90 * DAY,
        *,
        usage: x509.ObjectIdentifier | None = None,
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject_name(name) if isinstance(name, str) else name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def pair(
        self,
        folder: Path,
        stem: str,
        name: x509.Name | str = "localhost",
        *,
        names: Sequence[x509.GeneralName] = (x509.DNSName("localhost"),),
        start: datetime = NOW - DAY,
        end: datetime = NOW + 90 * DAY,
        key: Key | None = None,
    ) -> tuple[Path, Path]:
        """Write a certificate and its key, STEM.pem and STEM-key.pem."""
        key = key or new_key()
        cert, key_file = folder / f"{stem}.pem", folder / f"{stem}-key.pem"
        cert.write_bytes(cert_pem(self.sign(key, name, names, start, end)))
        key_file.write_bytes(key_pem(key))
        return cert, key_file

    def revoke(
        self, *revoked: x509.Certificate, end: datetime = NOW + DAY, key: Key | None = None, unusual: bool = False
    ) -> x509.CertificateRevocationList:
        """Return a revocation list, with `unusual` one that has an unknown extension, which has no effect."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.name)
        builder = builder.last_update(min(NOW, end) - DAY).next_update(end)
        for cert in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(cert.serial_number).revocation_date(NOW - DAY)
            builder = builder.add_revoked_certificate(entry.build())
        if unusual:
            extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(key or self.key, hashes.SHA256())


def client_context(
    ca: Path,
    version: ssl.TLSVersion | None = None,
    ciphers: str | None = None,
    pair: tuple[Path, Path] | None = None,
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    if ciphers is not None:
        context.set_ciphers(ciphers)
    if version is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # for TLS 1.1
            context.minimum_version = context.maximum_version = version
    if pair is not None:
        context.load_cert_chain(*pair)
    return context


@contextmanager
def tls_server(*contexts: ssl.SSLContext) -> Iterator[tuple[str, int]]:
    """Serve one connection after another: send hello, then echo. Yield the address.

    Each connection uses the next of `contexts`; when they run out, the last one.
    """
    left = list(contexts)

    def one(accepted: socket.socket) -> None:
        accepted.settimeout(10)
        context = left.pop(0) if len(left) > 1 else left[0]
        with context.wrap_socket(accepted, server_side=True) as connection:
            connection.sendall(b"hello\n")
            while data := connection.recv(4096):
                connection.sendall(data)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return
            with accepted:
                try:
                    one(accepted)
                except OSError:
                    continue  # the client's side of the test says what went wrong

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(20)
        assert not thread.is_alive()


@contextmanager
def tls_client(
    address: tuple[str, int], context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> Iterator[ssl.SSLSocket]:
    with (
        socket.create_connection(address, 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost", session=session) as client,
    ):
        assert client.recv(6) == b"hello\n"  # by now a TLS 1.3 client has read its ticket
        yield client


def s_client(address: tuple[str, int], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["openssl", "s_client", "-connect", f"{address[0]}:{address[1]}", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Return the process's output up to the first line that matches `pattern`; all of it if none does."""
    assert process.stdout is not None
    read: list[str] = []
    for line in process.stdout:
        read.append(line)
        if re.search(pattern, line):
            break
    return "".join(read)


@contextmanager
def typing(process: subprocess.Popen[str]) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes a line to `process`, which is killed at the end or after 20 s.

    A process that has exited takes no line: its output says why.
    """
    alarm = threading.Timer(20, process.kill)
    alarm.start()

    def type_line(line: str) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()

    try:
        yield type_line
    finally:
        alarm.cancel()
        process.kill()
        with contextlib.suppress(BrokenPipeError):  # of the line that was not taken
            process.communicate()
