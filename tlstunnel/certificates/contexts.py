"""The TLS context that a site is served with, made of what is in memory."""

import os
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tlstunnel.certificates import describe
from tlstunnel.certificates.clients import ClientPolicy
from tlstunnel.certificates.pairs import Pair, PairFiles, find_validity_warning, read_pair
from tlstunnel.errors import CertificateError
from tlstunnel.tls.policy import apply_to_server_context


class ServerContext(ssl.SSLContext):
    """A context that knows until when it may be used for new TLS handshakes, by the clock of who made it."""

    until: float = 0.0


def make_server_context(cert: Path, key: Path) -> ServerContext:
    """Make the context that serves ``cert`` (PEM: the leaf, then its chain) with ``key``.

    Raises CertificateError as ``read_pair`` and ``make_context`` do.
    """
    return make_context((read_pair(PairFiles(cert, key)),))


def make_context(pairs: Sequence[Pair], clients: ClientPolicy | None = None) -> ServerContext:
    """Make a context of ``pairs``, one of each kind of key (OpenSSL chooses by what the client takes). About 1 ms.

    TLS 1.2 and 1.3, no renegotiation, no compression, one session ticket, ALPN ``http/1.1``. ``clients`` is what is
    asked of clients. The keys of its tickets are its own, so nothing resumes that another context began: that is what
    keeps a session of a site without client certificates, or with others, away from this one.
    Raises CertificateError, naming the file and the reason, when OpenSSL does not take it.
    """
    # Not create_default_context: that one writes every session's keys to the file that SSLKEYLOGFILE names.
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


def find_expiry_warning(cert: Path, now: datetime) -> str | None:
    """Say that the leaf in ``cert`` is expired, not valid yet, or has fewer than 21 days left; None when all is well.

    ``now`` is an aware datetime. Raises CertificateError when the file cannot be read.
    """
    leaf = describe.read_certificates(cert)[0]
    return find_validity_warning(cert, leaf.not_valid_before_utc, leaf.not_valid_after_utc, now)


def _verify_clients(context: ssl.SSLContext, clients: ClientPolicy) -> None:
    context.verify_mode = ssl.CERT_REQUIRED if clients.files.required else ssl.CERT_OPTIONAL
    # Whoever names an authority trusts it, also one that is not self-signed and whose root is not there.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata=clients.ca)
    except ssl.SSLError as error:
        raise _convert_error(clients.files.ca, error) from error
    if clients.files.crl is None:
        return
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN if clients.whole_chain else ssl.VERIFY_CRL_CHECK_LEAF
    try:
        with _memory_file(clients.crl) as path:  # cadata takes certificates only
            context.load_verify_locations(cafile=path)
    except OSError as error:
        raise _convert_error(clients.files.crl, error) from error


def _convert_error(path: Path, error: OSError) -> CertificateError:
    """Say what OpenSSL did not take: it names no file and little else."""
    if isinstance(error, ssl.SSLError):
        return CertificateError(f"{path}: the TLS library refuses it: {error.reason or error}")
    if isinstance(error, FileNotFoundError):
        return CertificateError(f"{path}: cannot be given to the TLS library: /proc is not mounted")
    return CertificateError(f"{path}: cannot be given to the TLS library: {error.strerror or error}")


@contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    """Give a path at which OpenSSL finds ``data``: it reads keys and CRLs from files only, and a key is not for disks.

    A file that exists in memory alone (memfd_create(2)), found through this process's own /proc.
    """
    with os.fdopen(os.memfd_create("tlstunnel", os.MFD_CLOEXEC), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
