"""A turn returns what it holds once, however it ends; and one client may have several turns in a row."""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.handshakes import FIELDS, request
from tlstunnel.addresses import Networks, OriginAddress
from tlstunnel.certificates import issue
from tlstunnel.certificates.pairs import PairFiles
from tlstunnel.certificates.store import Certificates
from tlstunnel.config import Config, OriginConfig, SiteConfig
from tlstunnel.firewall.verdict import Firewall, Verdict
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader
from tlstunnel.handshake.response import Switched
from tlstunnel.journal.events import EndedBy, Event, Reason
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record
from tlstunnel.origins.place import Place
from tlstunnel.origins.pool import Pool
from tlstunnel.sockets.channel import Channel, ClientGone
from tlstunnel.sockets.closing import ClosingSockets
from tlstunnel.sockets.deadlines import Deadlines
from tlstunnel.sockets.readiness import readiness
from tlstunnel.tls.stream import NotEmpty
from tlstunnel.tunnel import ends, tunnel
from tlstunnel.tunnel.arrival import accept_tls, choose_site, read_hello
from tlstunnel.tunnel.client import Client
from tlstunnel.tunnel.exchange import pass_on
from tlstunnel.tunnel.lifetimes import Lifetimes
from tlstunnel.tunnel.opening import open_tunnel
from tlstunnel.tunnel.origin import reach_origin
from tlstunnel.tunnel.request import call_worker, check_firewall, read_request
from tlstunnel.tunnel.serving import Availability, Serving
from tlstunnel.tunnel.sites import Site, Sites
from tlstunnel.tunnel.splice import Splices
from tlstunnel.tunnel.stages import Stages
from tlstunnel.tunnel.turn import Turn

SECONDS = 20.0


class CountedLease:
    """A lease that counts how often it is returned."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Origin:
    """Responds to one request on each connection."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = OriginAddress("127.0.0.1", self.listener.getsockname()[1])
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with sock:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += sock.recv(65_536)
                target = head.split(b" ")[1]
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(target), target))


@pytest.fixture
def origin() -> Iterator[Origin]:
    made = Origin()
    yield made
    made.listener.shutdown(socket.SHUT_RDWR)
    made.listener.close()


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> issue.Issued:
    return issue.create([], tmp_path_factory.mktemp("certs"))


@pytest.fixture
def site(origin: Origin, issued: issue.Issued) -> Site:
    served = Certificates().serve((PairFiles(issued.cert, issued.key),))
    pool = Pool((OriginConfig(address=origin.address),))
    return Site(frozenset({"localhost"}), "localhost", served, pool, passes=True)


class Process:
    """The part of a serving process that one connection needs."""

    def __init__(self, site: Site) -> None:
        loop = asyncio.get_running_loop()
        config = Config(sites=(SiteConfig(names=("localhost",)),))
        self.readiness = readiness(loop)
        closing = ClosingSockets(self.readiness, loop)
        self.sites = Sites([site], None)
        self.journal = Journal()
        self.records: list[Record] = []
        self.journal.listeners.append(self._take)
        splices = Splices(closing)
        self.serving = Serving(
            sites=self.sites,
            timeouts=config.timeouts,
            trusted_proxies=Networks.parse(()),
            proxied_on=frozenset(),
            journal=self.journal,
            firewall=Firewall(config),
            loop=loop,
            readiness=self.readiness,
            deadlines=Deadlines(loop, 0.05),
            closing_sockets=closing,
            splices=splices,
            lifetimes=Lifetimes(splices),
            health_addresses=Networks.parse(()),
            availability=Availability(),
            stages=Stages(self.journal.metrics),
        )
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.sock = ours

    def _take(self, event: Event, record: Record) -> None:
        if event == Event.CONNECTION:
            self.records.append(record)

    async def close(self) -> None:
        self.serving.closing_sockets.reset_all()
        self.serving.splices.close()
        await self.sites.close()
        self.peer.close()
        self.readiness.close()


def run(site: Site, test: Callable[[Process], Any]) -> None:
    async def main() -> None:
        process = Process(site)
        try:
            async with asyncio.timeout(SECONDS):
                await test(process)
        finally:
            await process.close()

    asyncio.run(main())


class Uncounted:
    """Counts nothing, and fails the test if a plain request is passed on."""

    def identify(self, ip: str) -> None:
        pass

    def begin_upload(self, ip: str) -> bool:
        pytest.fail(ip)

    def begin_exchange(self) -> None:
        pytest.fail("an exchange")

    def begin_response(self) -> None:
        pytest.fail("a response")


def hold(turn: Turn) -> CountedLease:
    """Give `turn` a lease and a place at the origin."""
    lease = CountedLease()
    turn.verdict = Verdict(lease=lease)  # type: ignore[arg-type]
    turn.place = Place(turn.site.pool, turn.site.pool.members[0], "192.0.2.1")
    return lease


def tls_error(reason: str) -> ssl.SSLError:
    """Return an error as OpenSSL raises it."""
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


def test_a_client_may_have_one_turn_after_another(site: Site, issued: issue.Issued) -> None:
    """The tunnel serves one request a connection; a second one needs only this loop."""
    bodies = []

    def ask(sock: socket.socket, ca: Path) -> None:
        context = ssl.create_default_context(cafile=ca)
        context.set_alpn_protocols(["http/1.1"])
        sock.settimeout(SECONDS)
        with context.wrap_socket(sock, server_hostname="localhost") as tls:
            for target in (b"/first", b"/second"):
                tls.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % target)
                response = b""
                while not response.endswith(target):
                    response += tls.recv(65_536)
                bodies.append(response.rpartition(b"\r\n\r\n")[2])
            assert tls.recv(1) == b""

    async def serve(process: Process) -> None:
        thread = asyncio.get_running_loop().run_in_executor(None, ask, process.peer, issued.ca)
        client = Client(process.serving, process.sock, "", asyncio.get_running_loop().time(), proxied=False)
        await accept_tls(client, choose_site(client, await read_hello(client)))
        turns, leases, places = [], [], []
        for _ in range(2):
            turn = Turn(client, asyncio.get_running_loop().time())
            try:
                await read_request(turn)
                await check_firewall(turn)
                await call_worker(turn)
                await reach_origin(turn)
                leases.append(lease := CountedLease())
                turn.verdict = Verdict(lease=lease)  # type: ignore[arg-type]
                end = await pass_on(turn, lambda: None)
                ends.write_record(turn, end)
            finally:
                turn.close()
            turns.append(turn)
            places.append(turn.place)
            assert turn.site.pool.members[0].tunnels == 0
        ends.close_connection(client, end)
        await thread
        assert [turn.record.path for turn in turns] == ["/first", "/second"]
        assert turns[0].record.id != turns[1].record.id
        assert [turn.client for turn in turns] == [client, client]
        assert [lease.closed for lease in leases] == [1, 1]
        assert places[0] is not places[1]
        assert all(place is not None and place.closed for place in places)
        records = [(record.path, record.status, record.reason) for record in process.records]
        assert records == [("/first", 200, Reason.RESPONDED), ("/second", 200, Reason.RESPONDED)]

    run(site, serve)
    assert bodies == [b"/first", b"/second"]


def test_each_of_two_turns_is_closed_once(site: Site) -> None:
    async def check(process: Process) -> None:
        client = Client(process.serving, process.sock, "192.0.2.1", 0.0, proxied=False)
        client.site = process.sites.choose("localhost")
        first, second = Turn(client, 0.0), Turn(client, 1.0)
        leases = hold(first), hold(second)
        member = first.site.pool.members[0]
        assert member.tunnels == 2
        for _ in range(3):
            first.close()
        assert [lease.closed for lease in leases] == [1, 0]
        assert member.tunnels == 1
        assert "closed" in repr(first)
        assert "closed" not in repr(second)
        second.close()
        first.close()
        assert [lease.closed for lease in leases] == [1, 1]
        assert member.tunnels == 0
        client.release()
        process.sock.close()

    run(site, check)


def test_a_tunnel_that_cannot_begin_leaves_everything_with_its_turn(site: Site, issued: issue.Issued) -> None:
    def connect(sock: socket.socket, ca: Path) -> None:
        context = ssl.create_default_context(cafile=ca)
        sock.settimeout(SECONDS)
        with context.wrap_socket(sock, server_hostname="localhost") as tls, contextlib.suppress(OSError):
            tls.recv(1)

    async def serve(process: Process) -> None:
        loop = asyncio.get_running_loop()
        thread = loop.run_in_executor(None, connect, process.peer, issued.ca)
        client = Client(process.serving, process.sock, "", loop.time(), proxied=False)
        await accept_tls(client, choose_site(client, await read_hello(client)))
        turn = Turn(client, loop.time())
        lease, (ours, theirs) = hold(turn), socket.socketpair()
        turn.origin = Channel(ours, process.readiness, client.wakeup)
        assert client.channel.tls is not None
        client.channel.tls._pair.incoming.write(b"of another connection")
        with theirs, pytest.raises(NotEmpty):
            open_tunnel(turn, Switched(b"head", b""), lambda: pytest.fail("it began"))
        assert lease.closed == 0
        turn.close()
        assert lease.closed == 1
        assert turn.site.pool.members[0].tunnels == 0
        assert ours.fileno() < 0
        ends.close_connection(client, ends.End(EndedBy.TUNNEL, Reason.INTERNAL_ERROR, reset=True))
        await thread

    run(site, serve)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Refusal(502, Reason.ORIGIN_FAILED, "no"), Reason.ORIGIN_FAILED),
        (ClientGone(), Reason.CLOSED_DURING_HANDSHAKE),
        (asyncio.CancelledError(), Reason.HANDSHAKE_ABORTED),
        (tls_error("BAD_RECORD"), f"{Reason.TLS_ERROR}: BAD_RECORD"),
        (OSError(104, "reset"), f"{Reason.SOCKET_ERROR}: reset"),
        (RuntimeError("a bug"), Reason.INTERNAL_ERROR),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_turn_is_closed_whatever_a_stage_raises(
    monkeypatch: pytest.MonkeyPatch, site: Site, error: BaseException, reason: str
) -> None:
    leases: list[CountedLease] = []

    async def skip(*_: object) -> None:
        pass

    def choose(client: Client, _: object) -> None:
        client.site = client.serving.sites.choose("localhost")

    async def hold_something(turn: Turn) -> None:
        turn.request = RequestReader().feed(request(FIELDS))
        leases.append(hold(turn))

    async def fail(_: Turn) -> None:
        raise error

    for name, stage in (
        ("read_hello", skip),
        ("choose_site", choose),
        ("accept_tls", skip),
        ("read_request", skip),
        ("check_firewall", skip),
        ("call_worker", skip),
        ("check_request", lambda _: None),
        ("reach_origin", hold_something),
        ("request_upgrade", fail),
    ):
        monkeypatch.setattr(tunnel, name, stage)

    async def check(process: Process) -> None:
        ended: list[int] = []
        member = next(iter(process.sites.pools))[1].members[0]
        made = tunnel.Tunnel(process.serving, process.sock, "192.0.2.1", 0.0)
        await made.run(lambda: ended.append(member.tunnels), Uncounted())
        assert ended == [0]
        assert "closed" in repr(made)
        assert [record.reason for record in process.records] == [reason]

    run(site, check)
    assert [lease.closed for lease in leases] == [1]
