"""Explanations for people why a step of a check failed. Text from the server is escaped.

Tested by tests/unit/test_check_steps.py.
"""

import errno
import re
import socket
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from wsproto.events import CloseConnection

from tlstunnel.certificates.describe import CertificateDescription
from tlstunnel.check.results import UpgradeResult
from tlstunnel.escaping import printable

# Explanations of alerts (RFC 8446 section 6.2) whose name is not enough.
_ALERT_HINTS: Final = {
    "unrecognized_name": "the server has no site with this name",
    "no_application_protocol": "the server does not offer http/1.1 by ALPN",
    "handshake_failure": "no TLS version, cipher or group in common, or a client certificate is missing",
    "protocol_version": "the server supports neither TLS 1.2 nor TLS 1.3",
    "certificate_required": "the server requires a client certificate; pass --cert and --key",
    "bad_certificate": "the server requires a client certificate; pass --cert and --key",
    "internal_error": "the server failed; see its log",
}
# The same if the check has presented a certificate.
_PRESENTED_HINTS: Final = _ALERT_HINTS | {
    "certificate_required": "the server accepts no certificate of this issuer; see its log",
    "bad_certificate": "the server does not accept the certificate in --cert; see its log",
    "certificate_unknown": "the server does not accept the certificate in --cert; see its log",
    "unsupported_certificate": "the certificate in --cert is not for clients, or is of an unsupported type",
    "unknown_ca": "the server does not trust the issuer of the certificate in --cert",
    "certificate_expired": "the certificate in --cert has expired, or the server's revocation list has",
    "certificate_revoked": "the certificate in --cert has been revoked",
}
# OpenSSL names alerts TLSV1_UNRECOGNIZED_NAME, SSLV3_ALERT_HANDSHAKE_FAILURE, TLSV13_ALERT_CERTIFICATE_REQUIRED.
_ALERT: Final = re.compile(r"(?:SSLV3|TLSV1|TLSV13)_(?:ALERT_)?([A-Z_]+)")
# X509_V_ERR_* of OpenSSL's x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_SELF_SIGNED_LEAF, _SELF_SIGNED_IN_CHAIN = 18, 19
_NO_ISSUER: Final = frozenset({2, 20, 21})
_NAME_MISMATCH: Final = frozenset({62, 64})
CONNECT_ERRORS: Final = {
    errno.ECONNREFUSED: "connection refused; is it running on that port?",
    errno.EHOSTUNREACH: "no route to this address",
    errno.ENETUNREACH: "no route to this network",
}
DNS_ERRORS: Final = {
    socket.EAI_NONAME: "name not found",
    socket.EAI_NODATA: "the name has no addresses",
    socket.EAI_AGAIN: "the name server did not respond",
}


def explain_tls_error(error: ssl.SSLError, captured: bytes = b"", *, presented: bool = False) -> str:
    """Return why TLS failed. `captured` is what the server sent first; `presented` whether it got a certificate."""
    if captured.startswith(b"HTTP/"):
        return "the server speaks plain HTTP on this port, not TLS"
    if captured and captured[0] not in range(20, 25):
        return f"the server does not speak TLS on this port: {describe_beginning(captured)}"
    reason = error.reason or "unknown error"
    alert = _ALERT.fullmatch(reason)
    if alert is None:
        return f"TLS error: {reason.lower().replace('_', ' ')}"
    name = alert[1].lower()
    hint = (_PRESENTED_HINTS if presented else _ALERT_HINTS).get(name)
    return f"TLS alert {name}: {hint}" if hint else f"TLS alert {name}"


def explain_distrust(
    error: ssl.SSLCertVerificationError, chain: Sequence[CertificateDescription], host: str, ca: Path | None
) -> str:
    """Return why the certificates that the server sent are not trusted for `host`. `ca` is the file of --ca."""
    code, now = error.verify_code, datetime.now(UTC)
    words = f"certificate not trusted: {error.verify_message}"
    if code in _NAME_MISMATCH:
        names = ", ".join(chain[0].names) if chain else ""
        words = f"name mismatch: certificate is for {names or 'no name'}, not for {host}"
    elif code == _EXPIRED:
        late = [certificate for certificate in chain if certificate.not_after < now]
        words = "; ".join(
            f"certificate {_get_subject(certificate)} expired {_format_days((now - certificate.not_after).days)} ago"
            for certificate in late
        )
        words = words or "certificate expired"
    elif code == _NOT_YET_VALID:
        words = f"certificate is not valid yet: {_list_not_yet_valid(chain, now)} (is this machine's clock right?)"
    elif code == _SELF_SIGNED_LEAF:
        words = "certificate not trusted: it is self-signed; pass --ca with the certificate itself if you trust it"
    elif code == _SELF_SIGNED_IN_CHAIN:
        words = f"certificate not trusted: self-signed certificate in chain; {_advise_on_ca(chain, ca)}"
    elif code in _NO_ISSUER:
        words = (
            "certificate not trusted: its issuer is unknown, or the server leaves an intermediate certificate out; "
            f"{_advise_on_ca(chain, ca)}"
        )
    return words


def _advise_on_ca(chain: Sequence[CertificateDescription], ca: Path | None) -> str:
    issuer = chain[-1].issuer if chain else "its authority"
    return f"pass --ca with the certificate of {issuer}" if ca is None else f"{ca} does not contain that of {issuer}"


def _list_not_yet_valid(chain: Sequence[CertificateDescription], now: datetime) -> str:
    early = [certificate for certificate in chain if certificate.not_before > now]
    return "; ".join(f"{_get_subject(certificate)} begins {certificate.not_before:%Y-%m-%d}" for certificate in early)


def _get_subject(certificate: CertificateDescription) -> str:
    return certificate.subject or ", ".join(certificate.names) or "without a name"


def _format_days(count: int) -> str:
    return f"{count} day" if count == 1 else f"{count} days"


def describe_refusal(found: UpgradeResult) -> str:
    """Return what a response other than a 101 says."""
    words = f"the server responded with {found.status} {printable(found.reason)}".rstrip()
    location = next((value for name, value in found.fields if name.lower() == "location"), None)
    if location is not None and 300 <= found.status < 400:
        words += f", to {printable(location)}"
    if found.request_id is not None:
        words += f" (id {printable(found.request_id)})"
    return f"{words}: {printable(found.body)}" if found.body else words


def describe_end(seen: bytes) -> str:
    """Return when the server closed the connection, given what it had sent of its response."""
    return "in the middle of its response to the handshake" if seen else "without a response to the handshake"


def describe_beginning(data: bytes) -> str:
    """Return a description of the first bytes of unexpected data."""
    return f"it begins with '{printable(data[:32].decode('latin-1'))}'"


def describe_close(event: CloseConnection) -> str:
    """Return the code and reason of the server's Close."""
    reason = f" ({printable(event.reason)})" if event.reason else ""
    return f"code {int(event.code)}{reason}"
