"""Lists of addresses and words, with lookups in a microsecond whatever their length. Changed files are reloaded."""

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
"""Bytes of a list's file: two million IPv6 networks. A larger file is probably a mistake."""

MAX_REPORTED = 20
"""Wrong entries of one list that are reported one by one. A file of another kind would fill the terminal."""

MAX_ENTRY = 1024
"""Characters of an entry."""

# Entries that look like a mistyped network: four numbers, or something with a colon and a prefix length.
_LIKE_NETWORK = re.compile(r"[0-9]+(?:\.[0-9]+){3}(?:/.*)?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*/.*")
_COMMENT = re.compile(r"(?:^|\s)#.*")
_PREFIX = re.compile(r"[0-9]{1,3}")
_MAPPED = 0xFFFF
# The ranges of one family: their first and last addresses, sorted. No two ranges touch.
_Ranges = tuple[list[int], list[int]]
# From stat: modification time, size and inode. New content changes at least one of them.
_Signature = tuple[int, int, int]


class AddressSet:
    """An immutable set of IPv4 and IPv6 networks for ``ip in addresses``, where `ip` is text.

    An IPv4-mapped IPv6 address counts as the IPv4 address. Text that is not an address is in no set. A lookup takes
    1 us with 100 000 networks, by a binary search in sorted ranges (`Networks` compares with each). Raises ValueError
    for an invalid network.
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
        """Return the number of ranges, after joining networks that overlap or touch."""
        return len(self._v4[0]) + len(self._v6[0])

    @property
    def fingerprint(self) -> int:
        """A number that is the same in this process as long as the set contains the same addresses."""
        return hash(tuple(map(tuple, (*self._v4, *self._v6))))


@dataclass(frozen=True, slots=True)
class _Content:
    addresses: AddressSet
    words: frozenset[str]
    count: int


class NamedList:
    """A named list, for ``value in named``. A network contains its addresses; any other entry only itself.

    The content changes when the file does, and every user of the object sees the new content at once.
    """

    __slots__ = ("_content", "_signature", "file", "name", "networks_only")

    def __init__(self, name: str, source: str | Sequence[str]) -> None:
        self.name = name
        self.file = Path(source) if isinstance(source, str) else None
        self.networks_only = False
        self._signature: _Signature | None = None
        self._content = _Content(AddressSet(), frozenset(), 0)
        if isinstance(source, str):
            self.refresh()
        else:
            self._content = _parse_entries(enumerate(source), networks_only=False)

    def __contains__(self, value: object) -> bool:
        content = self._content
        return value in content.words or value in content.addresses

    @property
    def count(self) -> int:
        """The number of entries, as written."""
        return self._content.count

    @property
    def fingerprint(self) -> int:
        """A number that is the same in this process as long as the list contains the same."""
        content = self._content
        return hash((content.addresses.fingerprint, content.words))

    def require_networks(self) -> None:
        """Accept only networks from now on. Raises ConfigurationError if the list already has another entry."""
        if words := self._content.words:
            word = quoted(min(words))
            raise ConfigurationError(f"lists.{self.name}: {word} is not a network, and the list is used for addresses")
        self.networks_only = True

    def refresh(self) -> bool:
        """Read the file if it has changed, and return whether it was read.

        If the file is invalid, raise ConfigurationError, once for each version of the file, and keep the old content.
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
        # Taken before reading: if the file is written meanwhile, the next call sees another signature and reads again.
        self._signature = signature
        if data is None:
            raise ConfigurationError(f"{self.file}: the file has more than {MAX_FILE >> 20} MiB")
        self._content = _parse_entries(_read_entries(self.file, data), networks_only=self.networks_only)
        return True


_UNREADABLE: _Signature = (-1, -1, -1)


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """The names of the lists that were read again, and the errors of those that could not be."""

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
        """The names, in the order of the configuration."""
        return tuple(self._lists)

    def refresh(self) -> RefreshResult:
        """Read the files that have changed. Takes 2 us per file (``stat``), and 0.1 s for 100 000 new networks.

        A list whose new content is invalid keeps the old content, and each error is returned once. May be called from
        another thread.
        """
        read, errors = [], []
        for named in self._lists.values():
            try:
                if named.refresh():
                    read.append(named.name)
            except ConfigurationError as error:
                errors.append(f"list {named.name} is unchanged: {error}")
        return RefreshResult(tuple(read), tuple(errors))


class AddressLists:
    """The allowed and blocked addresses of all sites, or of one site.

    `allow` and `block` are entries of the configuration: networks, or ``@NAME`` for a list in `lists`. Raises
    ConfigurationError for a list that holds anything but networks.
    """

    __slots__ = ("_allow", "_block")

    def __init__(self, allow: Sequence[str], block: Sequence[str], lists: NamedLists) -> None:
        self._allow = _resolve(allow, lists)
        self._block = _resolve(block, lists)

    def check(self, ip: str) -> Reason | None:
        """Return why `ip` may not connect, or None. An address that is both allowed and blocked is blocked.

        A client on a Unix socket has the address "", which is in no list: if `allow` has entries, it is refused.
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
    """Yield each entry of a file with its place, without comments and empty lines."""
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
    """Parse entries, each with its place: a line of a file, or an index. Raises InvalidConfiguration."""
    networks, words = [], []
    problems: list[Problem] = []
    for place, entry in entries:
        try:
            _parse_network(entry)
        except ValueError as error:
            if networks_only or _LIKE_NETWORK.fullmatch(entry):
                problems.append(_problem_at(place, str(error)))
            elif not entry.isprintable() or len(entry) > MAX_ENTRY:
                reason = f"an entry may have at most {MAX_ENTRY} characters, all of them printable"
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
    return _Content(AddressSet(networks), frozenset(words), len(networks) + len(words))


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
    """Return the family of an address, and the address as a number. Raises ValueError.

    ``ipaddress`` would take 2 us instead of 0.4, for each request and for each line of a list.
    """
    try:
        if ":" not in ip:
            return 4, int.from_bytes(socket.inet_pton(socket.AF_INET, ip))
        number = int.from_bytes(socket.inet_pton(socket.AF_INET6, ip))
    except OSError:
        raise ValueError(ip) from None
    return (4, number & 0xFFFFFFFF) if number >> 32 == _MAPPED else (6, number)


def _parse_network(network: str) -> tuple[int, int, int]:
    """Return the family of a network and its first and last address. Raises ValueError, which says what is wrong."""
    address, slash, length = network.partition("/")
    try:
        family, number = _parse_address(address)
        if not slash:
            return family, number, number
        if not _PREFIX.fullmatch(length):
            raise ValueError
        prefix = int(length) - (96 if family == 4 and ":" in address else 0)
        hosts = (1 << ((32 if family == 4 else 128) - prefix)) - 1  # ValueError if the prefix is too long
        if prefix < 0 or number & hosts:
            raise ValueError
    except ValueError:
        (found,) = Networks.parse([network])  # raises with a full message
        return found.version, int(found.network_address), int(found.broadcast_address)
    return family, number, number | hosts
