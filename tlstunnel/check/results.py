"""The results of the steps of a check.

Tested by tests/unit/test_check_steps.py.
"""

from dataclasses import dataclass

from tlstunnel.certificates.describe import CertificateDescription


@dataclass(frozen=True, slots=True)
class DnsResult:
    """``addresses`` in the order in which they are tried."""

    host: str
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TcpResult:
    """``address`` is the one connected to; ``failed`` the ones before it, each with the reason."""

    address: str | None
    failed: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TlsResult:
    """``chain`` is what the server sent, leaf first, trusted or not. What is not known is None."""

    version: str | None = None
    cipher: str | None = None
    group: str | None = None
    alpn: str | None = None
    chain: tuple[CertificateDescription, ...] = ()
    unreadable: int = 0
    """How many further certificates of the chain could not be parsed."""


@dataclass(frozen=True, slots=True)
class UpgradeResult:
    """The response. `fields` are in the server's order and case, latin-1; `body` is the first 1 KiB of a refusal's."""

    status: int
    reason: str
    fields: tuple[tuple[str, str], ...]
    subprotocol: str | None = None
    extensions: str | None = None
    request_id: str | None = None
    body: str = ""


@dataclass(frozen=True, slots=True)
class PingResult:
    """``round_trip`` in seconds, from before the ping is written to the pong's arrival."""

    round_trip: float


@dataclass(frozen=True, slots=True)
class CloseResult:
    """The server's Close: 1005 if it has no code (RFC 6455 section 7.1.5)."""

    code: int
    reason: str


Result = DnsResult | TcpResult | TlsResult | UpgradeResult | PingResult | CloseResult


@dataclass(frozen=True, slots=True)
class Step:
    """One step: ``name`` of dns, tcp, tls, handshake, ping, close; ``error`` is None if it succeeded."""

    name: str
    seconds: float
    result: Result | None
    error: str | None

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.error is None
