"""The certificates of all sites: each pair and client policy is read once, and contexts are created on first use.

A store belongs to one configuration. A reload creates the next store, which takes over what has not changed in the
files. A store is filled in any thread, and then used on the loop that serves tunnels.
"""

import heapq
import ssl
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar
from weakref import WeakValueDictionary

from tlstunnel.certificates.clients import ClientFiles, ClientPolicy, check_client, read_policy
from tlstunnel.certificates.contexts import ServerContext, make_context
from tlstunnel.certificates.pairs import Pair, PairFiles, read_pair
from tlstunnel.errors import CertificateError
from tlstunnel.metrics.families import MOST_CERTIFICATES

MAX_UNUSED = 1000
"""Contexts that are kept although they may be unused: 25 KiB each (measured, P-256 with one intermediate)."""

CONTEXT_LIFETIME = 86_400.0
"""Seconds for which a context serves new TLS handshakes, and so the lifetime of its ticket keys. With a stolen key, the
resumed sessions of one day at most can be read. RFC 9325 section 3.4 asks for new keys at least once a week."""

RETRY_SECONDS = 60.0
"""Seconds after which something that failed is tried again, even if no file has changed."""

UNSETTLED_NS = 50_000_000
"""Nanoseconds. A file that has just changed may change again within one tick of the kernel's clock, and its time would
not show that."""

Stamp = tuple[tuple[int, int, int, int] | None, ...]
"""For each file, what distinguishes it from a replacement; None for a file that does not exist."""

# The shapes of pairs that OpenSSL has accepted in this process. It accepts other pairs of the same shape too. Trying
# takes a millisecond, which for ten thousand pairs would add more time than everything else takes.
_accepted_shapes: set[tuple[str, ...]] = set()


class SourceValue(Protocol):
    """The value that a `Source` reads from its files."""

    @property
    def digest(self) -> bytes:
        """A digest of everything that affects TLS handshakes."""

    def find_warning(self, now: datetime) -> str | None:
        """Return what needs attention soon, None if nothing does."""

    def find_objection(self, present: Self, now: datetime) -> str | None:
        """Return why it must not replace `present`, None if it may."""

    def describe_renewal(self, now: datetime) -> str:
        """Return a text for the log about the replacement."""


V = TypeVar("V", bound=SourceValue)


@dataclass(frozen=True, slots=True)
class FileChange(Generic[V]):
    """Files that have changed since they were read: the new value, or the error for which it cannot be served."""

    source: "Source[V]"
    stamp: Stamp | None
    value: V | None
    error: str


class Source(ABC, Generic[V]):
    """Files, and the last valid value that was read from them.

    `check` may run in any thread; everything that changes the source runs on the loop.
    """

    __slots__ = ("_failing", "_refused", "_retry_at", "_stamp", "complaint", "paths", "users", "value")

    def __init__(self, paths: tuple[Path, ...], before: "Source[V] | None") -> None:
        """Read the files, or take over the value of `before` if they have not changed or are now invalid.

        Raises CertificateError if there is no valid value.
        """
        self.paths = paths
        self.users: list[ServerCredentials] = []
        self.complaint = ""
        self._failing = False
        self._refused: Stamp | None = None
        self._retry_at = 0.0
        if before is None:
            stamp, settled = self._read_stamp()
            self.value = self.read()
            self._stamp = stamp if settled else None
            return
        # In this order: `apply`, on the loop, changes the value first, and a new stamp with an old value would persist.
        self._stamp = before._stamp
        self.value = before.value
        change = self.check()
        if change is None:
            return
        if change.value is not None:
            self.value, self._stamp = change.value, change.stamp
        else:
            self.complaint = change.error
            self._refuse(change.stamp)

    @abstractmethod
    def read(self) -> V:
        """Read the files. Raises CertificateError."""

    def check(self) -> FileChange[V] | None:
        """Read the files if they have changed, or if they were refused a minute ago: they may be valid by now."""
        stamp, settled = self._read_stamp()
        if stamp == self._stamp or (stamp == self._refused and time.monotonic() < self._retry_at):
            return None
        try:
            value = self.read()
        except CertificateError as error:
            return FileChange(self, stamp, None, str(error))
        if objection := value.find_objection(self.value, datetime.now(UTC)):
            return FileChange(self, stamp, None, objection)
        return FileChange(self, stamp if settled else None, value, "")

    def apply(self, change: FileChange[V]) -> tuple[bool, str]:
        """Apply a change. Return whether there is a new value, and a complaint for the log or "".

        An error becomes a complaint when it is found for the second time, because the two files of a pair are not
        replaced at once.
        """
        if change.value is None:
            if change.stamp == self._refused:
                self._refuse(change.stamp)
                return False, ""
            repeated, self._failing = self._failing, True
            if repeated:
                self._refuse(change.stamp)
            return False, change.error if repeated else ""
        changed = change.value.digest != self.value.digest
        self.value = change.value
        self._stamp = change.stamp
        self._failing, self._refused = False, None
        return changed, ""

    def _refuse(self, stamp: Stamp | None) -> None:
        self._failing, self._refused, self._retry_at = False, stamp, time.monotonic() + RETRY_SECONDS

    def _read_stamp(self) -> tuple[Stamp, bool]:
        """Return the present stamp, and whether any later change of the files will change it."""
        stamp = tuple(map(_stamp, self.paths))
        newest = max((times[2] for times in stamp if times), default=0)
        return stamp, not 0 <= time.time_ns() - newest < UNSETTLED_NS


class PairSource(Source[Pair]):
    """The files of a pair."""

    __slots__ = ("files",)

    def __init__(self, files: PairFiles, before: "PairSource | None" = None) -> None:
        self.files = files
        super().__init__(files.paths, before)

    def read(self) -> Pair:
        """Read the pair. Raises CertificateError, also if only OpenSSL refuses it."""
        pair = read_pair(self.files)
        if pair.shape not in _accepted_shapes:
            make_context((pair,))
            _accepted_shapes.add(pair.shape)
        return pair


class ClientSource(Source[ClientPolicy]):
    """The files of a client policy."""

    __slots__ = ("files",)

    def __init__(self, files: ClientFiles, before: "ClientSource | None" = None) -> None:
        self.files = files
        super().__init__(files.paths, before)

    def read(self) -> ClientPolicy:
        """Read authorities and lists. Raises CertificateError, also if only OpenSSL refuses them."""
        policy = read_policy(self.files)
        make_context((), policy)
        return policy


class ServerContexts:
    """Contexts by the digest of their content: those in use, and the `most` used last."""

    def __init__(self, most: int = MAX_UNUSED, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._kept: OrderedDict[bytes, ServerContext] = OrderedDict()
        # Tunnels keep their context alive. Without this, a site with open tunnels could get a second context.
        self._alive: WeakValueDictionary[bytes, ServerContext] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, served: "ServerCredentials") -> ServerContext:
        """Return the context for `served`, a new one (1 ms) if there is none or it is older than a day.

        Raises CertificateError for lack of resources; the files themselves have been verified.
        """
        digest = served.digest
        now = self._clock()
        context = self._kept.get(digest) or self._alive.get(digest)
        if context is None or context.until <= now:
            context = self._make(served, now, context)
            self._alive[digest] = context
        self._kept[digest] = context
        self._kept.move_to_end(digest)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return context

    def retain(self, digests: AbstractSet[bytes]) -> None:
        """Discard all other contexts; the sessions in them can no longer be resumed."""
        for digest in [digest for digest in self._kept if digest not in digests]:
            del self._kept[digest]
        for digest in [digest for digest in self._alive if digest not in digests]:
            self._alive.pop(digest, None)

    def forget(self, digest: bytes) -> None:
        """Discard the context of this digest."""
        self._kept.pop(digest, None)
        self._alive.pop(digest, None)

    def _make(self, served: "ServerCredentials", now: float, old: ServerContext | None) -> ServerContext:
        try:
            context = make_context(served.pairs, served.clients)
        except CertificateError:
            if old is None:
                raise
            old.until = now + RETRY_SECONDS
            return old
        context.until = now + CONTEXT_LIFETIME
        return context


class ServerCredentials:
    """The certificates and client policy of sites that have the same files, as last read."""

    __slots__ = ("_client_source", "_contexts", "_pair_sources", "clients", "digest", "pairs")

    def __init__(self, contexts: ServerContexts, pairs: Sequence[PairSource], clients: ClientSource | None) -> None:
        self._contexts = contexts
        self._pair_sources = tuple(pairs)
        self._client_source = clients
        self.pairs: tuple[Pair, ...] = ()
        self.clients: ClientPolicy | None = None
        self.digest = b""
        self.refresh()

    def refresh(self) -> None:
        """Use the present values of its sources."""
        self.pairs = tuple(source.value for source in self._pair_sources)
        self.clients = self._client_source.value if self._client_source is not None else None
        parts = [pair.digest for pair in self.pairs] + ([self.clients.digest] if self.clients is not None else [])
        # Unambiguous: every part has 32 bytes, and the presence of a client policy is marked.
        self.digest = sha256(b"".join(parts) + (b"clients" if self.clients is not None else b"")).digest()

    def context(self) -> ssl.SSLContext:
        """Return the context for a new TLS handshake. Raises CertificateError if it cannot be created."""
        return self._contexts.get(self)

    def check_client(self, certificate: bytes | None) -> str:
        """Return the subject of the client's certificate, "" if it has none. Raises ClientRefused."""
        return check_client(certificate, self.clients)


class Certificates:
    """The certificates and client policies of all sites of one configuration."""

    def __init__(self, contexts: ServerContexts | None = None) -> None:
        self.contexts = contexts if contexts is not None else ServerContexts()
        self._pairs: dict[PairFiles, PairSource] = {}
        self._clients: dict[ClientFiles, ClientSource] = {}
        self._served: dict[tuple[tuple[PairFiles, ...], ClientFiles | None], ServerCredentials] = {}
        self._first_expiries: list[tuple[str, int]] | None = None

    def serve(
        self, pairs: tuple[PairFiles, ...], clients: ClientFiles | None = None, before: "Certificates | None" = None
    ) -> ServerCredentials:
        """Return the credentials of a site, read from files unless they are known here or in the store `before`.

        If the files of a pair are invalid now, the value in `before` stays in use. Raises CertificateError.
        """
        key = (pairs, clients)
        if (known := self._served.get(key)) is not None:
            return known
        pair_sources = [self.read_pair(files, before) for files in pairs]
        self._refuse_duplicates(pair_sources)
        client_source = self.read_clients(clients, before) if clients is not None else None
        served = self._served[key] = ServerCredentials(self.contexts, pair_sources, client_source)
        for source in (*pair_sources, *([client_source] if client_source is not None else ())):
            source.users.append(served)
        return served

    def sources(self) -> Iterator[Source[Any]]:
        """Iterate over everything that is read from files."""
        yield from self._pairs.values()
        yield from self._clients.values()

    def pairs(self) -> Iterator[Pair]:
        """Iterate over all pairs as they are served now."""
        for source in self._pairs.values():
            yield source.value

    def find_first_expiries(self) -> Sequence[tuple[str, int]]:
        """Return the files of the pairs that expire first, at most `MOST_CERTIFICATES`, and when, in Unix time.

        They are found again only after a renewal: ten thousand pairs take some milliseconds.
        """
        if self._first_expiries is None:
            first = heapq.nsmallest(MOST_CERTIFICATES, self.pairs(), key=lambda pair: pair.validity.end)
            self._first_expiries = [(str(pair.cert), int(pair.validity.end.timestamp())) for pair in first]
        return self._first_expiries

    def warnings(self, now: datetime) -> list[str]:
        """Return what needs attention soon, one line each."""
        return [warning for source in self.sources() if (warning := source.value.find_warning(now))]

    def complaints(self) -> list[str]:
        """Return the errors of files for which the value of the previous store is still used, one line each."""
        return [source.complaint for source in self.sources() if source.complaint]

    def activate(self) -> None:
        """Discard the contexts of previous stores. To be called when this store comes into use."""
        self.contexts.retain({served.digest for served in self._served.values()})

    def apply_renewal(self, source: Source[Any]) -> None:
        """Serve the new value of `source`, with new contexts and new ticket keys."""
        self._first_expiries = None
        for served in source.users:
            self.contexts.forget(served.digest)
            served.refresh()

    def read_pair(self, files: PairFiles, before: "Certificates | None" = None) -> PairSource:
        """Read a pair, unless it is known, here or in the store `before`. Raises CertificateError."""
        source = self._pairs.get(files)
        if source is None:
            source = self._pairs[files] = PairSource(files, before._pairs.get(files) if before else None)
        return source

    def read_clients(self, files: ClientFiles, before: "Certificates | None" = None) -> ClientSource:
        """Read a client policy, unless it is known, here or in the store `before`. Raises CertificateError."""
        source = self._clients.get(files)
        if source is None:
            source = self._clients[files] = ClientSource(files, before._clients.get(files) if before else None)
        return source

    def _refuse_duplicates(self, sources: Sequence[PairSource]) -> None:
        """Refuse two pairs with the same type of key: OpenSSL would silently use the last one."""
        kinds: dict[str, Pair] = {}
        for source in sources:
            first = kinds.setdefault(source.value.kind, source.value)
            if first is not source.value:
                raise CertificateError(
                    f"{source.value.cert}: a second certificate with an {source.value.kind} key, besides {first.cert}; "
                    "a site can have one for each type of key"
                )


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # ctime cannot be set back, and also shows a change of mode.
    return found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns
