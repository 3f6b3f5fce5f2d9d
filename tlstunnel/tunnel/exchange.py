"""One plain HTTP request and its response, for sites that pass them on: both are streamed, in bounded memory.

The firewall has checked the request like any other; it is the only one of its connection. One coroutine moves both
directions, since a response may begin, and a connection may end, before the request's body is complete.

Tested by tests/promises/test_http_pass.py.
"""

import asyncio
import math
from collections.abc import Callable

from tlstunnel.config import Timeouts
from tlstunnel.escaping import printable
from tlstunnel.handshake.plain import BodyReader, PlainResponseReader
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import PlainRequest
from tlstunnel.handshake.response import BadResponse
from tlstunnel.journal.events import Decision, EndedBy, Reason
from tlstunnel.sockets.channel import Channel, ClientGone
from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.tunnel.ends import End
from tlstunnel.tunnel.origin import record_response, render_head
from tlstunnel.tunnel.turn import Turn


def too_many_uploads() -> Refusal:
    """Return the response to a request with a body from an address that has too many of them."""
    text = "too many requests with a body from this address wait for their response"
    return Refusal(429, Reason.TOO_MANY_UPLOADS, text, ((b"Retry-After", b"1"),))


async def pass_on(turn: Turn, on_response: Callable[[], None]) -> End:
    """Pass a plain request on to the origin, and the response back; call `on_response` when that begins.

    Raises Refusal; ClientGone.
    """
    record, timeouts = turn.record, turn.client.serving.timeouts
    assert isinstance(turn.request, PlainRequest)
    assert turn.place is not None
    assert turn.origin is not None
    exchange = Exchange(
        turn.request,
        turn.client.channel,
        turn.origin,
        head=render_head(turn),
        early=turn.early,
        wakeup=turn.client.wakeup,
        timeouts=timeouts,
        on_response=on_response,
    )
    try:
        await exchange.run()
    except Refusal as refusal:
        if refusal.status >= 500:
            turn.place.record_no_response(refusal.detail or refusal.reason)
        raise
    except Broken as broken:
        record.status, record.verdict, record.detail = exchange.status, Decision.PASS, printable(broken.detail)
        # With RST: close_notify would make a part look complete.
        return End(broken.ended_by, broken.reason, reset=True)
    finally:
        record.up, record.down = exchange.up, exchange.down
    record.status, record.verdict = exchange.status, Decision.PASS
    record_response(turn)
    return End(EndedBy.ORIGIN, Reason.RESPONDED, timeout=timeouts.close, lingers=not exchange.received_all)


MIN_BODY_RATE = 500
"""Bytes of a body per second for which the tunnel waits longer than `timeouts.request`, until the response has begun:
the default of Apache httpd's mod_reqtimeout. The time in which the origin takes nothing does not count."""


class Broken(Exception):
    """The exchange ended during the response, which the client must notice. The record gets `ended_by` and `reason`."""

    def __init__(self, ended_by: EndedBy, reason: Reason, detail: str = "") -> None:
        super().__init__(ended_by, reason, detail)
        self.ended_by = ended_by
        self.reason = reason
        self.detail = detail


class Exchange:
    """One `request` and its response. `head` is its head for the origin, `early` the received part of its body.

    `up` and `down` count the bytes of both bodies' streams, heads included, that the sockets took.
    """

    def __init__(  # noqa: PLR0913 - two sides, what is asked, and how long it may take
        self,
        request: PlainRequest,
        client: Channel,
        origin: Channel,
        *,
        head: bytes,
        early: bytes,
        wakeup: Wakeup,
        timeouts: Timeouts,
        on_response: Callable[[], None],
    ) -> None:
        self._on_response = on_response
        self._client, self._origin = client, origin
        self._wakeup, self._timeouts = wakeup, timeouts
        self._body = BodyReader(request)
        self._response = PlainResponseReader(request)
        self._early = early
        self._to_origin, self._to_client = head, b""
        self._uploads = True
        self._stopped = math.inf  # when the origin stopped taking the body, a time of the loop
        self._received = len(early)
        self._waited = 0.0  # for the body, seconds
        self.up = self.down = 0

    @property
    def status(self) -> int:
        """The status of the final response; 0 until the client was sent a byte of it."""
        return self._response.status

    @property
    def received_all(self) -> bool:
        """Whether the client has sent its whole body."""
        return self._body.complete

    async def run(self) -> None:
        """Move everything. Raises Refusal while nothing of the response was sent, Broken afterwards; ClientGone."""
        try:
            self._to_origin += self._body.feed(self._early)
            while self._to_client or not self._response.complete:
                await self._move()
        except ClientGone:
            if self.status:
                raise Broken(EndedBy.CLIENT, Reason.CLOSED_DURING_RESPONSE) from None
            raise
        except Refusal as refusal:
            if self.status:
                raise Broken(EndedBy.CLIENT, Reason.MALFORMED_BODY, refusal.detail) from None
            raise
        except BadResponse as error:
            if self.status:
                raise Broken(EndedBy.ORIGIN, Reason.RESPONSE_TRUNCATED, error.reason) from None
            raise Refusal(
                502, Reason.INVALID_RESPONSE, "the origin sent no valid response", detail=error.reason
            ) from None
        except TimeoutError:
            raise self._explain_timeout() from None
        await self._finish_upload()

    async def _finish_upload(self) -> None:
        """Forward the rest of the body, although the response is complete, while the origin takes it.

        Raises Broken. The client may leave: it has its response.
        """
        try:
            # An origin that has ended its side wants no more, and discards what comes (RFC 9112 section 9.6).
            while self._uploads and not self._origin.gone and (self._to_origin or not self._body.complete):
                await self._move()
        except (ClientGone, TimeoutError):
            pass
        except Refusal as refusal:
            raise Broken(EndedBy.CLIENT, Reason.MALFORMED_BODY, refusal.detail) from None

    async def _move(self) -> None:
        """Do what can be done, or wait until something can. Raises ClientGone; TimeoutError."""
        loop = asyncio.get_running_loop()
        # Requested again after each byte that moves, in either direction.
        now = loop.time()
        timeout = self._timeout(now)
        if timeout <= 0:
            raise TimeoutError
        self._wakeup.deadline = now + timeout
        if self._step():
            await asyncio.sleep(0)  # others get their turn
        elif self._is_client_gone():
            raise ClientGone
        else:
            waits = self._waits_for_body
            await self._wakeup.wait()
            if waits:
                self._waited += loop.time() - now

    @property
    def _waits_for_body(self) -> bool:
        return not self._to_origin and not self._body.complete

    def _is_client_gone(self) -> bool:
        # What it sent before its end must be received first.
        return self._client.check_gone() if self._body.complete else self._client.failed

    def _step(self) -> bool:
        """Do what can be done without waiting; return whether anything was done."""
        moved = self._write()
        if self._waits_for_body:
            try:
                data = self._client.recv_now()
            except ConnectionError:
                raise ClientGone from None
            if data == b"":
                raise ClientGone
            if data is not None:
                content, moved = self._body.feed(data), True
                self._received += len(data)
                self._to_origin = content if self._uploads else b""
        if not self._to_client and not self._response.complete:
            try:
                data = self._origin.recv_now()
            except OSError as error:
                raise BadResponse(error.strerror or str(error)) from None
            if data is not None:
                begun = self.status
                self._to_client, moved = self._response.feed(data), True
                if self.status and not begun:
                    self._on_response()
        return moved

    def _write(self) -> bool:
        moved = False
        if self._to_origin:
            try:
                rest = self._origin.send_now(self._to_origin)
            except OSError:
                # It may have responded before it read everything (413), and that response must be read.
                self._uploads, rest = False, b""
                self._stopped = asyncio.get_running_loop().time()
            else:
                self.up += len(self._to_origin) - len(rest)
                moved = len(rest) < len(self._to_origin)
            self._to_origin = rest
        if self._to_client:
            try:
                rest = self._client.send_now(self._to_client)
            except OSError:
                raise ClientGone from None
            self.down += len(self._to_client) - len(rest)
            moved = moved or len(rest) < len(self._to_client)
            self._to_client = rest
        return moved

    def _timeout(self, now: float) -> float:
        """Return how many seconds may pass without a byte: a handshake's until the response, then a tunnel's.

        Limited in total while nothing but the client's bytes can move: none may be left.
        """
        timeouts = self._timeouts
        if self._to_client:
            return timeouts.close
        if self.status and not self._response.complete:
            return timeouts.idle or math.inf
        if self._waits_for_body and self._uploads:
            allowed = timeouts.request + self._received / MIN_BODY_RATE
            return min(timeouts.request, allowed - self._waited)
        if not self._uploads:
            return self._stopped + timeouts.origin_response - now
        return timeouts.origin_response

    def _explain_timeout(self) -> Exception:
        if self.status:
            return Broken(EndedBy.TUNNEL, Reason.RESPONSE_TIMED_OUT)
        if self._waits_for_body and self._uploads:
            return Refusal(408, Reason.REQUEST_TIMED_OUT, "the body did not arrive in time")
        return Refusal(504, Reason.ORIGIN_RESPONSE_TIMED_OUT, "the origin did not respond in time")
