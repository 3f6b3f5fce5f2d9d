"""A site: its names, its certificate, its origins and its policy.

Tested by tests/unit/test_config.py.
"""

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from tlstunnel.addresses import normalise_name, quoted
from tlstunnel.config.certificates import CertificateConfig, ClientName, PassphraseFile, PemFile
from tlstunnel.config.durations import Duration, OffOr, Timeout
from tlstunnel.config.edge import WorkerOrigin, WorkerReference, WorkerTable
from tlstunnel.config.firewall import (
    AddressEntry,
    Mode,
    RateLimitConfig,
    RuleConfig,
    SiteManagedRules,
    check_names,
)
from tlstunnel.config.headers import HeaderName, Headers
from tlstunnel.config.kinds import Text
from tlstunnel.config.origins import (
    Balance,
    Ejection,
    Health,
    HealthPath,
    OriginConfig,
    OriginHost,
    OriginName,
    RouteConfig,
    check_duplicates,
    check_pool,
)
from tlstunnel.config.plans import Contact, Guideline, PlanName
from tlstunnel.config.tables import Findings, Table

_WEB_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*?)(?::([0-9]{1,5}))?", re.DOTALL)
_OPAQUE_HOST = re.compile(r"[A-Za-z0-9._~-]*")
WEB_PORTS = {"http": 80, "https": 443}
"""The port of a web origin of this scheme that names none (RFC 6454 section 4)."""

_ONLY = "a web origin is scheme, host and port only"


def parse_web_origin(text: str) -> str:
    """Return ``same``, ``null``, or a web origin in the form in which browsers send it (RFC 6454 section 6.2).

    Raises ValueError.
    """
    if text in ("same", "null"):
        return text
    match = _WEB_ORIGIN.fullmatch(text)
    if not match:
        example = '"https://chat.example.com"'
        raise ValueError(f'{quoted(text)} is not a web origin such as {example}, and not "same" or "null"')
    scheme, host, port = match[1].lower(), match[2], match[3]
    if port and int(port) > 65535:
        raise ValueError(f"{quoted(port)} in {quoted(text)} is not a port, which is a number up to 65535")
    if scheme not in WEB_PORTS:  # an extension or an app, whose hosts are not names of the DNS
        if not _OPAQUE_HOST.fullmatch(host):
            raise ValueError(f"{quoted(text)} has more than it may: {_ONLY}")
        return f"{scheme}://{host.lower()}{f':{int(port)}' if port else ''}"
    if "/" in host:
        raise ValueError(f"{quoted(text)} has a path; {_ONLY}")
    if host == "*":
        raise ValueError(f"{quoted(text)} would allow every web page; to allow all, leave web_origins out")
    name = normalise_name(host)
    name = f"[{name}]" if ":" in name else name
    return f"{scheme}://{name}" + (f":{int(port)}" if port and int(port) != WEB_PORTS[scheme] else "")


SiteName = Annotated[str, Text(normalise_name, "chat.example.com")]
WebOrigin = Annotated[str, Text(parse_web_origin, "https://chat.example.com")]

_NEEDS_CLIENT_CA = "requires client_ca, the authorities that issue the certificates of clients"
_NO_TLS = "applies to origins with TLS (wss://) only, and this site has none"


class SiteConfig(Table, frozen=True):
    """A set of names with one certificate, its origins and one policy.

    ``web_origins`` is None where web origins are not checked.
    """

    renamed: ClassVar[Mapping[str, str]] = {
        "allowed_origins": "web_origins",
        "require_origin": "require_web_origin",
        "origins_mode": "web_origins_mode",
        "verify": "origin_verify",
    }

    names: tuple[SiteName, ...] = ("*",)
    default: bool = False
    cert: PemFile | None = None
    key: PemFile | None = None
    passphrase_file: PassphraseFile | None = None
    passphrase_env: str | None = None
    certificates: tuple[CertificateConfig, ...] = ()
    client_ca: PemFile | None = None
    client_auth: Literal["require", "request"] = "require"
    client_allow: tuple[ClientName, ...] = ()
    client_crl: PemFile | None = None
    client_subject_header: HeaderName = "X-Client-Subject"
    origins: tuple[OriginConfig, ...] = ()
    balance: Balance = "round_robin"
    health: Health | None = None
    ejection: Ejection = Ejection()
    routes: tuple[RouteConfig, ...] = ()
    origin_ca: PemFile | None = None
    origin_name: OriginName | None = None
    origin_cert: PemFile | None = None
    origin_key: PemFile | None = None
    origin_verify: Literal["on", "off"] = "on"
    origin_host: OriginHost = "keep"
    set_headers: Headers = Headers()
    remove_headers: tuple[HeaderName, ...] = ()
    remove_spoofable_headers: bool = False
    send_proxy_protocol: Literal["off", "v1", "v2", "v2-tls"] = "off"
    max_age: OffOr[Timeout] = None
    max_age_jitter: Duration = Duration(0)
    allow_addresses: tuple[AddressEntry, ...] = ()
    block_addresses: tuple[AddressEntry, ...] = ()
    addresses_mode: Mode = "block"
    web_origins: tuple[WebOrigin, ...] | None = None
    require_web_origin: bool = False
    web_origins_mode: Mode = "block"
    strict_path: bool = True
    http: Literal["refuse", "pass"] = "refuse"
    health_path: HealthPath | None = None
    rules: tuple[RuleConfig, ...] = ()
    rate_limits: tuple[RateLimitConfig, ...] = ()
    managed_rules: SiteManagedRules | None = None
    worker: WorkerReference | None = None
    worker_config: WorkerTable = WorkerTable()
    worker_origins: tuple[WorkerOrigin, ...] = ()
    worker_timeout: Timeout = Timeout(1)
    worker_on_error: Literal["refuse", "forward"] = "refuse"
    plan: PlanName | None = None
    guideline: Guideline | None = None
    contact: Contact | None = None

    @property
    def pairs(self) -> tuple[CertificateConfig, ...]:
        """Every certificate with its key."""
        if not (self.cert and self.key):
            return self.certificates
        own = CertificateConfig(
            cert=self.cert, key=self.key, passphrase_file=self.passphrase_file, passphrase_env=self.passphrase_env
        )
        return (own, *self.certificates)

    @property
    def depends_on_path(self) -> bool:
        """Whether a request's path decides where it goes; rules and rate limits may depend on it besides."""
        return bool(self.routes) or self.worker is not None

    def check_site_names(self) -> Findings:
        """There is a name."""
        if not self.names:
            yield ("names",), 'expected at least one name; to match any name, leave names out or write ["*"]'

    def check_pair(self) -> Findings:
        """A certificate and its key go together."""
        if self.cert and not self.key:
            yield ("cert",), "requires key, the PEM file of its private key"
        if self.key and not self.cert:
            yield ("key",), "requires cert, the PEM file of its certificate and chain"

    def check_passphrase(self) -> Findings:
        """A passphrase comes from one place, and there is a key to decrypt."""
        if self.passphrase_file and self.passphrase_env:
            yield ("passphrase_env",), "passphrase_file is set too; keep one of them"
        for key in ("passphrase_file", "passphrase_env"):
            if getattr(self, key) and self.key is None:
                yield (key,), "requires key, the private key that it decrypts"

    def check_clients(self) -> Findings:
        """Keys about client certificates need an authority."""
        if self.client_ca is None:
            for key, unset in (("client_allow", ()), ("client_crl", None), ("client_auth", "require")):
                if getattr(self, key) != unset:
                    yield (key,), _NEEDS_CLIENT_CA

    def check_origins(self) -> Findings:
        """There are origins, and not only backups."""
        return check_pool(self.origins)

    def check_addresses(self) -> Findings:
        """Each address is listed once."""
        return check_duplicates(self.origins)

    def check_routes(self) -> Findings:
        """Every route can be chosen."""
        paths = [route.path for route in self.routes]
        for index, path in enumerate(paths):
            earlier = next((i for i in range(index) if path.startswith(paths[i])), None)
            if earlier is not None:
                yield ("routes", index, "path"), f"this route is never used: routes[{earlier}] matches first"

    def check_origin_tls(self) -> Findings:
        """Keys about TLS to origins need an origin with TLS."""
        pools = (self.origins, *(route.origins for route in self.routes))
        # A worker may choose a wss:// origin elsewhere.
        if self.worker_origins or any(origin.address.tls for origins in pools for origin in origins):
            return
        for key in ("origin_ca", "origin_name", "origin_cert", "origin_key"):
            if getattr(self, key) is not None:
                yield (key,), _NO_TLS
        if self.origin_verify == "off":
            yield ("origin_verify",), _NO_TLS

    def check_origin_verify(self) -> Findings:
        """Authorities are named only where certificates are verified."""
        if self.origin_verify == "off" and self.origin_ca is not None:
            yield ("origin_verify",), 'with "off", origin_ca has no effect; remove one of them'

    def check_origin_pair(self) -> Findings:
        """The certificate that is presented to origins and its key go together."""
        for key, other in (("origin_cert", "origin_key"), ("origin_key", "origin_cert")):
            if getattr(self, key) is not None and getattr(self, other) is None:
                yield (key,), f"requires {other}"

    def check_max_age(self) -> Findings:
        """There is an age to vary."""
        if self.max_age_jitter and self.max_age is None:
            yield ("max_age_jitter",), "requires max_age"

    def check_web_origins(self) -> Findings:
        """Nobody relies on a protection that does nothing."""
        if self.web_origins is None and self.require_web_origin:
            yield ("require_web_origin",), 'requires web_origins, such as web_origins = ["same"]'

    def check_rule_names(self) -> Findings:
        """The names of rules are unique."""
        return check_names("rules", self.rules)

    def check_rate_limit_names(self) -> Findings:
        """The names of rate limits are unique."""
        return check_names("rate_limits", self.rate_limits)

    def check_worker(self) -> Findings:
        """Keys about the worker need one."""
        if self.worker is None:
            for key in ("worker_config", "worker_origins", "worker_timeout", "worker_on_error"):
                if getattr(self, key) != getattr(_DEFAULT, key):
                    yield (key,), 'requires worker, such as worker = "edge/chat.py:fetch"'


_DEFAULT = SiteConfig()
