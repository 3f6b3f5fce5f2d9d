"""Refusals: the HTTP responses that the tunnel itself sends.

Tested by tests/promises/test_refusals.py.
"""

from http import HTTPStatus

Fields = tuple[tuple[bytes, bytes], ...]
"""Header fields as received: in order, names in the sender's case, repeated fields repeated."""

_STATUSES = frozenset(status.value for status in HTTPStatus)

UPGRADE: Fields = ((b"Upgrade", b"websocket"),)


class Refusal(Exception):
    """The client gets an HTTP response instead of a tunnel.

    `reason` is a short fixed word for the record, `text` a sentence for the reader of the response. Neither contains
    anything that a client sent; `detail` may (it is only logged, escaped). `body` is the response's body if it is not
    made from `text`, such as an edge worker's; `fields` then include its Content-Type. `log` is what the worker adds to
    the record.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - a response and its record
        self, status: int, reason: str, text: str, fields: Fields = (), detail: str = "", body: bytes | None = None
    ) -> None:
        super().__init__(status, reason, text, fields, detail)
        self.status = status
        self.reason = reason
        self.text = text
        self.fields = fields
        self.detail = detail
        self.body = body
        self.log: tuple[tuple[str, str | int | float | bool], ...] = ()


def render_refusal(refusal: Refusal, request_id: str | None) -> bytes:
    """Return the response: a short text body, the id if any, and ``Connection: close`` (RFC 9112 section 9.6)."""
    phrase = HTTPStatus(refusal.status).phrase if refusal.status in _STATUSES else "Refused"
    fields: list[tuple[bytes, bytes]] = []
    if refusal.body is None:
        id_line = "" if request_id is None else f"id: {request_id}\n"
        body = f"{refusal.status} {phrase}: {refusal.text}\n{id_line}".encode()
        fields.append((b"Content-Type", b"text/plain; charset=utf-8"))
    else:
        body = refusal.body
    if refusal.status != HTTPStatus.NOT_MODIFIED:  # never has a body (RFC 9112 section 6.3)
        fields.append((b"Content-Length", b"%d" % len(body)))
    fields.append((b"Connection", b"close, Upgrade" if refusal.fields[:1] == UPGRADE else b"close"))
    fields += refusal.fields
    if request_id is not None:
        fields.append((b"X-Request-Id", request_id.encode()))
    return render_head(b"HTTP/1.1 %d %s" % (refusal.status, phrase.encode()), fields) + body


def render_head(start_line: bytes, fields: list[tuple[bytes, bytes]] | Fields) -> bytes:
    """Return a start line and fields as an HTTP/1.1 head. The caller must have checked them."""
    return b"%b\r\n%b\r\n" % (start_line, b"".join([b"%b: %b\r\n" % field for field in fields]))
