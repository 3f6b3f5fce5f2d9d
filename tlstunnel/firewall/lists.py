"""Lists of addresses and of words: asked in a microsecond however long they are, read again when their file changes."""

import re
import socket
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tlstunnel.addresses import Networks, quoted
from tlstunnel.config.problems import InvalidConfiguration, Problem, Problems
from tlstunnel.errors import ConfigurationError
from tlstunnel.journal.events import Reason

MAX_FILE = 64 << 20
"""Bytes of a list's file: two million IPv6 networks. A larger one is a slip."""

MAX_REPORTED = 20
"""Wrong entries of one list that are reported one by one: a file of another kind would fill the terminal."""

MAX_ENTRY = 1024
"""Characters of an entry."""

# What somebody meant as an address: four numbers, or something with a colon and a prefix length.
_LIKE_NETWORK = re.compile(r"[0-9]+(?:\.[0-9]+){3}(?:/.*)?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*/.*")
_COMMENT = re.compile(r"(?:^|\s)#.*")
_PREFIX = re.compile(r"[0-9]{1,3}")
_MAPPED = 0xFFFF
# The ranges of one family: their first and their last addresses, sorted, none touching another.
_Ranges = tuple[list[int], list[int]]
# What stat says of a file: another content is another of these.
_Signature = tuple[int, int, int]


class AddressSet:
    """A set of IPv4 and IPv6 networks that answers ``ip in addresses``, for an `ip` as text. It never changes.

    An IPv4-mapped IPv6 address is taken for the IPv4 one; what is no address is not in it. Asking costs 1 us with
    100 000 networks: a binary search in sorted ranges (`Networks` looks at each). Raises ValueError for what is no
    network.
    """

    __slots__ = ("_v4", "_v6")

    def __init__(self, networks: Iterable[str] = ()) -> None:
        ranges: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        for network in networks:
            family, first, last = _parse_network(network)
            ranges[family].append((first, last))
        self._v4 = _merge(ranges[4])
        self._v6 = _merge(ranges[6])

    def __contains__(self, ip: object) -> bool:
        if not isinstance(ip, str):
            return False
        try:
            family, number = _parse_address(ip)
        except ValueError:
            return False
        firsts, lasts = self._v4 if family == 4 else self._v6
        index = bisect_right(firsts, number) - 1
        return index >= 0 and number <= lasts[index]

    def __len__(self) -> int:
        """How many ranges are left of the networks once those that touch are one."""
        return len(self._v4[0]) + len(self._v6[0])


@dataclass(frozen=True, slots=True)
class _Content:
    addresses: AddressSet
    words: frozenset[str]


class NamedList:
    """A list, asked by ``value in named``: an entry that is a network stands for its addresses, another for itself.

    Its content changes when its file does; whoever holds the list sees that at once.
    """

    __slots__ = ("_content", "_signature", "file", "name", "networks_only")

    def __init__(self, name: str, source: str | Sequence[str]) -> None:
        self.name = name
        self.file = Path(source) if isinstance(source, str) else None
        self.networks_only = False
        self._signature: _Signature | None = None
        self._content = _Content(AddressSet(), frozenset())
        if isinstance(source, str):
            self.refresh()
        else:
            self._content = _parse_entries(enumerate(source), networks_only=False)

    def __contains__(self, value: object) -> bool:
        content = self._content
        return value in content.words or value in content.addresses

    def require_networks(self) -> None:
        """Hold the list to networks from now on. Raises ConfigurationError if it has another entry already."""
        if words := self._content.words:
            word = quoted(min(words))
            raise ConfigurationError(f"lists.{self.name}: {word} is not a network, and the list is used for addresses")
        self.networks_only = True

    def refresh(self) -> bool:
        """Read the file if it is not what it was, and say whether it was read.

        Raises ConfigurationError, once for each state of the file, and keeps what it had.
        """
        if self.file is None:
            return False
        try:
            found = self.file.stat()
            signature = (found.st_mtime_ns, found.st_size, found.st_ino)
            if signature == self._signature:
                return False
            data = self.file.read_bytes() if found.st_size <= MAX_FILE else None
        except OSError as error:
            if self._signature == _UNREADABLE:
                return False
            self._signature = _UNREADABLE
            raise ConfigurationError(f"{self.file}: cannot be read: {error.strerror}") from None
        # Taken before the reading: what is written meanwhile gives another one, and is read at the next call.
        self._signature = signature
        if data is None:
            raise ConfigurationError(f"{self.file}: the file has more than {MAX_FILE >> 20} MiB")
        self._content = _parse_entries(_read_entries(self.file, data), networks_only=self.networks_only)
        return True


_UNREADABLE: _Signature = (-1, -1, -1)


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """Names of the lists that were read again, and what is wrong with those that could not be."""

    lists: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()


class NamedLists:
    """All lists of a configuration, by name. Raises InvalidConfiguration with every problem."""

    def __init__(self, sources: Mapping[str, str | Sequence[str]] | None = None) -> None:
        self._lists: dict[str, NamedList] = {}
        problems = Problems()
        for name, source in (sources or {}).items():
            with problems.collect("lists", name):
                self._lists[name] = NamedList(name, source)
        problems.raise_found()

    def __getitem__(self, name: str) -> NamedList:
        return self._lists[name]

    def __contains__(self, name: object) -> bool:
        return name in self._lists

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the file."""
        return tuple(self._lists)

    def refresh(self) -> RefreshResult:
        """Read again what has changed. Costs a ``stat`` a file (2 us), and 0.1 s for 100 000 new networks.

        A list whose new content is wrong keeps the old one; each error is told once. It may be called from a thread.
        """
        read, errors = [], []
        for named in self._lists.values():
            try:
                if named.refresh():
                    read.append(named.name)
            except ConfigurationError as error:
                errors.append(f"list {named.name} stays as it was: {error}")
        return RefreshResult(tuple(read), tuple(errors))


class AddressLists:
    """The address lists of all sites, or of one: who may come, and who may not.

    `allow` and `block` are entries of the configuration: networks, and ``@NAME`` of a list in `lists`. Raises
    ConfigurationError for a list with anything but networks.
    """

    __slots__ = ("_allow", "_block")

    def __init__(self, allow: Sequence[str], block: Sequence[str], lists: NamedLists) -> None:
        self._allow = _resolve(allow, lists)
        self._block = _resolve(block, lists)

    def check(self, ip: str) -> Reason | None:
        """Return why `ip` may not connect, or None. An address that is both blocked and allowed is blocked.

        "", the address of a client of a Unix socket, is in no list: where only some are allowed, it is not.
        """
        if any(ip in members for members in self._block):
            return Reason.ADDRESS_BLOCKED
        if self._allow and not any(ip in members for members in self._allow):
            return Reason.ADDRESS_NOT_ALLOWED
        return None


def _resolve(entries: Sequence[str], lists: NamedLists) -> tuple[AddressSet | NamedList, ...]:
    named = [lists[entry[1:]] for entry in entries if entry.startswith("@")]
    for one in named:
        one.require_networks()
    networks = [entry for entry in entries if not entry.startswith("@")]
    return (*([AddressSet(networks)] if networks else []), *named)


def _read_entries(file: Path, data: bytes) -> Iterable[tuple[str | int, str]]:
    """Give the entries of a file with their places, without comments and empty lines."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = data.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(f"{file}:{bad}: the file is not UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        entry = (_COMMENT.sub("", line) if "#" in line else line).strip()
        if entry:
            yield f"{file}:{number}", entry


def _parse_entries(entries: Iterable[tuple[str | int, str]], *, networks_only: bool) -> _Content:
    """Read entries, each with its place: a file's line, or an index. Raises InvalidConfiguration."""
    networks, words = [], []
    problems: list[Problem] = []
    for place, entry in entries:
        try:
            _parse_network(entry)
        except ValueError as error:
            if networks_only or _LIKE_NETWORK.fullmatch(entry):
                problems.append(_problem_at(place, str(error)))
            elif not entry.isprintable() or len(entry) > MAX_ENTRY:
                reason = f"an entry has at most {MAX_ENTRY} characters, all printable"
                problems.append(_problem_at(place, f"{quoted(entry)}: {reason}"))
            else:
                words.append(entry)
        else:
            networks.append(entry)
    if len(problems) > MAX_REPORTED:
        more = len(problems) - MAX_REPORTED
        problems[MAX_REPORTED:] = [Problem((), f"{more} more entries are wrong")]
    if problems:
        raise InvalidConfiguration(*problems)
    return _Content(AddressSet(networks), frozenset(words))


def _problem_at(place: str | int, reason: str) -> Problem:
    return Problem((place,), reason) if isinstance(place, int) else Problem((), f"{place}: {reason}")


def _merge(ranges: list[tuple[int, int]]) -> _Ranges:
    """Sort ranges and join those that overlap or touch."""
    firsts: list[int] = []
    lasts: list[int] = []
    for first, last in sorted(ranges):
        if lasts and first <= lasts[-1] + 1:
            lasts[-1] = max(lasts[-1], last)
        else:
            firsts.append(first)
            lasts.append(last)
    return firsts, lasts


def _parse_address(ip: str) -> tuple[int, int]:
    """Give the family of an address, and the address as a number. Raises ValueError.

    Not with ``ipaddress``: this takes 0.4 us instead of 2, for each request and for each line of a list.
    """
    try:
        if ":" not in ip:
            return 4, int.from_bytes(socket.inet_pton(socket.AF_INET, ip))
        number = int.from_bytes(socket.inet_pton(socket.AF_INET6, ip))
    except OSError:
        raise ValueError(ip) from None
    return (4, number & 0xFFFFFFFF) if number >> 32 == _MAPPED else (6, number)


def _parse_network(network: str) -> tuple[int, int, int]:
    """Give the family of a network, its first and its last address. Raises ValueError with a sentence."""
    address, slash, length = network.partition("/")
    try:
        family, number = _parse_address(address)
        if not slash:
            return family, number, number
        if not _PREFIX.fullmatch(length):
            raise ValueError
        prefix = int(length) - (96 if family == 4 and ":" in address else 0)
        hosts = (1 << ((32 if family == 4 else 128) - prefix)) - 1  # ValueError where it is too long
        if prefix < 0 or number & hosts:
            raise ValueError
    except ValueError:
        (found,) = Networks.parse([network])  # it says what is wrong
        return found.version, int(found.network_address), int(found.broadcast_address)
    return family, number, number | hosts
