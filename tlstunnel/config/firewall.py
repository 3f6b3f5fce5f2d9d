"""The firewall: lists, rules, rate limits and managed rules.

Expressions and the notation of rate limits are parsed by the firewall itself, when it is built.

Tested by tests/unit/test_config.py.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal

from tlstunnel.addresses import Networks, quoted
from tlstunnel.config.document import KeyPath
from tlstunnel.config.durations import Timeout
from tlstunnel.config.kinds import (
    UNREADABLE,
    Array,
    FilePath,
    Integer,
    Kind,
    Reading,
    Schema,
    Text,
    describe,
)
from tlstunnel.config.tables import Findings, Table

# The names of rules and limits appear in logs, metrics and expressions.
_NAME_LENGTH = 100
# A longer response is a web page, which no client of a WebSocket shows.
_BODY_LENGTH = 4096
_STATUSES = frozenset(status.value for status in HTTPStatus)
_LIST_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")

Mode = Literal["block", "log"]
"""Whether a part of the firewall acts, or only counts and logs what it would have done."""

Skippable = Literal["rate_limits", "managed_rules"]
"""The stages after the rules that a rule can skip for a request."""

Profile = Literal["kubernetes", "signalr", "grafana", "keycloak", "proxmox", "guacamole", "nextjs"]
"""Exclusions for a kind of origin whose ordinary handshakes look like attacks to the managed rules."""


def parse_name(text: str) -> str:
    """Return the name of a rule or a rate limit. Raises ValueError."""
    if not text.isprintable() or not 0 < len(text) <= _NAME_LENGTH:
        raise ValueError(f"expected a name of 1 to {_NAME_LENGTH} printable characters, got {quoted(text)}")
    return text


def parse_body(text: str) -> str:
    """Return the text of a response. Raises ValueError."""
    if len(text) > _BODY_LENGTH:
        raise ValueError(f"expected at most {_BODY_LENGTH} characters, got {len(text)}")
    return text


def parse_address_entry(text: str) -> str:
    """Return a network in its shortest form, or ``@NAME`` of a list. Raises ValueError."""
    return text if text.startswith("@") else str(next(iter(Networks.parse([text]))))


Name = Annotated[str, Text(parse_name, "no scanners", expected="a name")]
Body = Annotated[str, Text(parse_body, "not found", expected="a string")]
AddressEntry = Annotated[str, Text(parse_address_entry, "10.0.0.0/8")]


class Lists(dict[str, str | tuple[str, ...]]):
    """Named lists: for each name, the absolute path of a text file, or the entries; immutable by convention."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    @classmethod
    def kind(cls) -> Kind:
        """Return the kind of this value in the file."""
        return _ListsKind()


class _ListsKind(Kind):
    def __init__(self) -> None:
        self._file = FilePath("a text file", str)
        self._entries = Array(Text(str, "10.0.0.0/8"))

    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        if not isinstance(value, dict):
            reading.refuse(path, f'expected a table such as {{ partners = "partners.txt" }}, got {describe(value)}')
            return UNREADABLE
        before = len(reading.problems)
        lists = {name: self._read_list(name, inner, path, reading) for name, inner in value.items()}
        return Lists(lists) if len(reading.problems) == before else UNREADABLE

    def _read_list(self, name: str, value: object, path: KeyPath, reading: Reading) -> Any:
        if not _LIST_NAME.fullmatch(name):
            reason = f'{quoted(name)} is not a valid name of a list; use letters, digits, "_", "." and "-"'
            reading.refuse(path, reason, name)
        if isinstance(value, list):
            return self._entries.read(value, (*path, name), reading)
        if isinstance(value, str):
            return self._file.read(value, (*path, name), reading)
        expected = "the path of a text file, or an array of entries"
        reading.refuse((*path, name), f"expected {expected}, got {describe(value)}")
        return UNREADABLE

    def schema(self) -> Schema:
        forms = [self._file.schema(), self._entries.schema()]
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^{_LIST_NAME.pattern}$"},
            "additionalProperties": {"anyOf": forms},
        }

    def render(self, value: Any) -> Any:
        return {name: list(inner) if isinstance(inner, tuple) else inner for name, inner in value.items()}


class RuleConfig(Table, frozen=True):
    """A rule. ``status`` and ``body`` describe the response of a refusal, ``skip`` belongs to the action ``skip``."""

    name: Name
    when: str
    action: Literal["block", "allow", "log", "skip"]
    status: Annotated[int, Integer(400, 599)] = 403
    body: Body | None = None
    skip: tuple[Skippable, ...] = ()
    on_error: Literal["ignore", "block"] = "ignore"
    mode: Mode = "block"

    def check_skip(self) -> Findings:
        """``skip`` and its action go together."""
        if self.action == "skip" and not self.skip:
            yield ("action",), 'requires skip, such as skip = ["rate_limits", "managed_rules"]'
        if self.action != "skip" and self.skip:
            yield ("skip",), 'requires action = "skip"'

    def check_status(self) -> Findings:
        """The status is one of HTTP (RFC 9110 section 15)."""
        if self.status not in _STATUSES:
            yield ("status",), f"{self.status} is not an HTTP status code; the usual one is 403"

    def check_response(self) -> Findings:
        """Only rules that can refuse a request have a response."""
        for key, default in (("status", 403), ("body", None)):
            if getattr(self, key) != default and "block" not in (self.action, self.on_error):
                yield (key,), 'requires action = "block" or on_error = "block"'


class RateLimitConfig(Table, frozen=True):
    """How many handshakes a key may make (``limit``), or how many tunnels it may have (``max_tunnels``), or both.

    ``limit`` is in the notation of the ``limits`` library, ``when`` is a CEL expression.
    """

    name: Name
    key: tuple[str, ...] = ("ip",)
    limit: str | None = None
    strategy: Literal["fixed", "moving", "sliding"] = "fixed"
    max_tunnels: Annotated[int, Integer(1, 1_000_000)] | None = None
    when: str | None = None
    block_for: Timeout | None = None
    mode: Mode = "block"
    ipv6_prefix: Annotated[int, Integer(1, 128)] = 64

    def check_limit(self) -> Findings:
        """It limits something."""
        if self.limit is None and self.max_tunnels is None:
            yield (), 'a rate limit needs limit or max_tunnels, such as limit = "30/minute" or max_tunnels = 50'
        if self.block_for is not None and self.limit is None:
            yield ("block_for",), "requires limit"


class SiteManagedRules(Table, frozen=True):
    """The managed rules of a site. ``rules`` is an absolute path or glob, ``crs`` the folder of a CRS release."""

    owasp_crs: bool = False
    paranoia: Annotated[int, Integer(1, 4)] = 1
    mode: Mode = "block"
    threshold: Annotated[int, Integer(1, 1000)] = 5
    exclude: tuple[Annotated[int, Integer(1, 999_999_999)], ...] = ()
    profiles: tuple[Profile, ...] = ()
    rules: Annotated[str, FilePath("a file of rules, or a glob", str)] | None = None
    crs: Annotated[Path, FilePath("the folder of a Core Rule Set release")] | None = None
    timeout: Timeout = Timeout(0.05)
    on_failure: Literal["block", "allow"] = "block"

    def check_rules(self) -> Findings:
        """There are rules: otherwise a user could rely on a protection that does nothing."""
        if not self.owasp_crs and self.rules is None:
            yield (), "no rules are enabled; set owasp_crs = true, or rules to files of your own"


class ManagedRules(Table, frozen=True):
    """The processes that evaluate managed rules, and how many requests may wait for them."""

    processes: Annotated[int, Integer(1, 64)] = 1
    queue: Annotated[int, Integer(1, 100_000)] = 256


def check_names(key: str, named: Sequence[RuleConfig | RateLimitConfig]) -> Findings:
    """Find names that two rules, or two rate limits, of one array have."""
    first: dict[str, int] = {}
    for index, one in enumerate(named):
        if one.name in first:
            yield (key, index, "name"), f"{key}[{first[one.name]}] already has the name {quoted(one.name)}"
        first.setdefault(one.name, index)


def find_unknown_lists(entries: Sequence[str], lists: Mapping[str, object]) -> Findings:
    """Find entries ``@NAME`` of lists that do not exist."""
    for index, entry in enumerate(entries):
        if entry.startswith("@") and entry[1:] not in lists:
            near = difflib.get_close_matches(entry[1:101], lists, n=1)
            hint = f'did you mean "@{near[0]}"?' if near else "define it in [lists] at the top of the file"
            yield (index,), f"there is no list {quoted(entry[1:])}; {hint}"
