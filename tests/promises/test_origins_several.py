"""Several origins: balance, failover when some are down, full, slow or gone, and what survives a reload."""

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import (
    TIMEOUT,
    Certificate,
    RawOrigin,
    Response,
    Tunnel,
    accept_upgrade,
    connect_tls,
    eventually,
    receive_all,
    receive_exactly,
    upgrade,
)
from tests.promises.firewalled import config_for, tunnel_to


class Origin:
    """Accepts every handshake, sends its name in a frame, counts, and can go away and come back on its port."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.heads: list[str] = []
        self._raw = RawOrigin(self._handle)
        self._raw.__enter__()
        self.address = self._raw.address

    def _handle(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self.heads.append(accept_upgrade(sock).line.split()[1])
            sock.sendall(b"\x81" + bytes([len(self.name)]) + self.name)
            while sock.recv(4096):
                pass

    def kill(self) -> None:
        self._raw.__exit__(None, None, None)

    def revive(self) -> None:
        self._raw = RawOrigin(self._handle, port=int(self.address.rpartition(":")[2]))
        self._raw.__enter__()


@pytest.fixture
def origins() -> Iterator[list[Origin]]:
    made = [Origin(b"a"), Origin(b"b"), Origin(b"c")]
    yield made
    for origin in made:
        with contextlib.suppress(Exception):
            origin.kill()


def several(origins: list[Origin], certificate: Certificate, more: str = "", top: str = "") -> str:
    listed = ", ".join(f'"{origin.address}"' for origin in origins)
    return config_for(origins[0].address, certificate, top=top, site=more).replace(
        f'["{origins[0].address}"]', f"[{listed}]", 1
    )


def serving(origins: list[Origin], certificate: Certificate, more: str = "", top: str = "") -> Tunnel:
    return Tunnel(None, certificate, config=several(origins, certificate, more, top))


@contextlib.contextmanager
def opened(tunnel: Tunnel, path: str = "/", *headers: tuple[str, str]) -> Iterator[tuple[bytes, Response]]:
    """Open a tunnel; return it and the name of its origin, b"" if there is none."""
    with connect_tls(tunnel) as client:
        answer = upgrade(client, path, headers)
        if answer.status != 101:
            receive_all(client)
            yield b"", answer
            return
        frame = answer.leftover
        frame += receive_exactly(client, 3 - len(frame))
        yield frame[2:], answer


def name_of(tunnel: Tunnel, path: str = "/", *headers: tuple[str, str]) -> bytes:
    with opened(tunnel, path, *headers) as (name, answer):
        assert answer.status == 101
        return name


def test_round_robin(origins: list[Origin], certificate: Certificate) -> None:
    with serving(origins, certificate) as tunnel:
        assert Counter(name_of(tunnel) for _ in range(30)) == {b"a": 10, b"b": 10, b"c": 10}
        assert {record["origin"] for record in tunnel.wait_records(30)} == {origin.address for origin in origins}


def test_weights_and_backups(origins: list[Origin], certificate: Certificate) -> None:
    a, b, c = origins
    text = config_for(a.address, certificate).replace(
        f'["{a.address}"]',
        f'[{{ address = "{a.address}", weight = 3 }}, "{b.address}", {{ address = "{c.address}", backup = true }}]',
    )
    with Tunnel(None, certificate, config=text) as tunnel:
        assert Counter(name_of(tunnel) for _ in range(20)) == {b"a": 15, b"b": 5}
        a.kill()
        assert {name_of(tunnel) for _ in range(10)} == {b"b"}
        b.kill()
        assert {name_of(tunnel) for _ in range(10)} == {b"c"}


def test_least_tunnels(origins: list[Origin], certificate: Certificate) -> None:
    with serving(origins, certificate, 'balance = "least_tunnels"') as tunnel, contextlib.ExitStack() as stack:
        names = [stack.enter_context(opened(tunnel))[0] for _ in range(9)]
        assert Counter(names) == {b"a": 3, b"b": 3, b"c": 3}
        stack.close()
        tunnel.wait_records(9)
        # All counts decrease again.
        names = [stack.enter_context(opened(tunnel))[0] for _ in range(9)]
        assert Counter(names) == {b"a": 3, b"b": 3, b"c": 3}


def test_a_client_returns_to_its_origin(origins: list[Origin], certificate: Certificate) -> None:
    with serving(origins, certificate, 'balance = "hash:cookie:sid"') as tunnel:
        first = {number: name_of(tunnel, "/", ("Cookie", f"sid={number}")) for number in range(40)}
        assert len(set(first.values())) == 3
        assert first == {number: name_of(tunnel, "/", ("Cookie", f"sid={number}")) for number in range(40)}
        origins[1].kill()
        after = {number: name_of(tunnel, "/", ("Cookie", f"sid={number}")) for number in range(40)}
        assert all(after[number] == name for number, name in first.items() if name != b"b")


def test_an_origin_that_refuses_fails_no_handshake(origins: list[Origin], certificate: Certificate) -> None:
    with serving(origins, certificate) as tunnel:
        origins[0].kill()
        assert Counter(name_of(tunnel) for _ in range(20))[b"a"] == 0
        (record,) = tunnel.wait_records(1, "origin ejected")
        assert (record["origin"], record["reason"]) == (origins[0].address, "Connection refused")
        origins[0].revive()
        # Within the delay of a second or a few, which later failures have doubled.
        eventually(lambda: name_of(tunnel) == b"a", timeout=20)
        tunnel.wait_records(1, "origin restored")
        assert Counter(name_of(tunnel) for _ in range(30)) == {b"a": 10, b"b": 10, b"c": 10}


def test_no_origin_left_is_503_until_one_is_back(origins: list[Origin], certificate: Certificate) -> None:
    with serving(origins, certificate) as tunnel:
        for origin in origins:
            origin.kill()
        for _ in range(12):
            with opened(tunnel) as (_, answer):
                assert answer.status == 503
                assert 1 <= int(answer.headers["Retry-After"]) <= 2
        record = tunnel.wait_records(12)[-1]
        assert (record["reason"], record["verdict"]) == ("no origin", "refused")
        origins[2].revive()
        began = time.monotonic()

        def answered() -> bool:
            with opened(tunnel) as (name, _):
                return name == b"c"

        eventually(answered)
        assert time.monotonic() - began < 5


@contextlib.contextmanager
def picky() -> Iterator[RawOrigin]:
    """An origin that closes the connection for any path but /, and serves plain requests once it has their body."""

    def handle(sock: socket.socket) -> None:
        with contextlib.suppress(OSError, AssertionError):
            head = sock.recv(65_536, socket.MSG_PEEK)
            if head.startswith(b"GET / "):
                accept_upgrade(sock)
                sock.sendall(b"\x81\x01p")
            elif head.startswith(b"GET /nope"):
                return
            while sock.recv(65_536):
                pass

    with RawOrigin(handle) as origin:
        yield origin


def test_no_client_takes_a_site_down(certificate: Certificate) -> None:
    """By asking for a path for which each origin closes the connection, or by sending bodies slowly."""
    with picky() as one, picky() as two, contextlib.ExitStack() as stack:
        text = config_for(one.address, certificate, site='http = "pass"\n').replace(
            f'["{one.address}"]', f'["{one.address}", "{two.address}"]'
        )
        tunnel = stack.enter_context(Tunnel(None, certificate, config=text))
        for _ in range(12):
            with opened(tunnel, "/nope") as (_, answer):
                assert answer.status == 502
        for _ in range(4):
            slow = stack.enter_context(connect_tls(tunnel))
            slow.sendall(b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nx")
        for _ in range(10):
            assert name_of(tunnel) == b"p"
        assert {record["origin"] for record in tunnel.wait_records(22)} == {one.address, two.address}
        assert not tunnel.records("origin ejected")


def test_an_only_origin_is_always_tried(origins: list[Origin], certificate: Certificate) -> None:
    with serving(origins[:1], certificate) as tunnel:
        origins[0].kill()
        for _ in range(10):
            with opened(tunnel) as (_, answer):
                assert answer.status == 502
        origins[0].revive()
        assert name_of(tunnel) == b"a"


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """An address that neither accepts nor refuses a connection: its backlog is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_another_is_tried_alongside_one_that_does_not_respond(origins: list[Origin], certificate: Certificate) -> None:
    with silent() as address:
        text = config_for(address, certificate).replace(f'["{address}"]', f'["{address}", "{origins[0].address}"]')
        with Tunnel(None, certificate, config=text) as tunnel:
            for _ in range(4):
                began = time.monotonic()
                assert name_of(tunnel) == b"a"
                assert time.monotonic() - began < 4
            descriptors = tunnel.descriptors()
            assert name_of(tunnel) == b"a"
            eventually(lambda: tunnel.descriptors() <= descriptors)


def test_the_limit_of_tunnels_of_an_origin(origins: list[Origin], certificate: Certificate) -> None:
    a, b, _ = origins
    text = config_for(a.address, certificate).replace(
        f'["{a.address}"]',
        f'[{{ address = "{a.address}", max_tunnels = 2 }}, {{ address = "{b.address}", max_tunnels = 3 }}]',
    )
    with Tunnel(None, certificate, config=text) as tunnel, contextlib.ExitStack() as stack:
        names = [stack.enter_context(opened(tunnel))[0] for _ in range(5)]
        assert Counter(names) == {b"a": 2, b"b": 3}
        with opened(tunnel) as (_, answer):
            assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        # Also through a reload, which keeps the count.
        changed = text.replace("max_tunnels = 3", "max_tunnels = 4")
        assert tunnel.reload(changed) == ["site localhost: changed: origins"]
        assert stack.enter_context(opened(tunnel))[0] == b"b"
        with opened(tunnel) as (_, answer):
            assert answer.status == 503
        stack.close()
        eventually(lambda: len(tunnel.records("connection")) >= 8)
        assert {name_of(tunnel) for _ in range(4)} == {b"a", b"b"}


def test_the_limit_is_exact_with_many_at_once(origins: list[Origin], certificate: Certificate) -> None:
    a = origins[0]
    text = config_for(a.address, certificate).replace(
        f'["{a.address}"]', f'[{{ address = "{a.address}", max_tunnels = 20 }}]'
    )
    done = threading.Event()

    def one(_: int) -> int:
        with opened(tunnel) as (_name, answer):
            if answer.status == 101:
                done.wait(TIMEOUT)
            return answer.status

    with Tunnel(None, certificate, config=text) as tunnel, ThreadPoolExecutor(60) as threads:
        handshakes = [threads.submit(one, number) for number in range(60)]
        eventually(lambda: sum(one.done() for one in handshakes) == 40)
        done.set()
        assert Counter(one.result() for one in handshakes) == {101: 20, 503: 40}


def test_routes(origins: list[Origin], certificate: Certificate) -> None:
    a, b, c = origins
    more = (
        f'[[sites.routes]]\npath = "/admin/"\norigins = ["{b.address}"]\n'
        f'[[sites.routes]]\npath = "/ad"\norigins = ["{c.address}"]\n'
    )
    with tunnel_to(a.address, certificate, site=more) as tunnel:
        for path, name in (
            ("/", b"a"),
            ("/chat?x=/admin/", b"a"),
            ("/admin/", b"b"),
            ("/admin/x?y", b"b"),
            ("/admin", b"c"),
            ("/ads", b"c"),
            ("/%61dmin/%78", b"b"),
        ):
            assert name_of(tunnel, path) == name, path
        # The origin gets what the client sent.
        assert "/%61dmin/%78" in b.heads


def test_health_checks_exclude_an_origin_before_any_request_fails(
    origins: list[Origin], certificate: Certificate, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"

    def sometimes(sock: socket.socket) -> None:
        with contextlib.suppress(OSError, AssertionError):
            if broken.exists():
                sock.recv(4096)
                sock.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
                return
            accept_upgrade(sock)
            sock.sendall(b"\x81\x01s")
            while sock.recv(4096):
                pass

    health = 'health = { type = "websocket", path = "/health", interval = "100ms", timeout = "2s" }\n'
    with RawOrigin(sometimes) as raw:
        text = config_for(raw.address, certificate, site=health).replace(
            f'["{raw.address}"]', f'["{raw.address}", "{origins[0].address}"]'
        )
        with Tunnel(None, certificate, config=text) as tunnel:
            assert {name_of(tunnel) for _ in range(4)} == {b"s", b"a"}
            assert eventually(lambda: "/health" in origins[0].heads)
            broken.touch()
            record = tunnel.wait_records(1, "origin down")[0]
            assert (record["origin"], record["reason"]) == (raw.address, "status 500 instead of 101")
            assert {name_of(tunnel) for _ in range(6)} == {b"a"}
            broken.unlink()
            tunnel.wait_records(1, "origin up")
            assert {name_of(tunnel) for _ in range(4)} == {b"s", b"a"}
            # A reload leaves one check for each origin, not two.
            tunnel.reload()
            tunnel.reload()
            assert {name_of(tunnel) for _ in range(4)} == {b"s", b"a"}


def test_origins_change_and_tunnels_of_removed_ones_stay(origins: list[Origin], certificate: Certificate) -> None:
    a, b, _ = origins
    with serving([a], certificate) as tunnel, connect_tls(tunnel) as client:
        answer = upgrade(client)
        assert answer.leftover + receive_exactly(client, 3 - len(answer.leftover)) == b"\x81\x01a"
        assert tunnel.reload(several([b], certificate)) == ["site localhost: changed: origins"]
        assert {name_of(tunnel) for _ in range(3)} == {b"b"}
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)


ASKERS = 8


def test_origins_killed_and_revived_under_load(origins: list[Origin], certificate: Certificate) -> None:
    """New handshakes fail over; only requests already sent to an origin that dies are lost; nothing is left behind."""
    with serving(origins, certificate) as tunnel:
        assert name_of(tunnel) in {b"a", b"b", b"c"}
        descriptors = tunnel.descriptors()
        over = threading.Event()
        names: list[bytes] = []
        cut: list[int] = []

        def ask() -> None:
            while not over.is_set():
                try:
                    with opened(tunnel) as (name, answer):
                        (names if answer.status == 101 else cut).append(name or answer.status)  # type: ignore[arg-type]
                except AssertionError:
                    cut.append(101)  # its origin died between the 101 and its first message

        with ThreadPoolExecutor(ASKERS) as threads:
            asking = [threads.submit(ask) for _ in range(ASKERS)]
            for victim in (0, 1, 2, 1):
                came = len(names)
                origins[victim].kill()
                eventually(lambda came=came: len(names) > came + 40, timeout=30)  # type: ignore[misc]
                origins[victim].revive()
                back = len(names)
                eventually(lambda back=back, v=victim: origins[v].name in names[back:], timeout=30)  # type: ignore[misc]
            over.set()
            for one in asking:
                one.result(TIMEOUT)
        # Those in progress at each of four deaths; a 503 would mean that no origin was available.
        assert set(cut) <= {101, 502}
        assert len(cut) <= 4 * ASKERS
        refused = [record["reason"] for record in tunnel.records("connection") if record["status"] != 101]
        assert set(refused) <= {"origin failed", "invalid response"}
        even = Counter(name_of(tunnel) for _ in range(60))
        assert all(count == pytest.approx(20, abs=1) for count in even.values()), even
        eventually(lambda: tunnel.descriptors() <= descriptors + 1)
