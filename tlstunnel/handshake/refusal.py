"""Refusals: the HTTP responses that the tunnel itself gives."""

from http import HTTPStatus

Fields = tuple[tuple[bytes, bytes], ...]
"""Header fields as they stood: names in the sender's case, repeated ones repeated, in order."""

UPGRADE: Fields = ((b"Upgrade", b"websocket"),)


class Refusal(Exception):
    """The client gets no tunnel but an HTTP response.

    `reason` is a short fixed word for the record, `text` a sentence for whoever reads the response. Neither holds
    anything a client sent; `detail` may (for the log alone, which escapes it).
    """

    def __init__(self, status: int, reason: str, text: str, fields: Fields = (), detail: str = "") -> None:
        super().__init__(status, reason, text, fields, detail)
        self.status = status
        self.reason = reason
        self.text = text
        self.fields = fields
        self.detail = detail


def render(refusal: Refusal, request_id: str | None) -> bytes:
    """The response to send: a short text body, the id if any, and ``Connection: close`` (RFC 9112 section 9.6)."""
    phrase = HTTPStatus(refusal.status).phrase
    told = "" if request_id is None else f"id: {request_id}\n"
    body = f"{refusal.status} {phrase}: {refusal.text}\n{told}".encode()
    fields: list[tuple[bytes, bytes]] = [
        (b"Content-Type", b"text/plain; charset=utf-8"),
        (b"Content-Length", b"%d" % len(body)),
        (b"Connection", b"close, Upgrade" if refusal.fields[:1] == UPGRADE else b"close"),
        *refusal.fields,
    ]
    if request_id is not None:
        fields.append((b"X-Request-Id", request_id.encode()))
    return head(b"HTTP/1.1 %d %s" % (refusal.status, phrase.encode()), fields) + body


def head(start_line: bytes, fields: list[tuple[bytes, bytes]] | Fields) -> bytes:
    """A start line and fields as an HTTP/1.1 head. They must have been checked: nothing is here."""
    return b"%b\r\n%b\r\n" % (start_line, b"".join([b"%b: %b\r\n" % field for field in fields]))
