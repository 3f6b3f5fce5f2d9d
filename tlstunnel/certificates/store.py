"""What the sites are served with: every pair and client policy once, and the contexts made of them on first use.

A store belongs to one configuration; a reload makes the next, which takes over what its files still hold. It is filled
off the loop that serves tunnels, and used on it.
"""

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

MAX_UNUSED = 1000
"""ServerContexts kept that nobody may be using: 25 KiB each (measured, P-256 with one certificate behind the leaf)."""

CONTEXT_LIFETIME = 86_400.0
"""Seconds that a context serves new TLS handshakes, and so the life of the keys of its tickets: whoever finds them
reads a day's resumed sessions at most. RFC 9325 section 3.4 asks for a change in a week at least."""

RETRY_SECONDS = 60.0
"""Seconds until what failed is tried again though nothing seems to have changed."""

UNSETTLED_NS = 50_000_000
"""Nanoseconds. A file that changed so shortly ago may change again within one tick of the kernel's clock, and nobody
would see it by its time."""

Stamp = tuple[tuple[int, int, int, int] | None, ...]
"""What tells a file from another one that was put in its place, for each file; None where there is none."""

# The shapes of pairs that OpenSSL has taken in this process. It takes or refuses others of that shape alike, at a
# millisecond each: for ten thousand that is two seconds more than all else.
_accepted_shapes: set[tuple[str, ...]] = set()


class SourceValue(Protocol):
    """What files are read into."""

    @property
    def digest(self) -> bytes:
        """Of everything that counts."""

    def find_warning(self, now: datetime) -> str | None:
        """What somebody ought to do about it soon."""

    def find_objection(self, present: Self, now: datetime) -> str | None:
        """Why it must not replace `present`."""

    def describe_renewal(self, now: datetime) -> str:
        """What to say when it has replaced another."""


V = TypeVar("V", bound=SourceValue)


@dataclass(frozen=True, slots=True)
class FileChange(Generic[V]):
    """Files that are not those that were read last: what they hold, or why that cannot be served."""

    source: "Source[V]"
    stamp: Stamp | None
    value: V | None
    error: str


class Source(ABC, Generic[V]):
    """Files, and what they held when they were read last and were good.

    `seen` may run in any thread; what changes the source runs in the loop's.
    """

    __slots__ = ("_failing", "_refused", "_retry_at", "_stamp", "complaint", "paths", "users", "value")

    def __init__(self, paths: tuple[Path, ...], before: "Source[V] | None") -> None:
        """Read, or take over from `before` what is still so, or what is better than the files as they are now.

        Raises CertificateError when there is nothing to go on with.
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
        # In this order: `take`, in the loop, changes the value first, and a new stamp with an old value would stay.
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
        """Look at the files, and read them if they are new, or were refused a minute ago: time may have mended them."""
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
        """Take what was seen: whether the value is another one now, and what there is to complain of.

        What is wrong is complained of when it is seen for the second time: of a certificate and its key, one is
        replaced first.
        """
        if change.value is None:
            if change.stamp == self._refused:
                self._refuse(change.stamp)
                return False, ""
            told, self._failing = self._failing, True
            if told:
                self._refuse(change.stamp)
            return False, change.error if told else ""
        changed = change.value.digest != self.value.digest
        self.value = change.value
        self._stamp = change.stamp
        self._failing, self._refused = False, None
        return changed, ""

    def _refuse(self, stamp: Stamp | None) -> None:
        self._failing, self._refused, self._retry_at = False, stamp, time.monotonic() + RETRY_SECONDS

    def _read_stamp(self) -> tuple[Stamp, bool]:
        """Give the stamp of what is there now, and whether any later change will show in it."""
        stamp = tuple(map(_stamp, self.paths))
        newest = max((times[2] for times in stamp if times), default=0)
        return stamp, not 0 <= time.time_ns() - newest < UNSETTLED_NS


class PairSource(Source[Pair]):
    """A pair's files."""

    __slots__ = ("files",)

    def __init__(self, files: PairFiles, before: "PairSource | None" = None) -> None:
        self.files = files
        super().__init__(files.paths, before)

    def read(self) -> Pair:
        """Read the pair. Raises CertificateError, also for what only OpenSSL finds fault with."""
        pair = read_pair(self.files)
        if pair.shape not in _accepted_shapes:
            make_context((pair,))
            _accepted_shapes.add(pair.shape)
        return pair


class ClientSource(Source[ClientPolicy]):
    """The files of what is asked of clients."""

    __slots__ = ("files",)

    def __init__(self, files: ClientFiles, before: "ClientSource | None" = None) -> None:
        self.files = files
        super().__init__(files.paths, before)

    def read(self) -> ClientPolicy:
        """Read authorities and lists. Raises CertificateError, also for what only OpenSSL finds fault with."""
        policy = read_policy(self.files)
        make_context((), policy)
        return policy


class ServerContexts:
    """Contexts by the digest of what they are made of: those in use, and the `most` used last."""

    def __init__(self, most: int = MAX_UNUSED, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._kept: OrderedDict[bytes, ServerContext] = OrderedDict()
        # A tunnel holds its context; a site whose tunnels are many must not get another one for each.
        self._alive: WeakValueDictionary[bytes, ServerContext] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, served: "ServerCredentials") -> ServerContext:
        """The context for `served`; it is made where there is none (1 ms), or where it is older than a day.

        Raises CertificateError, which is no fault of the files: they have been read.
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
        """Forget all others, with the sessions that could be resumed in them."""
        for digest in [digest for digest in self._kept if digest not in digests]:
            del self._kept[digest]
        for digest in [digest for digest in self._alive if digest not in digests]:
            self._alive.pop(digest, None)

    def forget(self, digest: bytes) -> None:
        """Forget this one."""
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
    """What sites with the same files are served with, as these are now."""

    __slots__ = ("_client_source", "_contexts", "_pair_sources", "clients", "digest", "pairs")

    def __init__(self, contexts: ServerContexts, pairs: Sequence[PairSource], clients: ClientSource | None) -> None:
        self._contexts = contexts
        self._pair_sources = tuple(pairs)
        self._client_source = clients
        self.refresh()

    def refresh(self) -> None:
        """Take what its sources have now."""
        self.pairs = tuple(source.value for source in self._pair_sources)
        self.clients = self._client_source.value if self._client_source is not None else None
        parts = [pair.digest for pair in self.pairs] + ([self.clients.digest] if self.clients is not None else [])
        # As many parts as there are make another digest: all of them have 32 bytes, and clients are marked.
        self.digest = sha256(b"".join(parts) + (b"clients" if self.clients is not None else b"")).digest()

    def context(self) -> ssl.SSLContext:
        """The context for a TLS handshake that begins now. Raises CertificateError where it cannot be made."""
        return self._contexts.get(self)

    def check_client(self, tls: ssl.SSLSocket) -> str:
        """Give the subject of the client's certificate, "" without one; raises ClientRefused."""
        return check_client(tls, self.clients)


class Certificates:
    """All that the sites of one configuration are served with."""

    def __init__(self, contexts: ServerContexts | None = None) -> None:
        self.contexts = contexts if contexts is not None else ServerContexts()
        self._pairs: dict[PairFiles, PairSource] = {}
        self._clients: dict[ClientFiles, ClientSource] = {}
        self._served: dict[tuple[tuple[PairFiles, ...], ClientFiles | None], ServerCredentials] = {}

    def serve(
        self, pairs: tuple[PairFiles, ...], clients: ClientFiles | None = None, before: "Certificates | None" = None
    ) -> ServerCredentials:
        """Read what a site is served with, unless it is known, here or in the store `before`.

        A pair that `before` has and whose files are no good now goes on as it was. Raises CertificateError.
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
        """All that is read from files."""
        yield from self._pairs.values()
        yield from self._clients.values()

    def pairs(self) -> Iterator[Pair]:
        """All pairs as they are served now."""
        for source in self._pairs.values():
            yield source.value

    def warnings(self, now: datetime) -> list[str]:
        """What somebody ought to do something about soon: one line each."""
        return [warning for source in self.sources() if (warning := source.value.find_warning(now))]

    def complaints(self) -> list[str]:
        """What was wrong with files for which the store before had something better: one line each."""
        return [source.complaint for source in self.sources() if source.complaint]

    def activate(self) -> None:
        """Serve with this store from now on: contexts of what it does not have are forgotten."""
        self.contexts.retain({served.digest for served in self._served.values()})

    def apply_renewal(self, source: Source[Any]) -> None:
        """Serve with the new value of `source`. Its contexts are new, and so are the keys of their tickets."""
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
        """OpenSSL would take the last of each kind, and not say so."""
        kinds: dict[str, Pair] = {}
        for source in sources:
            first = kinds.setdefault(source.value.kind, source.value)
            if first is not source.value:
                raise CertificateError(
                    f"{source.value.cert}: a second certificate with an {source.value.kind} key, beside {first.cert}; "
                    "a site has one of each kind"
                )


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    # ctime, which nobody can set back, also tells of a change of mode.
    return found.st_ino, found.st_size, found.st_ctime_ns, found.st_mtime_ns
