"""TLS as a value that never sees a socket: ciphertext in, plaintext out, and the other way round.

# Theory of operation

OpenSSL reads and writes through a pair of memory BIOs. All streams of a thread share one `Pair`, because a pair of its
own would cost each connection the memory of its largest read. Sharing works because OpenSSL keeps a partial record in
the connection's own buffer, so it takes everything that it is given, or the stream takes the rest back. There is one
invariant:

    Between two operations both BIOs are empty. Every operation empties them before it returns or raises.

What an operation may leave behind, and whose it is (each seen with OpenSSL 3.0 and 3.5):

- The incoming BIO holds what came after the peer's close_notify or after a failure: nothing may follow these, so it is
  dropped. After the last message of the handshake it is the first application data: the stream keeps it in `surplus`.
- The outgoing BIO holds what the peer must get: a flight of the handshake, session tickets, an alert, the response to a
  KeyUpdate, the warning to a TLS 1.2 client that wants to renegotiate. Reads produce some of these too. They are added
  to `output`, which the owner sends before anything else.

A pair that is not empty when an operation begins is a bug, and a dangerous one: one connection's bytes would be read as
another's. The pair is emptied and `NotEmpty` is raised: the owner resets the connection and logs the error.

There is no ``await`` and no callback of ours between writing to a BIO and emptying it: contexts have no
``sni_callback`` and no key log. ``write_eof`` is never called, since it cannot be taken back. Whether the peer
truncated its stream is for the owner to decide, who sees the FIN.

# Floods

OpenSSL processes all records in the BIO before it returns, and some cost much and carry no data: a KeyUpdate that asks
for one in response takes 15 to 25 us, 27 bytes of a stream. So it gets at most PIECE bytes at once while the peer's
records are small, and the headers of the records, which are not encrypted, show how many there are. A peer that sends
too many without data fails with `Flood`.

In TLS 1.2 one record may hold thousands of messages that ask to renegotiate, each of which gets a warning. The type of
a record is not encrypted there, so a long one of the handshake's is not given to OpenSSL. In TLS 1.3 it is, and an
origin's record may hold 800 session tickets: 10 ms.
"""

import ssl
import threading
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from collections.abc import Callable

RECORD: Final = 16_384
"""Bytes of data in one record at most (RFC 8446 section 5.1)."""

SMALL: Final = 16_384
"""Bytes that are received at once while records are small."""

PIECE: Final = 4_096
"""Bytes of them that OpenSSL gets at once: 2 to 4 ms if all of them are KeyUpdates."""

LARGE: Final = 131_072
"""Bytes that are received at once while records are large."""

AVERAGE: Final = 1_024
"""Bytes of a record, on average, from which records are large."""

FREE: Final = 8
"""One record without data is free for so many with data."""

MAX_USELESS: Final = 128
"""Records without data, beyond the free ones, after which a connection fails: no more than a `PIECE` of KeyUpdates.

Go's crypto/tls fails after 16 in a row, BoringSSL after 32. No known client sends a KeyUpdate for less than gigabytes.
"""

MAX_RENEGOTIATION: Final = 1_024
"""Bytes of a record of the handshake's after the handshake, in TLS 1.2. It has one ClientHello or HelloRequest, or 250
empty ones, for which OpenSSL takes 1 ms."""

MAX_HANDSHAKE: Final = 262_144
"""Bytes of a peer's side of a handshake. Certificate chains, the longest part, have some 10 KiB."""

MAX_OUTPUT: Final = 16_384
"""Bytes of `TlsStream.output` after the handshake: responses to a peer that does not read them."""

_HEADER = 5  # RFC 8446 section 5.1
_HANDSHAKE, _APPLICATION_DATA = 22, 23


class Flood(ssl.SSLError):
    """The peer sends more records without data than any legitimate peer does."""

    reason = "TOO_MANY_RECORDS_WITHOUT_DATA"

    def __str__(self) -> str:
        return "too many records without data"


class NotEmpty(Exception):
    """The pair of BIOs held bytes of another connection. They have been dropped."""


class Pair:
    """The memory BIOs that all streams of a thread share."""

    __slots__ = ("incoming", "outgoing")

    def __init__(self) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()

    def check_empty(self) -> None:
        """Raise `NotEmpty` if an operation left something behind, and drop that."""
        if self.incoming.pending or self.outgoing.pending:
            self.empty()
            raise NotEmpty

    def empty(self) -> None:
        """Drop what is in it."""
        self.incoming.read()
        self.outgoing.read()


class _Local(threading.local):
    def __init__(self) -> None:
        self.pair = Pair()


_local = _Local()


class TlsStream:
    """One side of a TLS connection: a server's or, with `server_hostname`, a client's.

    `output` is what the peer must get before anything else; the owner sends it and empties it. `surplus` is what came
    after the handshake, for the first `receive`. `ended` is set by the peer's close_notify, `failure` by what makes the
    connection unusable; then only `output` may still be used, which may hold an alert. `changed` is set with each of
    them, for an owner who looks at them only then, and clears it. `limit` is how many bytes to receive at once. `pair`
    is the thread's unless it is given.
    """

    __slots__ = (
        "_aligned",
        "_fed",
        "_header",
        "_incoming",
        "_object",
        "_outgoing",
        "_pair",
        "_read",
        "_rest",
        "_useless",
        "_write",
        "changed",
        "ended",
        "failure",
        "limit",
        "output",
        "surplus",
    )

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
        pair: Pair | None = None,
    ) -> None:
        self._pair = pair = _local.pair if pair is None else pair
        self._incoming, self._outgoing = pair.incoming, pair.outgoing
        self._object = context.wrap_bio(
            pair.incoming,
            pair.outgoing,
            server_side=server_hostname is None,
            server_hostname=server_hostname,
            session=session,
        )
        # typeshed leaves out the form that reads into a buffer.
        self._read = cast("Callable[[int, memoryview], int]", self._object.read)
        self._write = self._object.write
        self._fed = 0  # bytes of the peer's handshake
        self._rest = 0  # bytes that the current record still lacks
        self._header = b""  # the received part of an incomplete record header
        self._aligned = True  # neither of them: the next byte begins a record
        self._useless = 0
        self.output = self.surplus = b""
        self.ended = self.changed = False
        self.failure: ssl.SSLError | None = None
        self.limit = SMALL

    def handshake(self, data: bytes | memoryview) -> bool:
        """Take the peer's next bytes (a client begins with b""); return whether the handshake is complete.

        Raises ssl.SSLError; Flood among them.
        """
        pair = self._pair
        pair.check_empty()
        self._fed += len(data)
        if self._fed > MAX_HANDSHAKE:
            raise Flood
        pair.incoming.write(data)
        complete = False
        try:
            self._object.do_handshake()
            complete = True
        except ssl.SSLWantReadError:
            pass
        finally:
            self.output += pair.outgoing.read()
            rest = pair.incoming.read()
        if complete:
            self.surplus = rest
        return complete

    def receive(self, data: memoryview, into: memoryview) -> int:
        """Decrypt `data`, at most LARGE bytes, into `into`; return how many bytes of plaintext there were.

        `into` needs room for `data` and one more record. 0 means that more bytes are needed, or that there is nothing
        more. `changed` is set if there is something to see in `output`, `ended` or `failure`.
        """
        incoming, outgoing = self._incoming, self._outgoing
        if incoming.pending or outgoing.pending:
            self._pair.check_empty()
        size = len(data)
        if (
            self._aligned
            and size > _HEADER
            and size == _HEADER + (data[3] << 8 | data[4])
            and data[0] == _APPLICATION_DATA
            and not self._useless
        ):
            # The hot path: one whole record.
            try:
                incoming.write(data)
                if (n := self._read(RECORD, into)) and not incoming.pending and not outgoing.pending:
                    self.limit = SMALL if size < AVERAGE else LARGE
                    return n
            except ssl.SSLError as error:
                return self._take_stock(0, 1, 0, error)
            except BaseException:
                self._pair.empty()  # it must not become another connection's
                raise
            return self._take_stock(n, 1, 1 if n else 0, None if n else ssl.SSLZeroReturnError())
        try:
            return self._receive_several(data, size, into)
        except Flood as error:
            self.failure, self.changed = error, True
            return 0
        except BaseException:
            self._pair.empty()
            raise

    def _receive_several(self, data: memoryview, size: int, into: memoryview) -> int:
        """Decrypt any number of records, or parts of them. Raises Flood before the data of this call is decrypted."""
        if size <= PIECE or self.limit == LARGE:
            before = self._rest, self._header
            records = self._count_records(data, size)
            self.limit = LARGE if size >= records * AVERAGE else SMALL
            if size <= PIECE or self.limit == LARGE:
                return self._feed(data, into, records)
            self._rest, self._header = before
        n = records = 0
        for begin in range(0, size, PIECE):
            piece = data[begin : begin + PIECE]
            found = self._count_records(piece, len(piece))
            records += found
            n += self._feed(piece, into[n:], found)
            if self.ended or self.failure is not None:
                return n
        self.limit = LARGE if size >= records * AVERAGE else SMALL
        return n

    def _feed(self, data: memoryview, into: memoryview, records: int) -> int:
        incoming, read = self._incoming, self._read
        incoming.write(data)
        n = found = 0
        try:
            while k := read(RECORD, into[n:]):
                n += k
                found += 1
                if not incoming.pending:
                    return self._take_stock(n, records, found, None)
        except ssl.SSLError as error:
            return self._take_stock(n, records, found, error)
        return self._take_stock(n, records, found, ssl.SSLZeroReturnError())

    def _take_stock(self, n: int, records: int, found: int, error: ssl.SSLError | None) -> int:
        """Empty the pair after a read of `n` bytes, from `found` of `records`, that ended with `error`; return `n`."""
        incoming, outgoing = self._incoming, self._outgoing
        if incoming.pending:
            incoming.read()
        if outgoing.pending:
            self.output += outgoing.read()
            self.changed = True
        if isinstance(error, ssl.SSLZeroReturnError):
            self.ended = self.changed = True
        elif error is not None and not isinstance(error, ssl.SSLWantReadError):
            self.failure, self.changed = error, True
        if found < records or self._useless:
            # In parts of a record: each with data pays for a part of one without.
            self._useless = max(0, self._useless + FREE * (records - found) - found)
            if (self._useless > FREE * MAX_USELESS or len(self.output) > MAX_OUTPUT) and self.failure is None:
                self.failure, self.changed = Flood(), True
        return n

    def _count_records(self, data: memoryview, size: int) -> int:
        """Return how many records end in `data`: so many at most return data, whatever its size. Raises Flood."""
        at = self._rest
        if self._header:
            at = _HEADER - len(self._header)
            header = self._header + bytes(data[:at])
            if len(header) < _HEADER:
                self._header = header
                return 0
            self._header = b""
            length = header[3] << 8 | header[4]
            if header[0] == _HANDSHAKE and length > MAX_RENEGOTIATION:
                raise Flood
            at += length
        n = 1 if at else 0  # `at` is the end of a record that has begun before
        while at + _HEADER <= size:
            length = data[at + 3] << 8 | data[at + 4]
            if data[at] == _HANDSHAKE and length > MAX_RENEGOTIATION:
                raise Flood
            at += _HEADER + length
            n += 1
        self._aligned = at == size
        if at > size:
            self._rest = at - size
            return n - 1
        self._rest = 0
        if at < size:
            self._header = bytes(data[at:])
        return n

    def send(self, data: bytes | memoryview) -> bytes:
        """Encrypt `data`; return `output`, which is empty then, and the ciphertext. Raises ssl.SSLError."""
        outgoing = self._outgoing
        if outgoing.pending or self._incoming.pending:
            self._pair.check_empty()
        try:
            self._write(data)
        finally:
            ciphertext = outgoing.read()
        if self.output:
            ciphertext = self.output + ciphertext
            self.output = b""
        return ciphertext

    def close(self) -> bytes:
        """Return `output` and the close_notify record. Nothing can be sent after it; the peer may still send."""
        pair = self._pair
        pair.check_empty()
        try:
            self._object.unwrap()
        except ssl.SSLError:
            pass  # it waits for the peer's close_notify, or TLS has failed and there is nothing to close
        finally:
            record, self.output = self.output + pair.outgoing.read(), b""
        return record

    @property
    def version(self) -> str:
        """The protocol's version, such as ``TLSv1.3``; "" before the handshake."""
        return self._object.version() or ""

    @property
    def cipher(self) -> str:
        """OpenSSL's name of the cipher suite; "" before the handshake."""
        cipher = self._object.cipher()
        return cipher[0] if cipher else ""

    @property
    def certificate(self) -> bytes | None:
        """The peer's certificate in DER; None without one."""
        return self._object.getpeercert(binary_form=True)

    @property
    def session(self) -> ssl.SSLSession | None:
        """The session, for a later connection of a client. Python copies it: 10 us."""
        return self._object.session

    @property
    def session_reused(self) -> bool:
        """Whether the handshake resumed a session."""
        return bool(self._object.session_reused)
