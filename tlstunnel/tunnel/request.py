"""The stages of a request before an origin is involved: reading it, the firewall, the edge worker.

Tested by tests/promises/test_refusals.py and test_firewall_order.py.
"""

from tlstunnel.escaping import printable
from tlstunnel.firewall.verdict import PASSED
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.forwarding import find_client_address, read_request_id
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import PlainRequest, RequestReader
from tlstunnel.handshake.trace import read_trace_id
from tlstunnel.journal.events import Reason
from tlstunnel.sockets.channel import ClientGone
from tlstunnel.tunnel.health import find_health_path
from tlstunnel.tunnel.turn import Turn

_NONE = (b"",)


async def read_request(turn: Turn) -> None:
    """Read the request; what came after the head of an upgrade request waits for the 101.

    Raises Refusal; ClientGone.
    """
    client, record = turn.client, turn.record
    serving = client.serving
    timeout = serving.timeouts.request
    client.set_timeout(timeout)
    reader = RequestReader(turn.site.passes, find_health_path(client))
    request = None
    try:
        while request is None:
            data = await client.channel.recv()
            if not data:
                raise ClientGone
            request = reader.feed(data)
    except TimeoutError:
        raise Refusal(408, Reason.REQUEST_TIMED_OUT, f"no complete request within {timeout:g} s") from None
    finally:
        record.path = _path_for_log(reader.target)
    by_name = request.by_name
    record.method, record.host = request.method, request.host
    record.take_headers(by_name.get(b"origin", _NONE)[0], by_name.get(b"user-agent", _NONE)[0])
    record.client_subject = client.subject
    if client.trusted:
        record.client = find_client_address(request, client.peer, serving.trusted_proxies)
        record.id = read_request_id(request) or record.id
        record.trace = read_trace_id(request)
    turn.request, turn.early = request, reader.leftover


def check_request(turn: Turn) -> None:
    """Check that the client has an accepted certificate, and asks for this site. Raises Refusal."""
    client, request = turn.client, turn.request
    assert request is not None
    if (refused := client.certificate_refusal) is not None:
        raise Refusal(403, refused.reason, str(refused))
    # The certificate of one site must not give access to another with a closer name and its own rules.
    if client.serving.sites.choose(request.host) is not turn.site:
        raise Refusal(421, Reason.MISDIRECTED, "the Host field is not a name of the site that this connection is for")


def _path_for_log(target: bytes) -> str:
    """Return the path without the query or a fragment, which often contain tokens.

    Any other target has none; it may contain a password, as in ``http://user:password@host/``.
    """
    if not target.startswith(b"/"):
        return ""
    return printable(target.partition(b"?")[0].partition(b"#")[0].decode("ascii"))


async def check_firewall(turn: Turn) -> None:
    """Check the request with the firewall; after the 101 nothing is inspected. Raises Refusal."""
    client, record = turn.client, turn.record
    assert turn.request is not None
    turn.connection = Connection(
        ip=record.client,
        tls_version=client.tls_version,
        tls_cipher=client.cipher,
        tls_sni=client.sni,
        tls_ja4=client.ja4,
        client_subject=client.subject,
        site=turn.site.name,
        certificate=client.certificate,
        request_id=record.id,
    )
    turn.verdict = verdict = await client.serving.firewall.check(
        turn.request, turn.connection, behind_proxy=client.trusted
    )
    if verdict is not PASSED:
        record.firewall = verdict.to_record()
    if verdict.refusal is not None:
        raise verdict.refusal


async def call_worker(turn: Turn) -> None:
    """Let the site's edge worker change an upgrade request, choose its origin, or refuse it.

    Raises Refusal; ClientGone when the client does not wait.
    """
    client, request, edge = turn.client, turn.request, turn.site.edge
    if edge is None or isinstance(request, PlainRequest):
        return
    assert request is not None
    assert turn.connection is not None
    client.set_timeout(edge.timeout)
    turn.directions = directions = await edge.call(request, turn.connection, client.channel)
    turn.request, turn.record.edge, turn.record.tags = directions.request, directions.outcome, directions.tags
    turn.record.edge_log = directions.log
