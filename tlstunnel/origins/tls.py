"""TLS to ``wss://`` origins: trusted certificates, the client certificate, and explanations of failures."""

import ssl
from pathlib import Path
from time import monotonic

from tlstunnel.addresses import OriginAddress
from tlstunnel.certificates import describe
from tlstunnel.certificates.contexts import load_client_pair
from tlstunnel.errors import CertificateError
from tlstunnel.journal.events import Reason
from tlstunnel.origins.errors import OriginTLSFailed
from tlstunnel.sockets.channel import Channel
from tlstunnel.tls.policy import apply_to_client_context
from tlstunnel.tls.stream import TlsStream
from tlstunnel.tls.truncation import Truncated

# X509_V_ERR_... of OpenSSL's x509_vfy.h: the reason in the record, and advice.
_DISTRUST = {
    9: (
        Reason.ORIGIN_NOT_YET_VALID,
        "its certificate, or one in its chain, is not valid yet; is this machine's clock right?",
    ),
    10: (Reason.ORIGIN_EXPIRED, "its certificate, or one in its chain, has expired; renew it"),
    18: (Reason.ORIGIN_SELF_SIGNED, "its certificate is self-signed; if you trust it, set origin_ca to it"),
    19: (
        Reason.ORIGIN_UNKNOWN_ISSUER,
        "its chain ends with a root that is not trusted; to trust it, set origin_ca to it",
    ),
    20: (
        Reason.ORIGIN_UNKNOWN_ISSUER,
        "the issuer of its certificate is not trusted; to trust it, set origin_ca to it",
    ),
    21: (
        Reason.ORIGIN_UNKNOWN_ISSUER,
        "the issuer of its certificate is not trusted; to trust it, set origin_ca to it",
    ),
    62: (Reason.ORIGIN_WRONG_NAME, "its certificate is for another name; set origin_name to the name to expect"),
    64: (Reason.ORIGIN_WRONG_NAME, "its certificate is not for this IP address; set origin_name to a name that it has"),
}

# What OpenSSL reports, depending on its version, for bytes that are not a TLS record.
_NOT_TLS = frozenset(
    {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE"}
)

# The usual cause of an origin's alert (RFC 8446 section 6.2).
_ADVICE = {
    "certificate required": "; set origin_cert and origin_key",
    "handshake failure": "; it may ask for a client certificate (origin_cert), or there is no common cipher suite",
    "bad certificate": "; it does not accept origin_cert",
    "unknown ca": "; it does not trust the issuer of origin_cert",
    "certificate expired": "; origin_cert has expired",
    "certificate unknown": "; it does not accept origin_cert",
    "unrecognized name": "; it has no site with that name: see origin_name",
    "no application protocol": "; it does not support http/1.1",
    "protocol version": "; it supports neither TLS 1.2 nor 1.3",
}

SESSIONS = 64
"""How many sessions an `OriginTLS` keeps for resumption, one for each origin. The oldest is dropped."""

SESSION_SECONDS = 600.0
"""How long a session is used. A resumed connection verifies no certificate, so an expired one is noticed later."""

RETRY_SECONDS = 1.0
"""The minimum time between two sessions taken from connections to the same origin."""


class OriginTLS:
    """How to connect to the ``wss://`` origins of a site: `context`, and the `name` that their certificates must have.

    Without `name`, it is each origin's host as configured. Sessions are kept here, because they belong to the verified
    name; contexts may be shared.
    """

    __slots__ = ("_name", "_sessions", "context")

    def __init__(self, context: ssl.SSLContext, name: str | None = None) -> None:
        self.context = context
        self._name = name
        self._sessions: dict[tuple[str, int], tuple[ssl.SSLSession, float]] = {}

    def get_server_name(self, address: OriginAddress) -> str:
        """Return the name that the certificate of the origin at `address` must have."""
        return self._name or (address.host or "").partition("%")[0]

    async def begin(self, origin: Channel, address: OriginAddress, client: Channel) -> None:
        """Do the TLS handshake on `origin`, which is connected to `address`.

        Raises OriginTLSFailed, TimeoutError at the deadline of the channel's wakeup, or ClientGone if the client
        disconnects. The socket is closed in these cases.
        """
        host = address.host or ""
        session, since = self._sessions.get((host, address.port), (None, 0.0))
        try:
            tls = TlsStream(
                self.context,
                server_hostname=self.get_server_name(address),
                session=session if monotonic() - since < SESSION_SECONDS else None,
            )
            await origin.begin_tls(tls, unless_gone=client)
        except BaseException as error:
            origin.release()
            origin.sock.close()
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                self._sessions.pop((host, address.port), None)
                raise OriginTLSFailed(_classify(error), f"{address}: {explain(error)}") from None
            raise

    def remember(self, origin: Channel, address: OriginAddress) -> None:
        """Keep the session of a connection that has received something: TLS 1.3 sends tickets after the handshake."""
        tls, host = origin.tls, address.host or ""
        assert tls is not None
        now = monotonic()
        _, since = self._sessions.get((host, address.port), (None, -RETRY_SECONDS))
        # Python copies a session by encoding and decoding it, which is wasted if the origin never resumes one.
        if tls.session_reused or now - since < RETRY_SECONDS:
            return
        session = tls.session
        if session is not None and session.has_ticket:
            self._sessions.pop((host, address.port), None)
            if len(self._sessions) >= SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            self._sessions[host, address.port] = session, now


class Contexts:
    """The client contexts of one configuration, shared by sites with the same settings.

    A context with the system's store takes 0.75 MiB and up to a tenth of a second, too much for one per site.
    """

    def __init__(self) -> None:
        self._contexts: dict[tuple[Path | None, Path | None, Path | None, bool], ssl.SSLContext] = {}

    def get(
        self, *, ca: Path | None = None, cert: Path | None = None, key: Path | None = None, verify: bool = True
    ) -> ssl.SSLContext:
        """Return a context as from `create_client_context`, which is only created the first time."""
        what = (ca, cert, key, verify)
        if what not in self._contexts:
            self._contexts[what] = create_client_context(ca=ca, cert=cert, key=key, verify=verify)
        return self._contexts[what]


def create_client_context(
    *, ca: Path | None = None, cert: Path | None = None, key: Path | None = None, verify: bool = True
) -> ssl.SSLContext:
    """Create a context for ``wss://`` origins: TLS 1.2 and 1.3, ALPN ``http/1.1``, names from subjectAltName only.

    It trusts only the certificates in `ca` (PEM: roots, intermediates or an origin's own), or the system's store
    without it. If `verify` is false it trusts any certificate, and the caller has to warn. `cert` (PEM: the leaf, then
    its chain) and `key` are sent to an origin that requests a certificate. Raises CertificateError, naming the file and
    the reason.
    """
    # Not create_default_context, which writes the keys of every session to the file that SSLKEYLOGFILE names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    apply_to_client_context(context)
    context.hostname_checks_common_name = False  # RFC 9525 section 2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif ca is None:
        context.load_default_certs()
    else:
        describe.read_certificates(ca)  # explains what is wrong; OpenSSL does not name the file
        try:
            context.load_verify_locations(ca)
        except OSError as error:
            raise CertificateError(f"{ca}: the TLS library refuses it: {_get_openssl_name(error)}") from error
        # Certificates in `ca` are trusted even if they are not roots.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if cert is not None:
        load_client_pair(context, cert, key or cert)
    return context


def explain(error: OSError) -> str:
    """Explain in a sentence why receiving from an origin or sending to it failed, with or without TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        _, words = _DISTRUST.get(error.verify_code, (Reason.ORIGIN_NOT_TRUSTED, "its certificate is not trusted"))
        return f"{words} ({str(error.verify_message).rstrip('.')})"
    if isinstance(error, Truncated):
        return "it closed the connection without a TLS alert"
    if not isinstance(error, ssl.SSLError):
        return error.strerror or str(error)
    name = _get_openssl_name(error)
    if name in _NOT_TLS:
        return f"its response is not TLS ({name})"
    _, alert, what = name.partition("ALERT_")
    if alert or name == "TLSV1_UNRECOGNIZED_NAME":
        alert_name = what.lower().replace("_", " ") or "unrecognized name"
        return f"it sent the alert: {alert_name}{_ADVICE.get(alert_name, '')}"
    return f"TLS error: {name}"


def _classify(error: OSError) -> Reason:
    if isinstance(error, ssl.SSLCertVerificationError):
        return _DISTRUST.get(error.verify_code, (Reason.ORIGIN_NOT_TRUSTED, ""))[0]
    no_tls = isinstance(error, ssl.SSLError) and _get_openssl_name(error) in _NOT_TLS
    return Reason.ORIGIN_NO_TLS if no_tls else Reason.ORIGIN_TLS_FAILED


def _get_openssl_name(error: OSError) -> str:
    """Return OpenSSL's name of the error, such as ``WRONG_VERSION_NUMBER``."""
    return getattr(error, "reason", None) or error.strerror or str(error)
