"""A request that asks for no upgrade, where a site passes it on: its body to the origin, the response to the client.

The head goes by `forwarding.forwarded_head`, with ``Connection: close``. It is the only request of its connection: what
comes behind its body is thrown away here, so that nothing reaches an origin that the firewall has not judged.
"""

import h11

from tlstunnel.handshake.body import LAST_CHUNK, BadBody, Body, Chunked, Counted, chunk
from tlstunnel.handshake.fields import hop_by_hop
from tlstunnel.handshake.refusal import Refusal, head
from tlstunnel.handshake.request import PlainRequest
from tlstunnel.handshake.response import BadResponse, ResponseReader, checked_fields
from tlstunnel.journal.events import Reason

_LENGTH = frozenset({b"content-length"})


class BodyReader:
    """The client's bytes behind the head of `request` in, the body's for the origin out, until `complete`.

    A body that ends before it is complete is for the caller to see: there is nobody left to answer.
    """

    def __init__(self, request: PlainRequest) -> None:
        self._chunked = request.chunked
        self._body: Body = Chunked() if request.chunked else Counted(request.length or 0)

    @property
    def complete(self) -> bool:
        """Whether the body is whole, so that no more of the client's bytes are wanted."""
        return self._body.complete

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; give what goes to the origin, at most some bytes more. Raises `Refusal` (400).

        What was given before a refusal may have reached the origin, which must then see the body break off.
        """
        if self.complete:
            return b""
        try:
            content = self._body.take(data)
        except BadBody as error:
            raise Refusal(400, Reason.BODY, "the body is not framed as RFC 9112 says", detail=error.reason) from None
        if not self._chunked:
            return content
        return chunk(content) + (LAST_CHUNK if self.complete else b"")


class PlainResponseReader(ResponseReader):
    """The origin's bytes in, the response to `request` for the client out, until `complete`.

    `status` is that of the final response once `feed` has given a byte of it: before, a `BadResponse` can still be
    answered with a 502; after it the client must see the response break off.
    """

    def __init__(self, request: PlainRequest) -> None:
        super().__init__()
        self.status = 0
        self._to_head = request.method == "HEAD"
        self._interims = b""

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes (``b""``: the origin's end); give what goes to the client. Raises `BadResponse`."""
        if self.status:
            return self.body(data)
        event = self._final(data)
        out, self._interims = self._interims, b""
        if event is None:
            return out
        if isinstance(event, h11.InformationalResponse):
            raise BadResponse("101 to a request that asks for no upgrade")
        declined = self._declined(event)
        out += declined.head + self.body(None)
        self.status = declined.status
        return out

    def _interim(self, event: h11.InformationalResponse) -> None:
        """Pass a 1xx on, as RFC 9110 section 15.2 demands of a proxy: a client may wait for the 100."""
        fields = checked_fields(event)
        dropped = hop_by_hop(fields) | _LENGTH
        kept = [field for field in event.headers.raw_items() if field[0].lower() not in dropped]
        self._interims += head(b"HTTP/1.1 %d %b" % (event.status_code, event.reason), kept)

    def _has_no_body(self, status: int) -> bool:
        return self._to_head or super()._has_no_body(status)
