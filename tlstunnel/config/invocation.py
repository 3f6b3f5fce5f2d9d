"""The command line of `start`, combined with the configuration file.

Tested by tests/unit/test_config_invocation.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from tlstunnel.addresses import ListenAddress, OriginAddress
from tlstunnel.config import Config, OriginConfig, SiteConfig, decode
from tlstunnel.config.admin import Admin
from tlstunnel.errors import ConfigurationError

PORT = 8443
LOOPBACK = (ListenAddress("127.0.0.1", PORT), ListenAddress("::1", PORT))
EVERYWHERE = (ListenAddress("0.0.0.0", PORT), ListenAddress("::", PORT))  # noqa: S104 - only with a certificate of its own


@dataclass(frozen=True, slots=True)
class Invocation:
    """The values of the command line of `start`.

    `origin` is as written, and None if the file has the sites; `echo` is the port of the embedded echo origin that
    replaces it. `listen` is empty if the file or the default decides. `http` is None for the default: `pass` in front
    of an origin without a file, else `refuse`. `admin` is the admin address, None if the file decides. Relative paths
    of the file and the origin start from `folder`, the current folder at the start: a process must be able to start
    although it has been removed, as by a deployment.
    """

    file: Path | None = None
    origin: str | None = None
    echo: int | None = None
    cert: Path | None = None
    key: Path | None = None
    listen: tuple[ListenAddress, ...] = ()
    http: Literal["pass", "refuse"] | None = None
    folder: Path = Path()
    admin: ListenAddress | None = None

    @property
    def site(self) -> SiteConfig | None:
        """The site of the command line. Raises ValueError if `origin` is not an address."""
        if self.echo is not None:
            address = OriginAddress("127.0.0.1", self.echo, text="echo")
        elif self.origin is not None:
            address = OriginAddress.parse(self.origin, self.folder)
        else:
            return None
        http = self.http or ("pass" if self.origin is not None and self.file is None else "refuse")
        return SiteConfig(origins=(OriginConfig(address=address),), cert=self.cert, key=self.key, http=http)

    def configuration(self, text: str | None) -> Config:
        """Decode `text`, the content of the file; None gives the defaults. Raises ConfigurationError."""
        config = Config()
        if self.file is not None and text is not None:
            config = decode(text, self.folder / self.file.parent, str(self.file))
        return config if self.admin is None else _listen_for_admin(config, self.admin)

    def as_json(self) -> dict[str, Any]:
        """Return what `from_json` reads in another process."""
        return {
            "file": str(self.file) if self.file else None,
            "origin": self.origin,
            "echo": self.echo,
            "cert": str(self.cert) if self.cert else None,
            "key": str(self.key) if self.key else None,
            "listen": [str(address) for address in self.listen],
            "http": self.http,
            "folder": str(self.folder),
            "admin": str(self.admin) if self.admin is not None else None,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Read what `as_json` returned. Raises KeyError or ValueError if another release wrote it."""
        file, cert, key = (Path(fields[name]) if fields[name] else None for name in ("file", "cert", "key"))
        listen = tuple(ListenAddress.parse(text) for text in fields["listen"])
        folder = Path(fields.get("folder", ""))  # earlier releases do not write it
        admin = ListenAddress.parse(fields["admin"]) if fields.get("admin") else None
        return cls(file, fields["origin"], fields["echo"], cert, key, listen, fields["http"], folder, admin)


def _listen_for_admin(config: Config, address: ListenAddress) -> Config:
    """Return the configuration with another admin address. Raises ConfigurationError if it must not be used so."""
    admin = msgspec.structs.replace(config.admin or Admin(), listen=address)
    for check in (admin.check_listen, admin.check_cert):
        for _, reason in check():
            raise ConfigurationError(f"--admin: {reason}")
    return msgspec.structs.replace(config, admin=admin)


def sites_to_serve(invocation: Invocation, config: Config) -> tuple[SiteConfig, ...]:
    """Return the sites of the file, or the one of the command line. Raises ConfigurationError."""
    site = invocation.site
    if config.sites and site is not None:
        raise ConfigurationError(f"{invocation.file} has [[sites]] now, but this tunnel was started with an ORIGIN")
    sites = config.sites or ((site,) if site is not None else ())
    if not sites:
        raise ConfigurationError(f"{invocation.file} has no [[sites]] any more")
    return sites


def uses_test_certificate(sites: Iterable[SiteConfig]) -> bool:
    """Return whether a site has no certificate of its own, and so is served with the test certificate."""
    return any(not site.pairs for site in sites)


def addresses_to_listen_on(
    invocation: Invocation, config: Config, passed: tuple[ListenAddress, ...] = ()
) -> tuple[ListenAddress, ...]:
    """Return the addresses of the command line, else of the file, and those `passed` by socket activation.

    Without any, port 8443: on loopback only if the test certificate is used. Raises ConfigurationError.
    """
    default = LOOPBACK if uses_test_certificate(sites_to_serve(invocation, config)) else EVERYWHERE
    return tuple(dict.fromkeys((*(invocation.listen or config.listen), *passed))) or default
