"""The TLS context that a site is served with."""

import ssl
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from tlstunnel.certificates import describe
from tlstunnel.errors import CertificateError

# Forward-secret AEAD only (RFC 9325 section 4.2), OpenSSL's names. The order counts only for a client that leaves the
# choice to us; see the options below. TLS 1.3's suites are all of that kind and cannot be set from Python.
TLS_1_2_CIPHERS = ":".join(
    (
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-RSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
    )
)

# Public certificates live 90 days and less, and are usually renewed when a third is left: by now that has failed.
WARN_DAYS = 21


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Make the context that serves ``cert`` (PEM: the leaf, then its chain) with ``key`` (PEM, not encrypted).

    TLS 1.2 and 1.3, no renegotiation, no compression, one session ticket, ALPN ``http/1.1``. Validity is not checked:
    see ``expiry_warning``.
    Raises CertificateError, naming the file and the reason, when the pair cannot be served.
    """
    # Not create_default_context: that one writes every session's keys to the file that SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_ciphers(TLS_1_2_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # Every suite left is a good one, so the client chooses: it knows whether it has AES in hardware or is faster with
    # ChaCha20. By our order OpenSSL would also give every TLS 1.3 client AES-256, and browsers ask for AES-128 first.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    # Set by Python up to 3.11.2, which is Debian 12's: a FIN without close_notify would read like an end (seen).
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    context.num_tickets = 1
    context.set_alpn_protocols(["http/1.1"])

    def refuse_passphrase() -> NoReturn:
        raise describe.encrypted(key)  # without a callback OpenSSL asks on the terminal

    try:
        context.load_cert_chain(cert, key, password=refuse_passphrase)
    except OSError as error:
        raise _reason(cert, key, error) from error
    return context


def expiry_warning(cert: Path, now: datetime) -> str | None:
    """Say that the leaf in ``cert`` is expired, not valid yet, or has fewer than 21 days left; None when all is well.

    ``now`` is an aware datetime. Raises CertificateError when the file cannot be read.
    """
    leaf = describe.read(cert)[0]
    not_before, not_after = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if now < not_before:
        return f"{cert}: the certificate is not valid before {not_before:%Y-%m-%d %H:%M} UTC: clients will refuse it"
    if now > not_after:
        return f"{cert}: the certificate expired on {not_after:%Y-%m-%d %H:%M} UTC: clients refuse it; renew it"
    days = (not_after - now).days
    if days < WARN_DAYS:
        return f"{cert}: the certificate expires in {days} days, on {not_after:%Y-%m-%d %H:%M} UTC; renew it"
    return None


def _reason(cert: Path, key: Path, error: OSError) -> CertificateError:
    """Find what OpenSSL, which names no file and little else, did not take. ``ssl.SSLError`` is an OSError."""
    try:
        chain, private = describe.read(cert), describe.read_key(key)
    except CertificateError as found:
        return found
    for position, each in enumerate(chain):
        if describe.belongs(private, each):
            if position == 0:
                why = getattr(error, "reason", None) or error
                return CertificateError(f"{cert}: the TLS library refuses it: {why}")
            return CertificateError(f"{cert}: must begin with the certificate of {key}, which is number {position + 1}")
    return CertificateError(f"{key}: the private key does not match the certificate in {cert}")
