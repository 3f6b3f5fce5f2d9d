"""Read the body of an HTTP message: remove its framing and find its end (RFC 9112 section 6).

h11's readers are not used: they make an event of each chunk, and 64 KiB of one-byte chunks, which any client can send,
kept a process busy for a third of a second (measured; here it is a few milliseconds). The content is always framed
again before it is forwarded, so that the next hop reads one canonical form.

Tested by tests/unit/test_handshake_plain.py.
"""

import re
from typing import Protocol

MAX_CHUNK_LINE = 4096
"""Bytes of the line before a chunk, with its extensions. Go allows 4096, Apache 8190, h11 whatever its buffer holds."""

MAX_TRAILER = 16_384
"""Bytes of the trailer section: the same as for a request head."""

LAST_CHUNK = b"0\r\n\r\n"

# RFC 9112 section 7.1. Some origins write white space after the size (according to h11); 16 digits are 64 bits.
# Possessive, because a line that arrives byte by byte is tried each time.
_LINE = rb"([0-9A-Fa-f]{1,16}+)[ \t]*+(?:;[\t\x20-\x7e\x80-\xff]*+)?\r\n"
_FIRST_LINE = re.compile(_LINE)
_NEXT_LINE = re.compile(rb"\r\n" + _LINE)
_TRAILER = re.compile(rb"(?:\r\n[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[\t\x20-\x7e\x80-\xff]*+)*+")


class BadBody(Exception):
    """The body is malformed. `reason` contains nothing that was sent."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Body(Protocol):
    """A body with one kind of framing. Bytes after its end are discarded."""

    complete: bool

    def take(self, data: bytes) -> bytes:
        """Take the next bytes and return the content in them. Raises `BadBody`."""

    def end(self) -> None:
        """Note that the sender's stream has ended. Raises `BadBody` if the body is incomplete."""


class Counted:
    """A body of `length` bytes."""

    def __init__(self, length: int) -> None:
        self.complete = not length
        self._remaining = length

    def take(self, data: bytes) -> bytes:
        """See `Body`."""
        content = data[: self._remaining]
        self._remaining -= len(content)
        self.complete = not self._remaining
        return content

    def end(self) -> None:
        """See `Body`."""
        if not self.complete:
            raise BadBody(f"incomplete body: {self._remaining} bytes are missing")


class UntilEnd:
    """A body that ends with the stream, as only a response's may."""

    complete = False

    def take(self, data: bytes) -> bytes:
        """See `Body`."""
        return data

    def end(self) -> None:
        """See `Body`."""
        self.complete = True


class Chunked:
    """A chunked body. The syntax and size of extensions and the trailer section are checked, and both are discarded."""

    def __init__(self) -> None:
        self.complete = False
        self._held = b""  # an incomplete line or trailer section
        self._remaining = 0  # bytes of the current chunk
        self._line = _FIRST_LINE
        self._last = False

    def take(self, data: bytes) -> bytes:
        """See `Body`."""
        if self.complete:
            return b""
        if self._held:
            data, self._held = self._held + data, b""
        content = []
        at = 0
        while not self._last:
            if self._remaining:
                content.append(data[at : at + self._remaining])
                self._remaining -= len(content[-1])
                at += len(content[-1])
                if self._remaining:
                    return b"".join(content)
            line = self._line.match(data, at, at + MAX_CHUNK_LINE)
            if line is None:
                self._held = self._hold_partial_line(data, at)
                return b"".join(content)
            self._remaining = int(line[1], 16)
            self._line = _NEXT_LINE
            self._last = not self._remaining
            # The trailer section is read with the CRLF before it, so that "\r\n\r\n" ends it even if it is empty.
            at = line.end() - 2 * self._last
        self._read_trailer(data, at)
        return b"".join(content)

    def end(self) -> None:
        """See `Body`."""
        if not self.complete:
            raise BadBody("incomplete body: there was no last chunk")

    def _hold_partial_line(self, data: bytes, at: int) -> bytes:
        """Return the bytes that may be the start of a line. The same bytes are rejected however they were split."""
        part = data[at : at + MAX_CHUNK_LINE]
        behind = part[2:] if self._line is _NEXT_LINE else part
        if self._line is _NEXT_LINE and not b"\r\n".startswith(part[:2]):
            raise BadBody("malformed chunk: its length does not match its size line")
        if b"\n" in behind:
            raise BadBody("malformed chunk size")
        if len(part) == MAX_CHUNK_LINE:
            raise BadBody("chunk line too long")
        return part

    def _read_trailer(self, data: bytes, at: int) -> None:
        end = data.find(b"\r\n\r\n", at, at + MAX_TRAILER)
        if end >= 0:
            if not _TRAILER.fullmatch(data, at, end):
                raise BadBody("malformed trailer section")
            self.complete = True
        elif len(data) - at >= MAX_TRAILER:
            raise BadBody("trailer section too long")
        else:
            self._held = data[at:]


def render_chunk(content: bytes) -> bytes:
    """Return `content` as a chunk; b"" for no content, since an empty chunk would be the last."""
    return b"%x\r\n%b\r\n" % (len(content), content) if content else b""
