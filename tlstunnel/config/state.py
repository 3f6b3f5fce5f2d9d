"""Where machines share their counts, where the history is kept, and what happens when counts cannot be reached.

Tested by tests/unit/test_config.py.
"""

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tlstunnel.addresses import quoted
from tlstunnel.config.durations import Timeout
from tlstunnel.config.kinds import FilePath, Text
from tlstunnel.config.tables import Findings, Table

_SCHEMES = ("valkey", "valkeys", "redis", "rediss")
_URL = re.compile(rf"(?:{'|'.join(_SCHEMES)})(?:\+[a-z]+)?://[!-~]{{1,2000}}")
_URL_FORM = '"valkey://HOST:6379/0"'
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class StateURL(msgspec.Struct, frozen=True):
    """The URL of a Valkey or Redis server. `text` may have a password in it; `str` has none."""

    text: str

    def __str__(self) -> str:
        scheme, _, rest = self.text.partition("://")
        credentials, at, server = rest.rpartition("@")
        user = credentials.partition(":")[0]
        return f"{scheme}://{user}{at}{server}" if user else f"{scheme}://{server}"

    def __repr__(self) -> str:
        return f"<StateURL {self}>"

    @property
    def has_password(self) -> bool:
        """Whether there is a password in it."""
        credentials = self.text.partition("://")[2].rpartition("@")[0]
        return bool(credentials.partition(":")[2])

    @classmethod
    def parse(cls, text: str) -> "StateURL":
        """Check the scheme and the characters; `tlstunnel.state.valkey` reads the rest. Raises ValueError."""
        if not _URL.fullmatch(text):
            scheme = text.partition("://")[0].partition("+")[0]
            if scheme in _SCHEMES and "://" in text:  # not quoted, since there may be a password in it
                raise ValueError(f"expected a URL such as {_URL_FORM}, of printable ASCII characters without spaces")
            shown = scheme if "://" in text else text.rpartition("@")[2]
            raise ValueError(f"expected a URL such as {_URL_FORM}, got {quoted(shown)}")
        return cls(text)


def parse_prefix(text: str) -> str:
    """Return what the keys in the server begin with. Raises ValueError."""
    if not _PREFIX.fullmatch(text):
        reason = f"expected 1 to 64 letters, digits or one of _ . : -, got {quoted(text)}"
        raise ValueError(reason)
    return text


ServerURL = Annotated[StateURL, Text(StateURL.parse, "valkey://HOST:6379/0", pattern=f"^{_URL.pattern}$")]
PasswordFile = Annotated[Path, FilePath("a file whose first line is the password")]
StateFolder = Annotated[Path, FilePath("a folder")]
Prefix = Annotated[str, Text(parse_prefix, "tlstunnel", pattern=f"^{_PREFIX.pattern}$")]


class State(Table, frozen=True):
    """What is shared by processes and machines, and kept."""

    url: ServerURL | None = None
    password_file: PasswordFile | None = None
    prefix: Prefix = "tlstunnel"
    dir: StateFolder | None = None
    timeout: Timeout = Timeout(0.05)
    on_failure: Literal["local", "refuse"] = "local"

    def check_password_file(self) -> Findings:
        """A password is for a server, and comes from one place."""
        if self.password_file is None:
            return
        if self.url is None:
            yield ("password_file",), "requires url"
        elif self.url.has_password:
            yield ("password_file",), "there is a password in url too; keep one of them"
