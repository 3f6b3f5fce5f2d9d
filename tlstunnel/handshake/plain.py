"""A plain request that a site forwards: its body to the origin, the response to the client.

`forwarding.render_forwarded_head` builds its head, with ``Connection: close``. It is the only request on its
connection: bytes after its body are discarded here, so that nothing reaches an origin that the firewall has not
checked.
"""

import h11

from tlstunnel.handshake.body import LAST_CHUNK, BadBody, Body, Chunked, Counted, render_chunk
from tlstunnel.handshake.fields import find_hop_by_hop_of_response
from tlstunnel.handshake.refusal import Refusal, render_head
from tlstunnel.handshake.request import PlainRequest
from tlstunnel.handshake.response import BadResponse, ResponseReader, check_fields
from tlstunnel.journal.events import Reason

_LENGTH = frozenset({b"content-length"})


class BodyReader:
    """Reads the body of `request` from the client's bytes and returns it framed for the origin, until `complete`.

    The caller must notice if the client's stream ends earlier; the client is gone then.
    """

    def __init__(self, request: PlainRequest) -> None:
        self._chunked = request.chunked
        self._body: Body = Chunked() if request.chunked else Counted(request.length or 0)

    @property
    def complete(self) -> bool:
        """Whether the whole body has been read. No more of the client's bytes are needed then."""
        return self._body.complete

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; return those for the origin, at most a few more. Raises `Refusal` (400).

        The origin may have received what was returned before a refusal, and must then see an incomplete body.
        """
        if self.complete:
            return b""
        try:
            content = self._body.take(data)
        except BadBody as error:
            raise Refusal(400, Reason.BODY, "the framing of the body violates RFC 9112", detail=error.reason) from None
        if not self._chunked:
            return content
        return render_chunk(content) + (LAST_CHUNK if self.complete else b"")


class PlainResponseReader(ResponseReader):
    """Takes the origin's bytes and returns the response to `request` for the client, until `complete`.

    `status` is that of the final response once `feed` has returned a byte of it. Before that, a `BadResponse` can still
    become a 502; after it, the client must see an incomplete response.
    """

    def __init__(self, request: PlainRequest) -> None:
        super().__init__()
        self.status = 0
        self._to_head = request.method == "HEAD"
        self._interims = b""

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes (``b""`` at the origin's end); return those for the client. Raises `BadResponse`."""
        if self.status:
            return self.body(data)
        event = self._read_final_head(data)
        out, self._interims = self._interims, b""
        if event is None:
            return out
        if isinstance(event, h11.InformationalResponse):
            raise BadResponse("101 in response to a request without Upgrade")
        declined = self._build_declined(event)
        out += declined.head + self.body(None)
        self.status = declined.status
        return out

    def _handle_interim(self, event: h11.InformationalResponse) -> None:
        """Forward a 1xx, as RFC 9110 section 15.2 requires of a proxy: a client may wait for the 100."""
        fields = check_fields(event)
        dropped = find_hop_by_hop_of_response(fields) | _LENGTH
        kept = [field for field in event.headers.raw_items() if field[0].lower() not in dropped]
        self._interims += render_head(b"HTTP/1.1 %d %b" % (event.status_code, event.reason), kept)

    def _has_no_body(self, status: int) -> bool:
        return self._to_head or super()._has_no_body(status)
