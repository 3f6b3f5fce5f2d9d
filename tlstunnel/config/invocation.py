"""What the command line asked for, and what that and the configuration file amount to together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tlstunnel.addresses import ListenAddress, OriginAddress
from tlstunnel.config import Config, OriginConfig, SiteConfig, decode
from tlstunnel.errors import ConfigurationError

PORT = 8443
LOOPBACK = (ListenAddress("127.0.0.1", PORT), ListenAddress("::1", PORT))
EVERYWHERE = (ListenAddress("0.0.0.0", PORT), ListenAddress("::", PORT))  # noqa: S104 - with a certificate of its own


@dataclass(frozen=True, slots=True)
class Invocation:
    """What the command line asked for.

    `origin` is as it was written, and None where the file has the sites; `echo` is the port of the embedded origin in
    its place. `listen` is empty where the file, or the default, says it.
    """

    file: Path | None = None
    origin: str | None = None
    echo: int | None = None
    cert: Path | None = None
    key: Path | None = None
    listen: tuple[ListenAddress, ...] = ()

    @property
    def site(self) -> SiteConfig | None:
        """The site of the command line. Raises ValueError: `origin` is no address."""
        if self.echo is not None:
            address = OriginAddress("127.0.0.1", self.echo, text="echo")
        elif self.origin is not None:
            address = OriginAddress.parse(self.origin, Path.cwd())
        else:
            return None
        return SiteConfig(origins=(OriginConfig(address=address),), cert=self.cert, key=self.key)

    def configuration(self, text: str | None) -> Config:
        """What the text of the file says; the default without one. Raises ConfigurationError."""
        if self.file is None or text is None:
            return Config()
        return decode(text, self.file.parent, str(self.file))

    def as_json(self) -> dict[str, Any]:
        """What `from_json` makes the same of, in another process."""
        return {
            "file": str(self.file) if self.file else None,
            "origin": self.origin,
            "echo": self.echo,
            "cert": str(self.cert) if self.cert else None,
            "key": str(self.key) if self.key else None,
            "listen": [str(address) for address in self.listen],
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Self:
        """Raise KeyError, ValueError: said by another program."""
        file, cert, key = (Path(said[name]) if said[name] else None for name in ("file", "cert", "key"))
        listen = tuple(ListenAddress.parse(text) for text in said["listen"])
        return cls(file, said["origin"], said["echo"], cert, key, listen)


def sites_to_serve(wanted: Invocation, config: Config) -> tuple[SiteConfig, ...]:
    """The sites of the file, or the one of the command line. Raises ConfigurationError."""
    site = wanted.site
    if config.sites and site is not None:
        raise ConfigurationError(
            f"{wanted.file} has [[sites]] now, and this tunnel was started with an origin of its own"
        )
    configured = config.sites or ((site,) if site is not None else ())
    if not configured:
        raise ConfigurationError(f"{wanted.file}: there are no [[sites]] any more")
    return configured


def uses_test_certificate(configured: Iterable[SiteConfig]) -> bool:
    """Whether one of them has the test certificate, for want of one of its own."""
    return any(not site.pairs for site in configured)


def addresses_to_listen_on(
    wanted: Invocation, config: Config, passed: tuple[ListenAddress, ...] = ()
) -> tuple[ListenAddress, ...]:
    """Where to listen: what was asked for and `passed` by socket activation, else this machine only with a test pair.

    Raises ConfigurationError.
    """
    default = LOOPBACK if uses_test_certificate(sites_to_serve(wanted, config)) else EVERYWHERE
    return tuple(dict.fromkeys((*(wanted.listen or config.listen), *passed))) or default
