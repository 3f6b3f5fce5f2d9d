"""Create the TLS context with which a site is served, from certificates and keys in memory."""

import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from tlstunnel.certificates import describe
from tlstunnel.certificates.clients import ClientPolicy
from tlstunnel.certificates.pairs import Pair
from tlstunnel.errors import CertificateError
from tlstunnel.tls.policy import apply_to_server_context


class ServerContext(ssl.SSLContext):
    """A context that may be used for new TLS handshakes ``until`` a time of its creator's clock."""

    until: float = 0.0


def make_context(pairs: Sequence[Pair], clients: ClientPolicy | None = None) -> ServerContext:
    """Create a context with ``pairs``, one for each type of key; OpenSSL chooses one that the client supports.

    TLS 1.2 and 1.3, no renegotiation, no compression, one session ticket, ALPN ``http/1.1``. ``clients`` is what the
    site requires of clients. Each context has ticket keys of its own, so a session can only be resumed in the context
    in which it began. A session of a site with another client policy is therefore never accepted here.

    Takes about 1 ms. Raises CertificateError with the file and the reason if OpenSSL refuses something.
    """
    # Not create_default_context, which writes the keys of all sessions to the file in SSLKEYLOGFILE.
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    apply_to_server_context(context)
    for pair in pairs:
        try:
            with _memory_file(pair.pem) as path:
                context.load_cert_chain(path)
        except OSError as error:  # ssl.SSLError among them
            raise _convert_error(pair.cert, error) from error
    if clients is not None:
        _verify_clients(context, clients)
    return context


def load_client_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Let a client's ``context`` present ``cert`` (PEM: the leaf, then its chain) with ``key``, which is not encrypted.

    Raises CertificateError with the file and the reason.
    """
    leaf, private = describe.read_certificates(cert)[0], describe.read_key(key)
    if not describe.matches(private, leaf):
        raise CertificateError(f"{key}: the private key does not match the first certificate in {cert}")

    def refuse_passphrase() -> NoReturn:
        # `read_key` needed no passphrase. Without a callback, OpenSSL would ask on the terminal.
        raise CertificateError(f"{key}: the private key is encrypted; `openssl pkey -in {key}` decrypts it")

    try:
        context.load_cert_chain(cert, key, password=refuse_passphrase)
    except OSError as error:
        raise _convert_error(cert, error) from error


def _verify_clients(context: ssl.SSLContext, clients: ClientPolicy) -> None:
    context.verify_mode = ssl.CERT_REQUIRED if clients.files.required else ssl.CERT_OPTIONAL
    # A configured authority is trusted even if it is an intermediate whose root is not in the file.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=clients.ca)
    except ssl.SSLError as error:
        raise _convert_error(clients.files.ca, error) from error
    if clients.files.crl is None or clients.revocations is not None:
        return
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN if clients.whole_chain else ssl.VERIFY_CRL_CHECK_LEAF
    try:
        with _memory_file(clients.crl) as path:  # cadata accepts certificates only
            context.load_verify_locations(cafile=path)
    except OSError as error:
        raise _convert_error(clients.files.crl, error) from error


def _convert_error(path: Path, error: OSError) -> CertificateError:
    """Convert an error of OpenSSL, which names no file and little else."""
    if isinstance(error, ssl.SSLError):
        return CertificateError(f"{path}: OpenSSL refuses it: {error.reason or error}")
    if isinstance(error, FileNotFoundError):
        return CertificateError(f"{path}: cannot be passed to OpenSSL: /proc is not mounted")
    return CertificateError(f"{path}: cannot be passed to OpenSSL: {error.strerror or error}")


@contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    """Provide a path at which OpenSSL can read ``data``: it reads keys and CRLs from files only.

    The file exists in memory only (memfd_create(2)), so that no key is written to a disk; its path is below /proc/self.
    """
    with os.fdopen(os.memfd_create("tlstunnel", os.MFD_CLOEXEC), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
