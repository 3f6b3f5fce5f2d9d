"""The stages of a request at an origin: reach one, send it the upgrade request, and relay a response other than 101.

Tested by tests/promises/test_origin_lying.py and test_origin_declining.py.
"""

import asyncio

from tlstunnel.certificates.clients import find_common_name
from tlstunnel.handshake.forwarding import NO_EDITS, Forwarding, render_forwarded_head
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import UpgradeRequest
from tlstunnel.handshake.response import BadResponse, Declined, Switched, UpgradeResponseReader
from tlstunnel.journal.events import Decision, EndedBy, Reason
from tlstunnel.origins.errors import NoOrigin, OriginNotAllowed, OriginTLSFailed, OriginUnreachable
from tlstunnel.origins.reach import reach
from tlstunnel.origins.tls import explain
from tlstunnel.sockets import proxy_protocol
from tlstunnel.sockets.channel import Channel, ClientGone, get_address
from tlstunnel.state.counters import CountersUnavailable
from tlstunnel.state.uncounted import refuse_uncounted
from tlstunnel.tunnel.ends import End
from tlstunnel.tunnel.turn import Turn


async def reach_origin(turn: Turn) -> None:
    """Connect to an origin: the next one if the first does not accept. No byte of the request is sent.

    Raises Refusal; ClientGone when the client does not wait.
    """
    client, record, request, directions = turn.client, turn.record, turn.request, turn.directions
    assert request is not None
    client.set_timeout(client.serving.timeouts.origin_connect)
    pool, chosen = None, None
    if directions is not None:
        pool, chosen = directions.pool, directions.address
    if pool is None:
        pool, chosen = turn.site.pool_of(request), None
    record.origin = str(chosen or pool.name)
    several = False
    try:
        members = await pool.order(record.client, request, client.wakeup.deadline, chosen)
        record.origin, several = members[0].text, members[-1].text != members[0].text
        version = turn.site.edits.proxy_header
        turn.place, turn.origin = await reach(
            pool,
            members,
            record.client,
            preface=b"" if version == "off" else _render_proxy_header(turn, version),
            readiness=client.serving.readiness,
            wakeup=client.wakeup,
            client=client.channel,
        )
        record.origin = turn.place.member.text
    except OriginNotAllowed as error:
        assert directions is not None  # only the pools that a worker chooses from are limited
        raise directions.refuse(error.reason) from None
    except NoOrigin as error:
        if error.retry_after is None:
            raise Refusal(
                502, Reason.ORIGIN_UNREACHABLE, "the origin could not be reached", detail=error.reason
            ) from None
        raise _refuse_for_now("no origin can take this now", error.retry_after, error.reason) from None
    except CountersUnavailable as error:
        raise refuse_uncounted(error) from None
    except OriginTLSFailed as error:
        text = "the TLS handshake with the origin failed"
        raise Refusal(502, error.kind, text, detail=error.reason) from None
    except OriginUnreachable as error:
        if several and not error.shortage:
            raise _refuse_for_now("no origin could be reached", 1, error.reason) from None
        status, reason = (503, Reason.OUT_OF_RESOURCES) if error.shortage else (502, Reason.ORIGIN_UNREACHABLE)
        raise Refusal(status, reason, "the origin could not be reached", detail=error.reason) from None
    except TimeoutError:
        raise Refusal(504, Reason.ORIGIN_CONNECT_TIMED_OUT, "the origin could not be reached in time") from None


def _refuse_for_now(text: str, retry_after: int, reason: str) -> Refusal:
    return Refusal(503, Reason.NO_ORIGIN, text, ((b"Retry-After", b"%d" % retry_after),), reason)


def _render_proxy_header(turn: Turn, version: str) -> bytes:
    """Return the PROXY header for the origin: the client's address, and the address that it connected to."""
    client, address, sock = turn.client, turn.record.client, turn.client.channel.sock
    peer = get_address(sock, peer=True)
    here = get_address(sock, peer=False)
    port = peer[1] if peer is not None and peer[0] == address else 0
    source = (address, port) if address else None
    if version == "v1":
        return proxy_protocol.write_v1(source, here)
    if version == "v2":
        return proxy_protocol.write_v2(source, here)
    common_name = find_common_name(client.certificate) if client.certificate is not None else ""
    tls = proxy_protocol.TLSInfo(
        client.tls_version, client.cipher, client.sni, common_name, verified=client.certificate is not None
    )
    return proxy_protocol.write_v2(source, here, tls, turn.record.id)


def render_head(turn: Turn) -> bytes:
    """Return the head of the request as the origin gets it."""
    client, record = turn.client, turn.record
    assert turn.request is not None
    edits = turn.site.edits.of(record.origin, client.subject)
    if turn.directions is not None and turn.directions.edits is not NO_EDITS:
        edits = edits.then(turn.directions.edits)
    forwarding = Forwarding(client.peer, record.id, client.trusted, record.client)
    return render_forwarded_head(turn.request, forwarding, edits)


async def request_upgrade(turn: Turn) -> tuple[Switched | Declined, UpgradeResponseReader]:
    """Send the upgrade request and read the response. Nothing else of the client's is sent before a verified 101.

    Raises Refusal; ClientGone when the client does not wait.
    """
    client, request, place, origin = turn.client, turn.request, turn.place, turn.origin
    assert isinstance(request, UpgradeRequest)
    assert place is not None
    assert origin is not None
    timeout = client.serving.timeouts.origin_response
    client.set_timeout(timeout)
    reader = UpgradeResponseReader(request)
    response = None
    try:
        await origin.send(render_head(turn))
        while response is None:
            response = reader.feed(await origin.recv(unless_gone=client.channel))
    except BadResponse as error:
        place.record_no_response(error.reason)
        raise Refusal(502, Reason.INVALID_RESPONSE, "the origin sent no valid response", detail=error.reason) from None
    except TimeoutError:
        place.record_no_response("did not respond in time")
        raise Refusal(
            504, Reason.ORIGIN_RESPONSE_TIMED_OUT, f"the origin did not respond within {timeout:g} s"
        ) from None
    except OSError as error:
        detail = explain(error)
        place.record_no_response(detail)
        raise Refusal(502, Reason.ORIGIN_FAILED, "the origin closed the connection", detail=detail) from None
    turn.record.status = response.status
    record_response(turn)
    return response, reader


def record_response(turn: Turn) -> None:
    """Record that the origin sent a valid response, and keep its TLS session for the next connection."""
    assert turn.place is not None
    turn.place.record_response()
    member = turn.place.member
    if member.tls is not None and turn.origin is not None:
        member.tls.remember(turn.origin, member.origin)


async def relay(turn: Turn, declined: Declined, reader: UpgradeResponseReader) -> End:
    """Send the client the origin's complete response. The timeout starts again with each byte sent."""
    client, record, origin = turn.client, turn.record, turn.origin
    assert origin is not None
    timeout = client.serving.timeouts.close
    record.verdict = Decision.PASS
    client.set_timeout(timeout)
    try:
        first = declined.head + reader.body(None)
        await client.channel.send(first, last=reader.complete)
        while not reader.complete:
            client.set_timeout(timeout)
            # Neither has to wait while both are ready, and others would not get their turn.
            await asyncio.sleep(0)
            content = await _read_body(reader, origin, client.channel)
            await client.channel.send(content, last=reader.complete)
    except BadResponse as error:
        record.detail = error.reason
        return End(EndedBy.ORIGIN, Reason.RESPONSE_TRUNCATED, reset=True)
    except ClientGone:
        # With RST: close_notify would make the part look complete to a client that has only ended its own side.
        return End(EndedBy.CLIENT, Reason.CLOSED_DURING_RESPONSE, reset=True)
    except TimeoutError:
        return End(EndedBy.TUNNEL, Reason.RESPONSE_TIMED_OUT, reset=True)
    return End(EndedBy.ORIGIN, Reason.DECLINED, timeout=timeout)


async def _read_body(reader: UpgradeResponseReader, origin: Channel, client: Channel) -> bytes:
    try:
        data = await origin.recv(unless_gone=client)
    except TimeoutError:
        raise
    except OSError as error:
        raise BadResponse(error.strerror or str(error)) from None
    return reader.body(data)
