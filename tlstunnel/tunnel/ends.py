"""How a connection ends without a tunnel: the bytes that the client gets, the record, and how its socket is closed.

Tested by tests/unit/test_turn.py and tests/promises/test_refusals.py.
"""

import asyncio
import contextlib
import ssl
from dataclasses import dataclass

from tlstunnel.escaping import printable
from tlstunnel.handshake.refusal import Refusal, render_refusal
from tlstunnel.handshake.request import UpgradeRequest
from tlstunnel.journal.events import Decision, EndedBy, Event, Reason
from tlstunnel.journal.logger import structlog
from tlstunnel.journal.record import Record
from tlstunnel.sockets.channel import ClientGone
from tlstunnel.sockets.closing import DISCARD_SECONDS, reset
from tlstunnel.tunnel.client import Client
from tlstunnel.tunnel.turn import Turn


class Dropped(Exception):
    """The connection ends before there is HTTP over TLS: `response`, an alert or nothing, is sent, then FIN."""

    def __init__(self, reason: str, response: bytes = b"", detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.response = response
        self.detail = detail


@dataclass(frozen=True, slots=True)
class End:
    """How a turn ended, and how its connection is closed.

    `ended_by` and `reason` are for the record. With `reset`, the connection is closed with RST; otherwise with
    close_notify and FIN, and the client has `timeout` seconds without progress to read what was sent. It `lingers` if
    the client may still be sending a body.
    """

    ended_by: EndedBy
    reason: str
    reset: bool = False
    timeout: float = DISCARD_SECONDS
    lingers: bool = False


async def end_with_error(client: Client, turn: Turn | None, error: BaseException) -> None:
    """End a connection because a stage raised `error`; `turn` is None before its first request."""
    if isinstance(error, Dropped):
        return drop(client, error)
    if isinstance(error, Refusal) and turn is not None:
        return await refuse(turn, error)
    if isinstance(error, ClientGone):
        end = End(EndedBy.CLIENT, Reason.CLOSED_DURING_HANDSHAKE)
    elif isinstance(error, asyncio.CancelledError):
        end = End(EndedBy.TUNNEL, Reason.HANDSHAKE_ABORTED, reset=True)
    elif isinstance(error, ssl.SSLError):
        end = End(EndedBy.CLIENT, f"{Reason.TLS_ERROR}: {error.reason or error.strerror}", reset=True)
    elif isinstance(error, OSError):
        end = End(EndedBy.CLIENT, f"{Reason.SOCKET_ERROR}: {error.strerror or error}", reset=True)
    else:
        show = client.serving.journal.style.show
        about = {"id": turn.record.id} if turn is not None else {"client": show(client.peer)}
        structlog.get_logger().error(Event.TUNNEL_FAILED, **about, exc_info=error)
        end = End(EndedBy.TUNNEL, Reason.INTERNAL_ERROR, reset=True)
    finish(client, turn, end)


def drop(client: Client, dropped: Dropped) -> None:
    """End a connection that sent no request: it is counted and sampled, not recorded."""
    client.serving.journal.failed(_record_failure(client), dropped.reason, dropped.detail)
    # An alert fits into the buffer of a socket to which nothing was sent yet, or the client is gone.
    with contextlib.suppress(OSError):
        client.channel.sock.send(dropped.response)
    client.release()
    client.serving.closing_sockets.close_gracefully(client.channel.sock)


async def refuse(turn: Turn, refusal: Refusal) -> None:
    """Send the client a refusal and end the connection."""
    client, record = turn.client, turn.record
    record.status, record.verdict, record.detail = refusal.status, Decision.REFUSED, printable(refusal.detail)
    record.edge_log = refusal.log or record.edge_log
    client.set_timeout(client.serving.timeouts.close)
    try:
        await client.channel.send(render_refusal(refusal, record.id), last=True)
    except (OSError, asyncio.CancelledError) as error:  # TimeoutError among them
        record.detail = record.detail or printable(str(error))
        return finish(client, turn, End(EndedBy.TUNNEL, refusal.reason, reset=True))
    # An upgrade request has no body.
    lingers = not isinstance(turn.request, UpgradeRequest)
    finish(client, turn, End(EndedBy.TUNNEL, refusal.reason, lingers=lingers))


def finish(client: Client, turn: Turn | None, end: End) -> None:
    """Record the end of a turn, or of a connection before its first, and close the connection."""
    if turn is not None:
        write_record(turn, end)
        turn.close()
    else:
        client.serving.journal.failed(_record_failure(client), *_during_tls(end.reason))
    close_connection(client, end)


def _during_tls(reason: str) -> tuple[str, str]:
    """Return how an end is logged that came before the TLS handshake was complete: its reason and the detail."""
    fixed, _, text = reason.partition(": ")
    match fixed:
        case Reason.HANDSHAKE_ABORTED:
            return Reason.TLS_ABORTED, ""
        case Reason.CLOSED_DURING_HANDSHAKE:
            return Reason.TLS_CLIENT_CLOSED, ""
        case Reason.TLS_ERROR:
            return Reason.TLS_FAILED, text
        case Reason.SOCKET_ERROR:
            return f"{Reason.TLS_SOCKET_ERROR}: {text}", ""
    return Reason.TLS_INTERNAL_ERROR, ""


def write_record(turn: Turn, end: End) -> None:
    """Write the record of a turn."""
    turn.record.ended_by, turn.record.reason = end.ended_by, end.reason
    turn.client.serving.journal.ended(turn.record)


def close_connection(client: Client, end: End) -> None:
    """Close a connection with what `end` says."""
    client.release()
    if end.reset:
        return reset(client.channel.sock)
    client.channel.end()
    client.serving.closing_sockets.close_gracefully(client.channel.sock, end.timeout, lingers=end.lingers)


def _record_failure(client: Client) -> Record:
    site = client.site.name if client.site is not None else ""
    return Record(
        id="",
        peer=client.socket_peer,
        client=client.peer,
        site=site,
        sni=client.sni,
        ja4=client.ja4,
        started=client.accepted,
    )
