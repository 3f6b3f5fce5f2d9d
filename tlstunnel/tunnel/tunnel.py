"""One connection, from accept to record. `Tunnel.run` is the order of the stages, and the only place that knows it."""

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from tlstunnel.addresses import ListenAddress, Networks, OriginAddress
from tlstunnel.certificates.clients import ClientRefused, common_name
from tlstunnel.config import Timeouts
from tlstunnel.errors import CertificateError
from tlstunnel.escaping import printable
from tlstunnel.firewall.verdict import Firewall
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.forwarding import NO_EDITS, Forwarding, client_address, forwarded_head, given_id
from tlstunnel.handshake.refusal import Refusal, render
from tlstunnel.handshake.request import PlainRequest, Request, RequestReader, UpgradeRequest
from tlstunnel.handshake.response import BadResponse, Declined, Switched, UpgradeResponseReader
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record
from tlstunnel.origins.errors import NoOrigin, OriginNotAllowed, OriginTLSFailed, OriginUnreachable
from tlstunnel.origins.place import Place
from tlstunnel.origins.pool import Pool
from tlstunnel.origins.reach import reach
from tlstunnel.origins.tls import explain
from tlstunnel.sockets import proxy_protocol
from tlstunnel.sockets.channel import Channel, ClientGone, address_of
from tlstunnel.sockets.closing import DISCARD_SECONDS, ClosingSockets, reset
from tlstunnel.sockets.deadlines import Deadlines, Wakeup
from tlstunnel.sockets.readiness import Readiness
from tlstunnel.tls import hello as tls_hello
from tlstunnel.tls.truncation import is_truncation
from tlstunnel.tunnel.exchange import Broken, Exchange
from tlstunnel.tunnel.sites import Site, Sites
from tlstunnel.tunnel.splice import Splice, Splices

if TYPE_CHECKING:
    from tlstunnel.firewall.rate_limits import Lease

TLS_1_2 = 0x0303


@dataclass(frozen=True, slots=True)
class Serving:
    """What a connection is served with: the configuration as it was when the connection came, and the machinery."""

    sites: Sites
    timeouts: Timeouts
    trusted_proxies: Networks
    proxied_on: frozenset[ListenAddress] | None
    journal: Journal
    firewall: Firewall
    loop: asyncio.AbstractEventLoop
    readiness: Readiness
    deadlines: Deadlines
    closing_sockets: ClosingSockets
    splices: Splices

    def proxied(self, listener: ListenAddress) -> bool:
        """Whether connections of this listener must begin with a PROXY header."""
        return self.proxied_on is None or listener in self.proxied_on


_ids = random.Random()  # noqa: S311 - an id has to be unlike all others, not to be a secret

_PLAIN_HTTP = render(Refusal(400, "plain HTTP", "this port speaks TLS: use wss://"), None)
"""Without an id: it is counted, and not in the log one by one."""


class Dropped(Exception):
    """The client is not answered by HTTP over TLS: `answer` (an alert record, or nothing) is sent, then the end."""

    def __init__(self, reason: str, answer: bytes = b"", detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.answer = answer
        self.detail = detail


class Tunnel:
    """A connection: `sock` of `peer` (an IP address; "" for a Unix socket), `accepted` at that time of the loop.

    `proxied` says that it must begin with a PROXY header.
    """

    def __init__(
        self, serving: Serving, sock: socket.socket, peer: str, accepted: float, *, proxied: bool = False
    ) -> None:
        self._serving = serving
        self._wakeup = Wakeup(serving.loop, accepted + serving.timeouts.tls_handshake)
        serving.deadlines.add(self._wakeup)
        self._client = Channel(sock, serving.readiness, self._wakeup)
        self._origin: Channel | None = None
        self._place: Place | None = None
        self._lease: Lease | None = None
        self._edits = NO_EDITS
        self._chosen: tuple[Pool, OriginAddress] | None = None
        self._record = Record(f"{_ids.getrandbits(64):016x}", peer)
        self._proxied = proxied
        self._subject = self._refused_client = ""
        self._trusted = not proxied and bool(peer and serving.trusted_proxies) and peer in serving.trusted_proxies

    async def run(  # noqa: PLR0912 - what each stage fails with, in one place
        self, on_end: Callable[[], None], on_exchange: Callable[[], None]
    ) -> None:
        """Serve the connection up to the splice, which then lives without this task, or up to its refusal.

        `on_end` is called once, when the connection has its record and its sockets are closed or closing;
        `on_exchange` when there will be no handshake, but a plain request is passed on, which may take its time.
        """
        spliced = False
        try:
            if self._proxied:
                await self._read_proxy_header()
            hello = await self._read_hello()
            site = self._choose_site(hello)
            await self._accept_tls(site)
            request, early = await self._read_request(site)
            await self._judge(request, site)
            request = await self._ask_worker(request, site)
            await self._connect(site, request)
            if isinstance(request, PlainRequest):
                on_exchange()
                return await self._pass(request, early, site)
            answer, reader = await self._ask(request, site)
            if isinstance(answer, Switched):
                self._splice(answer, early, site, on_end)
                spliced = True
            else:
                await self._relay(answer, reader)
        except Refusal as refusal:
            await self._refuse(refusal)
        except Dropped as dropped:
            self._drop(dropped)
        except ClientGone:
            self._end("client", "gone before the handshake was done")
        except asyncio.CancelledError:
            self._abort("tunnel", "closed before the handshake was done")
        except ssl.SSLError as error:
            self._abort("client", f"TLS error: {error.reason or error.strerror}")
        except OSError as error:
            self._abort("client", error.strerror or str(error))
        except Exception:
            structlog.get_logger().exception("tunnel failed", id=self._record.id)
            self._abort("tunnel", "internal error")
        finally:
            if not spliced:
                self._give_back()
                on_end()

    # accept

    async def _read_proxy_header(self) -> None:
        """Take exactly the PROXY header's bytes: what it says of the client's address is believed."""
        try:
            data = await self._client.peek(proxy_protocol.MAX_V2, 0)
            while (header := proxy_protocol.read_header(data)) is None:
                data = await self._client.peek(proxy_protocol.MAX_V2, proxy_protocol.bytes_needed(data) - 1)
            await self._client.take(header.length)
        except proxy_protocol.BadHeader as error:
            raise Dropped("PROXY header: malformed", detail=error.reason) from None
        except ClientGone:
            raise Dropped("PROXY header: client gone") from None
        except TimeoutError:
            raise Dropped("PROXY header: timed out") from None
        if header.source is not None:
            self._record.peer = self._record.client = header.source
            if objection := self._serving.firewall.objection(header.source):
                raise Dropped(objection)

    # hello

    async def _read_hello(self) -> tls_hello.ClientHello:
        """Read the ClientHello without taking it from the socket: OpenSSL wants it whole."""
        try:
            data = await self._client.peek(tls_hello.MAX_HELLO, 0)
            while (hello := tls_hello.read_client_hello(data)) is None:
                data = await self._client.peek(tls_hello.MAX_HELLO, tls_hello.bytes_needed(data) - 1)
        except tls_hello.PlainHTTP:
            raise Dropped("hello: plain HTTP", _PLAIN_HTTP) from None
        except tls_hello.NotTLS:
            raise Dropped("hello: not TLS") from None
        except tls_hello.BadHello as error:
            raise Dropped(f"hello: {error.reason}", tls_hello.alert(error.alert)) from None
        except ClientGone:
            raise Dropped("hello: client gone") from None
        except TimeoutError:
            raise Dropped("hello: timed out") from None
        return hello

    def _choose_site(self, hello: tls_hello.ClientHello) -> Site:
        """Answer what cannot be served before any cryptography is paid for."""
        record = self._record
        record.sni, record.ja4 = printable(hello.server_name or ""), hello.ja4
        if not any(version >= TLS_1_2 for version in hello.versions):
            raise Dropped("hello: no TLS 1.2 or 1.3", tls_hello.alert(tls_hello.PROTOCOL_VERSION))
        # One over ffdhe8192 takes 160 ms, in which no tunnel moves on (docs/tls.md); no client needs any.
        if hello.finite_field:
            raise Dropped("hello: key exchange over a finite field", tls_hello.alert(tls_hello.HANDSHAKE_FAILURE))
        # Python's OpenSSL completes the TLS handshake without a common protocol, against RFC 7301 section 3.2.
        if hello.alpn and b"http/1.1" not in hello.alpn:
            raise Dropped("hello: no common ALPN protocol", tls_hello.alert(tls_hello.NO_APPLICATION_PROTOCOL))
        site = self._serving.sites.choose(hello.server_name)
        if site is None:
            raise Dropped("hello: no site of this name", tls_hello.alert(tls_hello.UNRECOGNIZED_NAME))
        record.site = site.name
        return site

    # tls

    async def _accept_tls(self, site: Site) -> None:
        """Within the same time as the hello: the deadline stands since the connection was accepted."""
        try:
            context = site.context
        except CertificateError as error:
            raise Dropped("tls: out of means", detail=str(error)) from None
        self._client.sock = context.wrap_socket(
            self._client.sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        try:
            client = await self._client.do_handshake()
        except TimeoutError:
            raise Dropped("tls: timed out") from None
        except ssl.SSLError as error:
            if isinstance(error, ssl.SSLEOFError) or is_truncation(error):
                raise Dropped("tls: client gone") from None
            raise Dropped("tls: handshake failed", detail=error.reason or str(error)) from None
        except OSError as error:
            raise Dropped("tls: client gone", detail=error.strerror or str(error)) from None
        try:
            self._subject = site.client_subject(client)
        except ClientRefused as refused:
            # Once the request is there to be answered: TLS 1.3 has no alert for it any more.
            self._refused_client = str(refused)
        cipher = client.cipher()
        self._record.tls_version, self._record.cipher = client.version() or "", cipher[0] if cipher else ""

    # request

    async def _read_request(self, site: Site) -> tuple[Request, bytes]:
        """Read the one request; what came behind an upgrade request waits for the 101."""
        timeout = self._serving.timeouts.request
        self._wait_at_most(timeout)
        reader = RequestReader(site.passes)
        request = None
        record = self._record
        try:
            while request is None:
                data = await self._client.recv()
                if not data:
                    raise ClientGone
                request = reader.feed(data)
        except TimeoutError:
            raise Refusal(408, "request timed out", f"no complete request within {timeout:g} s") from None
        finally:
            # Without the query: that is where people put tokens.
            record.path = printable(reader.target.split(b"?", 1)[0].decode("ascii"))
        if self._trusted:
            record.client = client_address(request, record.peer, self._serving.trusted_proxies)
            record.id = given_id(request) or record.id
        if self._refused_client:
            raise Refusal(403, "client certificate", self._refused_client)
        # Nor may a site's certificate reach what another site has the closer name for, and its own rules.
        if self._serving.sites.choose(request.host) is not site:
            raise Refusal(421, "misdirected", "the Host field is no name of the site that this connection is for")
        return request, reader.leftover

    # firewall

    async def _judge(self, request: Request, site: Site) -> None:
        """The only look at what the client asks for; after the 101 there is none."""
        record = self._record
        self._known = Connection(
            ip=record.client,
            tls_version=record.tls_version,
            tls_cipher=record.cipher,
            tls_sni=record.sni,
            tls_ja4=record.ja4,
            client_subject=self._subject,
            site=site.name,
        )
        verdict = await self._serving.firewall.judge(request, self._known, behind=self._trusted)
        self._lease = verdict.lease
        record.firewall = verdict.facts()
        if verdict.refusal is not None:
            raise verdict.refusal

    # edge

    async def _ask_worker(self, request: Request, site: Site) -> Request:
        """Let the site's worker change the upgrade request, send it elsewhere, or refuse it."""
        edge = site.edge
        if edge is None or isinstance(request, PlainRequest):
            return request
        self._wait_at_most(edge.timeout)
        record = self._record
        assert isinstance(self._client.sock, ssl.SSLSocket)
        # Not by its subject, which may be empty: the names of workloads are often in the alternative names alone.
        der = self._client.sock.getpeercert(binary_form=True)
        directions = await edge.ask(request, self._known, record.id, der, self._wakeup, self._client)
        record.edge, self._edits = directions.saw, directions.edits
        if directions.pool is not None and directions.address is not None:
            self._chosen = directions.pool, directions.address
        return directions.request

    # origin

    async def _connect(self, site: Site, request: Request) -> None:
        """Connect to one of the origins: the next where one does not take it, as long as nothing has been sent."""
        self._wait_at_most(self._serving.timeouts.origin_connect)
        record = self._record
        pool, chosen = self._chosen or (site.pool_of(request), None)
        record.origin = str(chosen or pool.name)
        several = False
        try:
            members = await pool.order(record.client, request, self._wakeup.deadline, chosen)
            record.origin, several = members[0].text, members[-1].text != members[0].text
            header = b"" if site.edits.proxy_header == "off" else self._proxy_header(site.edits.proxy_header)
            readiness, wakeup = self._serving.readiness, self._wakeup
            self._place, self._origin = await reach(
                pool, members, preface=header, readiness=readiness, wakeup=wakeup, client=self._client
            )
            record.origin = self._place.member.text
        except OriginNotAllowed as error:
            from tlstunnel.edge.destinations import refuse_destination  # noqa: PLC0415

            raise refuse_destination(error.reason) from None
        except NoOrigin as error:
            if error.retry_after is None:
                raise Refusal(
                    502, "origin unreachable", "the origin could not be reached", detail=error.reason
                ) from None
            again = ((b"Retry-After", b"%d" % error.retry_after),)
            raise Refusal(503, "no origin", "no origin can take this now", again, error.reason) from None
        except OriginTLSFailed as error:
            text = "the TLS handshake with the origin failed"
            raise Refusal(502, error.kind, text, detail=error.reason) from None
        except OriginUnreachable as error:
            if several and not error.shortage:
                again = ((b"Retry-After", b"1"),)
                raise Refusal(503, "no origin", "no origin could be reached", again, error.reason) from None
            status, reason = (503, "out of means") if error.shortage else (502, "origin unreachable")
            raise Refusal(status, reason, "the origin could not be reached", detail=error.reason) from None
        except TimeoutError:
            raise Refusal(504, "origin connect timed out", "the origin could not be reached in time") from None

    def _proxy_header(self, version: str) -> bytes:
        """Who the client is, and what it had this listener's address for, as the origin is told before the request."""
        record, sock = self._record, self._client.sock
        peer = address_of(sock, peer=True)
        here = address_of(sock, peer=False)
        port = peer[1] if peer is not None and peer[0] == record.client else 0
        source = (record.client, port) if record.client else None
        if version == "v1":
            return proxy_protocol.write_v1(source, here)
        if version == "v2":
            return proxy_protocol.write_v2(source, here)
        tls = proxy_protocol.TLSFacts(
            record.tls_version, record.cipher, record.sni, common_name(self._subject), verified=bool(self._subject)
        )
        return proxy_protocol.write_v2(source, here, tls, record.id)

    # answer

    async def _ask(self, request: UpgradeRequest, site: Site) -> tuple[Switched | Declined, UpgradeResponseReader]:
        """Send the request on, and nothing else of the client's before the origin's 101 has been verified."""
        assert self._origin is not None
        timeout = self._serving.timeouts.origin_response
        self._wait_at_most(timeout)
        reader = UpgradeResponseReader(request)
        answer = None
        try:
            await self._origin.send(self._head(request, site))
            while answer is None:
                answer = reader.feed(await self._origin.recv(unless_gone=self._client))
        except BadResponse as error:
            self._failed(error.reason)
            raise Refusal(502, "bad answer", "the origin gave no valid answer", detail=error.reason) from None
        except TimeoutError:
            self._failed("did not answer in time")
            raise Refusal(504, "origin answer timed out", f"the origin did not answer within {timeout:g} s") from None
        except OSError as error:
            detail = explain(error)
            self._failed(detail)
            raise Refusal(502, "origin failed", "the origin closed the connection", detail=detail) from None
        self._record.status = answer.status
        self._answered()
        return answer, reader

    def _head(self, request: Request, site: Site) -> bytes:
        forwarding = Forwarding(self._record.peer, self._record.id, self._trusted)
        edits = site.edits.of(self._record.origin, self._subject)
        if self._edits is not NO_EDITS:
            edits = edits.then(self._edits)
        return forwarded_head(request, forwarding, edits)

    async def _relay(self, declined: Declined, reader: UpgradeResponseReader) -> None:
        """Pass on the origin's own refusal, whole, and end. Time counts from the last byte that got on."""
        record, timeout = self._record, self._serving.timeouts.close
        record.verdict = "pass"
        self._wait_at_most(timeout)
        try:
            out = declined.head + reader.body(None)
            await self._client.send(out)
            while not reader.complete:
                self._wait_at_most(timeout)
                # Neither has to wait while both are ready, and others would not get their turn.
                await asyncio.sleep(0)
                await self._client.send(await self._more_of(reader))
        except BadResponse as error:
            record.detail = error.reason
            return self._abort("origin", "answer cut short")
        except ClientGone:
            # With RST: close_notify would make the part look whole to a client that has only ended its own side.
            return self._abort("client", "gone before the answer was whole")
        except TimeoutError:
            return self._abort("tunnel", "answer timed out")
        self._end("origin", "declined", timeout)

    async def _more_of(self, reader: UpgradeResponseReader) -> bytes:
        assert self._origin is not None
        try:
            data = await self._origin.recv(unless_gone=self._client)
        except TimeoutError:
            raise
        except OSError as error:
            raise BadResponse(error.strerror or str(error)) from None
        return reader.body(data)

    async def _pass(self, request: PlainRequest, early: bytes, site: Site) -> None:
        """Let the origin answer a request that asks for no upgrade: the only one of its connection."""
        assert self._origin is not None
        record, timeouts = self._record, self._serving.timeouts
        exchange = Exchange(
            request,
            self._client,
            self._origin,
            head=self._head(request, site),
            early=early,
            wakeup=self._wakeup,
            timeouts=timeouts,
        )
        try:
            await exchange.run()
        except Refusal as refusal:
            if refusal.status >= 500:
                self._failed(refusal.detail or refusal.reason)
            raise
        except Broken as broken:
            record.status, record.verdict, record.detail = exchange.status, "pass", printable(broken.detail)
            # With RST: close_notify would make a part look whole.
            return self._abort(broken.who, broken.why)
        record.status, record.verdict = exchange.status, "pass"
        self._answered()
        self._end("origin", "answered", timeouts.close)

    # splice

    def _splice(self, answer: Switched, early: bytes, site: Site, on_end: Callable[[], None]) -> None:
        assert self._origin is not None
        assert isinstance(self._client.sock, ssl.SSLSocket)
        serving, record = self._serving, self._record
        serving.deadlines.discard(self._wakeup)
        record.verdict = "pass"
        serving.journal.opened(record)

        oldest: asyncio.TimerHandle | None = None

        def ended(splice: Splice) -> None:
            if oldest is not None:
                oldest.cancel()
            record.ended_by, record.reason = splice.ended_by, splice.reason
            serving.journal.ended(record, splice.up, max(splice.down, 0))
            self._give_back()
            on_end()

        splice = Splice(
            serving.splices,
            self._client.sock,
            self._origin.sock,
            to_client=answer.head + answer.leftover,
            to_origin=early,
            head=len(answer.head),
            close_timeout=serving.timeouts.close,
            idle_timeout=serving.timeouts.idle,
            site=record.site,
            on_end=ended,
        )
        if site.max_age is not None:
            age = site.max_age + site.max_age_jitter * random.random()  # noqa: S311 - spreads, and hides nothing
            oldest = serving.loop.call_later(age, splice.drain, "max age")
        splice.start()

    def _answered(self) -> None:
        assert self._place is not None
        member = self._place.member
        self._place.record_success()
        if member.tls is not None and self._origin is not None:
            member.tls.remember(self._origin, member.origin)

    def _failed(self, why: str) -> None:
        assert self._place is not None
        self._place.record_failure(why)

    def _give_back(self) -> None:
        """What was counted for this connection counts no more."""
        if self._lease is not None:
            self._lease.release()
        if self._place is not None:
            self._place.close()

    def _wait_at_most(self, seconds: float) -> None:
        self._wakeup.deadline = self._serving.loop.time() + seconds

    # What ends a connection before its splice.

    async def _refuse(self, refusal: Refusal) -> None:
        record = self._record
        record.status, record.verdict, record.detail = refusal.status, "refused", printable(refusal.detail)
        self._wait_at_most(self._serving.timeouts.close)
        try:
            await self._client.send(render(refusal, record.id))
        except (OSError, asyncio.CancelledError) as error:  # TimeoutError among them
            record.detail = record.detail or printable(str(error))
            return self._abort("tunnel", refusal.reason)
        self._end("tunnel", refusal.reason)

    def _drop(self, dropped: Dropped) -> None:
        """End a connection that never got as far as a request: counted and sampled, not recorded."""
        self._serving.journal.failed(self._record, dropped.reason, dropped.detail)
        # An alert fits into the buffer of a socket to which nothing was sent yet, or the client is gone.
        with contextlib.suppress(OSError):
            socket.socket.send(self._client.sock, dropped.answer)
        self._release()
        self._serving.closing_sockets.close_gracefully(self._client.sock)

    def _end(self, who: str, why: str, patience: float = DISCARD_SECONDS) -> None:
        """End with close_notify and FIN, so that what was sent arrives."""
        self._recorded(who, why)
        client = self._client.sock
        if isinstance(client, ssl.SSLSocket):
            # It sends close_notify and then wants the client's, which is not waited for.
            with contextlib.suppress(OSError):
                client.unwrap()
        self._release()
        self._serving.closing_sockets.close_gracefully(client, patience)

    def _abort(self, who: str, why: str) -> None:
        """End with RST."""
        self._recorded(who, why)
        self._release()
        reset(self._client.sock)

    def _recorded(self, who: str, why: str) -> None:
        record = self._record
        record.ended_by, record.reason = who, why
        if record.tls_version:
            self._serving.journal.ended(record)
        else:
            self._serving.journal.failed(record, f"tls: {why}")

    def _release(self) -> None:
        self._serving.deadlines.discard(self._wakeup)
        self._client.release()
        if self._origin is not None:
            self._origin.release()
            self._origin.sock.close()
