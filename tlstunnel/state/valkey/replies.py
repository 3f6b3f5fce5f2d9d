"""Parse what a Valkey or Redis server replies (RESP, version 2), as far as our commands have such replies. No I/O.

hiredis has no bound: the head of an array of 10^9 elements, 13 bytes, makes it allocate 8 GB and then takes the loop
seconds to free them; elements that follow are kept without limit. Our replies are strings, numbers, errors, and one
array of two strings.

Tested by tests/unit/test_state_valkey_connection.py.
"""

from typing import Final

import hiredis

MAX_REPLY: Final = 1 << 20
"""Bytes of a reply. None of ours has more than 64 KiB."""

MAX_ELEMENTS: Final = 16
"""Elements of an array, which has no arrays in it."""

INCOMPLETE: Final = object()
"""What `Replies.get` returns while there is no complete reply."""


class Replies:
    """Replies from the bytes that a server has sent. `waiting` is the number of bytes that no reply was made of."""

    def __init__(self) -> None:
        self._data = b""
        self._at = 0

    @property
    def waiting(self) -> int:
        """The number of bytes that have made no reply."""
        return len(self._data) - self._at

    def feed(self, data: bytes) -> None:
        """Add what the server has sent."""
        self._data = data if self._at == len(self._data) else self._data[self._at :] + data
        self._at = 0

    def get(self) -> object:
        """Return the next reply: bytes, an int, a list of these, None, or a `hiredis.ReplyError`; or `INCOMPLETE`.

        Raises hiredis.ProtocolError.
        """
        reply, after = self._parse(self._at)
        if reply is not INCOMPLETE:
            self._at = after
        elif self.waiting > MAX_REPLY:
            raise hiredis.ProtocolError("the reply is too long")
        return reply

    def _parse(self, at: int, *, nested: bool = False) -> tuple[object, int]:
        """Return the reply that begins at `at`, and where it ends."""
        end = self._data.find(b"\r\n", at)
        if end < 0:
            return INCOMPLETE, at
        kind, line, after = self._data[at : at + 1], self._data[at + 1 : end], end + 2
        match kind:
            case b"$":
                return self._parse_string(_parse_number(line, MAX_REPLY), after)
            case b"+":
                return line, after
            case b"-":
                return hiredis.ReplyError(line.decode("utf-8", "replace")), after
            case b":":
                return _parse_number(line), after
            case b"*" if not nested:
                return self._parse_array(_parse_number(line, MAX_ELEMENTS), after)
        raise hiredis.ProtocolError("no such type of reply")

    def _parse_string(self, size: int, at: int) -> tuple[object, int]:
        if size < 0:
            return None, at
        end = at + size
        if len(self._data) < end + 2:
            return INCOMPLETE, at
        if self._data[end : end + 2] != b"\r\n":
            raise hiredis.ProtocolError("a string without an end")
        return self._data[at:end], end + 2

    def _parse_array(self, size: int, at: int) -> tuple[object, int]:
        if size < 0:
            return None, at
        elements = []
        for _ in range(size):
            element, at = self._parse(at, nested=True)
            if element is INCOMPLETE:
                return INCOMPLETE, at
            elements.append(element)
        return elements, at


def _parse_number(line: bytes, most: int | None = None) -> int:
    """Return a number; with `most`, one from -1 to that. Raises hiredis.ProtocolError."""
    if len(line) > 20 or not line.removeprefix(b"-").isdigit():
        raise hiredis.ProtocolError("not a number")
    number = int(line)
    if most is not None and not -1 <= number <= most:
        raise hiredis.ProtocolError("a size that is out of range")
    return number
