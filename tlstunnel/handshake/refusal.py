"""Refusals: the HTTP responses that the tunnel itself gives."""

from http import HTTPStatus

Fields = tuple[tuple[bytes, bytes], ...]
"""Header fields as they stood: names in the sender's case, repeated ones repeated, in order."""

_STATUSES = frozenset(status.value for status in HTTPStatus)

UPGRADE: Fields = ((b"Upgrade", b"websocket"),)


class Refusal(Exception):
    """The client gets no tunnel but an HTTP response.

    `reason` is a short fixed word for the record, `text` a sentence for whoever reads the response. Neither holds
    anything a client sent; `detail` may (for the log alone, which escapes it). `body` is the whole of the response's
    where it is somebody else's, and not made of `text`; `fields` then say what it is.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - a response, and what is said of it
        self, status: int, reason: str, text: str, fields: Fields = (), detail: str = "", body: bytes | None = None
    ) -> None:
        super().__init__(status, reason, text, fields, detail)
        self.status = status
        self.reason = reason
        self.text = text
        self.fields = fields
        self.detail = detail
        self.body = body


def render(refusal: Refusal, request_id: str | None) -> bytes:
    """The response to send: a short text body, the id if any, and ``Connection: close`` (RFC 9112 section 9.6)."""
    phrase = HTTPStatus(refusal.status).phrase if refusal.status in _STATUSES else "Refused"
    fields: list[tuple[bytes, bytes]] = []
    if refusal.body is None:
        told = "" if request_id is None else f"id: {request_id}\n"
        body = f"{refusal.status} {phrase}: {refusal.text}\n{told}".encode()
        fields.append((b"Content-Type", b"text/plain; charset=utf-8"))
    else:
        body = refusal.body
    if refusal.status != HTTPStatus.NOT_MODIFIED:  # has no body, whatever its fields say (RFC 9112 section 6.3)
        fields.append((b"Content-Length", b"%d" % len(body)))
    fields.append((b"Connection", b"close, Upgrade" if refusal.fields[:1] == UPGRADE else b"close"))
    fields += refusal.fields
    if request_id is not None:
        fields.append((b"X-Request-Id", request_id.encode()))
    return head(b"HTTP/1.1 %d %s" % (refusal.status, phrase.encode()), fields) + body


def head(start_line: bytes, fields: list[tuple[bytes, bytes]] | Fields) -> bytes:
    """A start line and fields as an HTTP/1.1 head. They must have been checked: nothing is here."""
    return b"%b\r\n%b\r\n" % (start_line, b"".join([b"%b: %b\r\n" % field for field in fields]))
