"""Where the dashboard, the API and the metrics are served, and who may use them.

Tested by tests/unit/test_config_admin.py.
"""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Literal

from tlstunnel.addresses import ListenAddress, quoted
from tlstunnel.config.kinds import FilePath, Integer, Text
from tlstunnel.config.tables import Findings, Table

Access = Literal["read", "full"]
"""Who may read may not act."""

DEFAULT_LISTEN = ListenAddress("127.0.0.1", 9180)

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_HOST = re.compile(r"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}|\[[0-9A-Fa-f:.]{2,45}\]")

_NEEDED = (
    "requires TLS (admin.cert and admin.key) and somebody to let in (admin.tokens or admin.client_ca), because others"
    " than this machine reach it"
)


def parse_token_name(text: str) -> str:
    """Return the name of a token, which the log shows. Raises ValueError."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"expected 1 to 64 letters, digits or one of _ . @ -, got {quoted(text)}")
    return text


def parse_host(text: str) -> str:
    """Return a host name or an address in lower case, as in the header Host, without a port. Raises ValueError."""
    if len(text) > 253 or not _HOST.fullmatch(text):
        raise ValueError(f'expected a host name without a port, such as "tunnel.example.com", got {quoted(text)}')
    return text.lower()


class Token(Table, frozen=True):
    """A token, and what it allows. `name` is what the log shows of it."""

    name: Annotated[str, Text(parse_token_name, "alice")]
    file: Annotated[Path, FilePath("a file whose first line is the token")]
    access: Access = "read"


class Admin(Table, frozen=True):
    """The admin address. Without this table and without ``--admin`` there is none."""

    listen: Annotated[ListenAddress, Text(ListenAddress.parse, "127.0.0.1:9180")] = DEFAULT_LISTEN
    hosts: tuple[Annotated[str, Text(parse_host, "tunnel.example.com")], ...] = ()
    cert: Annotated[Path, FilePath("a certificate")] | None = None
    key: Annotated[Path, FilePath("a private key")] | None = None
    client_ca: Annotated[Path, FilePath("certificates of authorities")] | None = None
    client_access: Access = "read"
    metric_sites: Annotated[int, Integer(0, 100_000)] = 200
    tokens: tuple[Token, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the address: a Unix socket or loopback."""
        return is_local(self.listen)

    def check_listen(self) -> Findings:
        """An address that others reach is protected."""
        if not is_local(self.listen) and (self.cert is None or not (self.tokens or self.client_ca)):
            yield ("listen",), f"{self.listen} {_NEEDED}"

    def check_cert(self) -> Findings:
        """A certificate has a key, and a Unix socket has neither."""
        if (self.cert is None) != (self.key is None):
            yield ("cert" if self.key is None else "key",), "requires the other one of cert and key"
        elif self.cert is not None and self.listen.path is not None:
            yield ("cert",), "a Unix socket is served without TLS"

    def check_client_ca(self) -> Findings:
        """Client certificates are part of TLS."""
        if self.client_ca is not None and self.cert is None:
            yield ("client_ca",), "requires cert and key"

    def check_tokens(self) -> Findings:
        """The names of tokens are unique: they say who did something."""
        names = [token.name for token in self.tokens if isinstance(token, Token)]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield ("tokens", index, "name"), f"{quoted(name)} is the name of another token too"


def is_local(address: ListenAddress) -> bool:
    """Return whether only this machine reaches an address."""
    if address.path is not None or address.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.host or "").is_loopback
    except ValueError:
        return False
