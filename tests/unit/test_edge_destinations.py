"""The origins that a worker may choose: the declared ones and those in `worker_origins`, however they are spelled."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.handshakes import FIELDS, request
from tlstunnel.addresses import OriginAddress
from tlstunnel.config import OriginConfig
from tlstunnel.edge import destinations
from tlstunnel.edge.destinations import Destinations
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader, UpgradeRequest
from tlstunnel.origins.errors import NoOrigin, OriginNotAllowed
from tlstunnel.origins.pool import Pool

DECLARED = ("10.0.0.5:3000", "wss://chat.internal:443", "unix:/run/chat.sock", "[fd00::1]:3000")


def made(*allowed: str, declared: tuple[str, ...] = DECLARED) -> Destinations:
    pool = Pool(tuple(OriginConfig(address=OriginAddress.parse(text)) for text in declared))
    return Destinations([pool], allowed)


def allowed(where: Destinations, text: str) -> bool:
    """Return whether the worker may choose this origin, as far as that is known without resolving names."""
    try:
        where.pool(OriginAddress.parse(text))
    except Refusal as error:
        refusal = error
    else:
        return True
    assert (refusal.status, refusal.reason) == (502, "edge: origin not allowed")
    assert "worker_origins" in refusal.detail or "one of the site's origins" in refusal.detail
    assert text.rpartition(":")[0] not in refusal.text
    return False


# --- declared ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [*DECLARED, "ws://10.0.0.5:3000/", "wss://CHAT.internal.", "wss://chat.internal", "[FD00:0:0::1]:3000"],
)
def test_declared_origins_are_allowed(text: str) -> None:
    """In every spelling."""
    assert allowed(made(), text)


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.5:3001",
        "10.0.0.6:3000",
        "wss://10.0.0.5:3000",
        "chat.internal:443",
        "wss://chat.internal:444",
        "unix:/run/other.sock",
        "unix:/run/../run/chat.sock",
        "[fd00::1]:3001",
        "[fd00::1%eth0]:3000",
        "[::ffff:10.0.0.5]:3000",
        "a.chat.internal:443",
    ],
)
def test_another_port_scheme_or_spelling_is_another_origin(text: str) -> None:
    assert not allowed(made(), text)


def test_origins_of_routes_are_declared_too() -> None:
    pools = [Pool((OriginConfig(address=OriginAddress("a.example", port)),)) for port in (1, 2)]
    where = Destinations(pools, [])
    assert where.pool(OriginAddress("a.example", 2)) is pools[1]
    assert where.pool(OriginAddress("a.example", 1)) is pools[0]


def test_a_declared_origin_keeps_its_pool() -> None:
    """So its failures, its limit of tunnels and its health checks are those of the site."""
    pool = Pool(
        (OriginConfig(address=OriginAddress("10.0.0.5", 1)), OriginConfig(address=OriginAddress("10.0.0.6", 1)))
    )
    where = Destinations([pool], ["10.0.0.0/8"])
    assert where.pool(OriginAddress("10.0.0.6", 1)) is pool

    async def order() -> list[Any]:
        return await pool.order(*_asking(), 1e12, OriginAddress("10.0.0.6", 1))

    assert [member.text for member in asyncio.run(order())] == ["10.0.0.6:1"]


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "inside", "outside"),
    [
        ("10.0.0.0/8", "10.0.0.0 10.255.255.255 ws://10.1.2.3 wss://10.1.2.3", "11.0.0.0 9.255.255.255"),
        ("192.0.2.1/32", "192.0.2.1", "192.0.2.2 192.0.2.0"),
        (
            "10.0.0.0/8",
            "[::ffff:10.0.0.1] [::ffff:a00:1]",
            "[::ffff:11.0.0.1] [::10.0.0.1] [64:ff9b::a00:1]",
        ),
        ("2001:db8::/32", "[2001:db8::1] [2001:DB8:0:0::1]", "[2001:db9::1] [::1] 10.0.0.1"),
        ("fe80::/10", "[fe80::1] [fe80::1%eth0]", "[fec0::1%eth0]"),
        ("::1/128", "[::1] [::1%lo]", "127.0.0.1 [::] 0.0.0.0"),
        ("127.0.0.0/8", "127.0.0.1", "0.0.0.0 [::] [::1]"),
        ("0.0.0.0/0", "192.0.2.1 [::ffff:1.2.3.4]", "[::1] [2001:db8::1]"),
    ],
)
def test_networks(network: str, inside: str, outside: str) -> None:
    where = made(network)
    assert [text for text in inside.split() if not allowed(where, f"{text}:80")] == []
    assert [text for text in outside.split() if allowed(where, f"{text}:80")] == []


@given(st.ip_addresses(), st.sampled_from(["10.0.0.0/8", "192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0", "fe80::/10"]))
def test_an_address_is_allowed_only_if_it_is_in_the_network(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, network: str
) -> None:
    text = f"[{address}]:80" if address.version == 6 else f"{address}:80"
    plain = (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address
    assert allowed(made(network), text) == (plain in ipaddress.ip_network(network))


def test_a_unix_socket_is_in_no_network() -> None:
    assert not allowed(made("0.0.0.0/0", "::/0", "localhost"), "unix:/run/other.sock")


@pytest.mark.parametrize(
    "text",
    [
        "127.1:80",
        "0x7f.1:80",
        "0x7f000001:80",
        "2130706433:80",
        "0177.0.0.1:80",
        "127.0.0.1.:80",
        "1e3:80",
        "①:80",
        "127。0。0。1:80",
    ],
)
def test_what_resolvers_accept_as_an_address_is_not_a_name(text: str) -> None:
    """Or it is parsed as the address that it stands for."""
    try:
        address = OriginAddress.parse(text)
    except ValueError:
        return
    assert not allowed(made("localhost"), str(address))
    with pytest.raises(OSError, match=r"."):
        socket.getaddrinfo(address.host, 80, flags=socket.AI_NUMERICHOST)


@given(st.from_regex(r"\A(0[xX])?[0-9a-fA-F]{1,10}(\.(0[xX])?[0-9a-fA-F]{1,6}){0,4}\.?\Z"))
def test_a_name_is_never_read_as_an_address_by_a_resolver(host: str) -> None:
    """Otherwise a name that a wildcard allows could be an address that is not allowed."""
    try:
        address = OriginAddress.parse(f"{host}:80")
    except ValueError:
        return
    try:
        socket.getaddrinfo(address.host, 80, flags=socket.AI_NUMERICHOST)
    except OSError:
        return
    assert str(ipaddress.ip_address(address.host or "")) == address.host


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        (
            "chat.internal",
            "chat.internal CHAT.Internal. wss://chat.internal",
            "a.chat.internal xchat.internal internal chat.internal.evil.example",
        ),
        (
            "*.shards.internal",
            "a.shards.internal A.SHARDS.internal.",
            "shards.internal a.b.shards.internal ashards.internal a.shards.internal.evil.example",
        ),
        ("bücher.example", "", "bucher.example"),
        ("xn--bcher-kva.example", "bücher.example BÜCHER.example", ""),
        ("localhost", "localhost", "127.0.0.1 [::1] localhost.localdomain"),
        ("192.0.2.1", "192.0.2.1", "192.0.2.2 [::ffff:192.0.2.2]"),
    ],
)
def test_names(name: str, inside: str, outside: str) -> None:
    where = made(name)
    assert [text for text in inside.split() if not allowed(where, f"{text}:80")] == []
    assert [text for text in outside.split() if allowed(where, f"{text}:80")] == []


def test_a_name_outside_is_not_resolved_without_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a client that chooses names could make the tunnel send DNS queries."""
    asked_for: list[Any] = []
    where = made("chat.internal")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked_for.append(arguments))
    assert not allowed(where, "secret.evil.example:80")
    assert asked_for == []


def _asking() -> tuple[str, UpgradeRequest]:
    found = RequestReader().feed(request(FIELDS))
    assert found is not None
    return "192.0.2.1", found


Resolve = Callable[..., list[tuple[Any, ...]]]


def _resolving(**names: list[str]) -> Resolve:
    """Return a resolver that knows these names."""

    def getaddrinfo(host: str, port: int, *_: Any, flags: int = 0, **__: Any) -> list[tuple[Any, ...]]:
        found = names.get(host.replace(".", "_").replace("-", "_"))
        if flags & socket.AI_NUMERICHOST or found is None:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in found
        ]

    return getaddrinfo


def _members(where: Destinations, text: str) -> list[str]:
    """Return the addresses that would be tried."""

    async def order() -> list[str]:
        address = OriginAddress.parse(text)
        pool = where.pool(address)
        try:
            return sorted({str(member.address[0]) for member in await pool.order(*_asking(), 1e12, address)})
        finally:
            await where.close()

    return asyncio.run(order())


def test_only_addresses_in_the_networks_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        socket, "getaddrinfo", _resolving(shard_internal=["10.0.0.7", "192.0.2.9", "::ffff:10.0.0.8", "2001:db8::1"])
    )
    assert _members(made("10.0.0.0/8"), "shard.internal:80") == ["10.0.0.7", "::ffff:10.0.0.8"]
    assert _members(made("2001:db8::/32"), "shard.internal:80") == ["2001:db8::1"]


@pytest.mark.parametrize(
    "addresses", [["192.0.2.9"], ["::1", "127.0.0.1"], ["169.254.169.254"], ["0.0.0.0"], ["::ffff:127.0.0.1"]]
)
def test_a_name_that_resolves_outside_the_networks_is_refused(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    """It is refused as not allowed, not as unreachable."""
    monkeypatch.setattr(socket, "getaddrinfo", _resolving(evil_example=addresses))
    with pytest.raises(OriginNotAllowed) as caught:
        _members(made("10.0.0.0/8"), "evil.example:80")
    assert "worker_origins" in caught.value.reason


def test_an_unknown_name_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _resolving())
    with pytest.raises(NoOrigin) as caught:
        _members(made("10.0.0.0/8"), "none.example:80")
    assert not isinstance(caught.value, OriginNotAllowed)


def test_an_allowed_name_may_resolve_to_any_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _resolving(shard_internal=["192.0.2.9"]))
    assert _members(made("10.0.0.0/8", "shard.internal"), "shard.internal:80") == ["192.0.2.9"]
    assert _members(made("*.internal"), "shard.internal:80") == ["192.0.2.9"]


def test_a_name_that_moves_outside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The DNS of someone else may change its answers; every answer is checked against the networks."""
    answers = iter([["10.0.0.7"], ["192.0.2.9"]])
    last: list[str] = ["192.0.2.9"]

    def getaddrinfo(host: str, port: int, *_: Any, flags: int = 0, **__: Any) -> list[tuple[Any, ...]]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in next(answers, last)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    where = Destinations([], ["10.0.0.0/8"], resolve_every=0.0)
    address = OriginAddress.parse("moves.example:80")

    async def run() -> None:
        pool = where.pool(address)
        assert [member.address for member in await pool.order(*_asking(), 1e12, address)] == [("10.0.0.7", 80)]
        for _ in range(50):  # resolved again in the background, while the old address is used
            try:
                found = [member.address for member in await pool.order(*_asking(), 1e12, address)]
            except NoOrigin as error:
                forbidden = isinstance(error, OriginNotAllowed)
                break
            assert found == [("10.0.0.7", 80)]
            await asyncio.sleep(0.01)
        else:
            pytest.fail("never looked up again")
        assert forbidden
        await where.close()

    asyncio.run(run())


# --- bounded ----------------------------------------------------------------------------------------------------------


def test_the_number_of_chosen_origins_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients may influence the choice: the least recently used pool is dropped, and pools in use stay."""
    monkeypatch.setattr(destinations, "MAX_POOLS", 10)
    where = made("*.shards.internal", "10.0.0.0/8")
    kept = where.pool(OriginAddress("kept.shards.internal", 80))
    for number in range(1000):
        assert where.pool(OriginAddress(f"n{number}.shards.internal", 80))
        assert where.pool(OriginAddress("10.0.0.9", 1 + number))
        assert where.pool(OriginAddress("kept.shards.internal", 80)) is kept
    assert len(where._chosen) == 10


def test_refused_origins_are_not_kept() -> None:
    where = made("10.0.0.0/8")
    for number in range(1, 100):
        assert not allowed(where, f"192.0.2.{number}:80")
    assert len(where._chosen) == 0
