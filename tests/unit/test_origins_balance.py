"""Balance and ejection, without I/O: counts, weights, which clients move when an origin goes, and trials."""

import socket
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.corpus.corpus import upgrade_request
from tlstunnel.addresses import OriginAddress
from tlstunnel.config import Ejection, Timeout
from tlstunnel.handshake.request import UpgradeRequest
from tlstunnel.origins.balance import select_order
from tlstunnel.origins.members import CHECKS_DOWN, PLAIN_WAIT, Member, Responses, Use


def member(text: str, weight: int = 1, **more: object) -> Member:
    address = OriginAddress.parse(text if ":" in text else f"{text}:80")
    return Member(address, socket.AF_INET, ("192.0.2.1", 80), Use(), weight=weight, **more)  # type: ignore[arg-type]


def asking(ip: str = "192.0.2.9", *headers: str) -> tuple[str, UpgradeRequest]:
    own = ["Host: a", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    return ip, upgrade_request("/", [*own, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", *headers])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_round_robin_is_exact_over_a_cycle(weights: list[int]) -> None:
    members = [member(f"o{index}", weight) for index, weight in enumerate(weights)]
    order = select_order("round_robin")
    counts = Counter(order(members, *asking())[0].text for _ in range(sum(weights) * 3))
    assert counts == {f"o{index}:80": weight * 3 for index, weight in enumerate(weights)}


@given(st.permutations(range(5)), st.sampled_from(["round_robin", "least_tunnels", "hash:ip", "hash:cookie:sid"]))
def test_an_order_has_each_member_once(places: list[int], balance: str) -> None:
    members = [member(f"o{place}", place + 1) for place in places]
    order = select_order(balance)
    for _ in range(4):
        assert sorted(one.text for one in order(members, *asking())) == sorted(one.text for one in members)


def test_least_tunnels_fills_up_origins_below_their_weight() -> None:
    members = [member("a"), member("b", 3), member("c")]
    members[0].tunnels = 10
    order = select_order("least_tunnels")
    for _ in range(60):
        order(members, *asking())[0].take()
    assert [one.tunnels for one in members] == [14, 42, 14]


def test_rendezvous_spreads_by_weight_and_moves_as_few_as_possible() -> None:
    members = [member("a:1"), member("b:1", 2), member("c:1"), member("d:1")]
    order = select_order("hash:ip")
    clients = [f"10.{number // 250}.{number % 250}.1" for number in range(20_000)]
    before = {ip: order(members, *asking(ip))[0].text for ip in clients}
    counts = Counter(before.values())
    for text, part in (("a:1", 0.2), ("b:1", 0.4), ("c:1", 0.2), ("d:1", 0.2)):
        assert counts[text] == pytest.approx(part * len(clients), rel=0.05)
    after = {ip: order(members[:2] + members[3:], *asking(ip)) for ip in clients}
    assert all(after[ip][0].text == text for ip, text in before.items() if text != "c:1")
    # A client that loses its origin moves to the one that is second in its order.
    for ip in clients[:200]:
        assert [one.text for one in order(members, *asking(ip)) if one.text != "c:1"] == [one.text for one in after[ip]]


def test_rendezvous_agrees_between_processes_and_pools() -> None:
    members = [member(f"{name}.example:3000") for name in "abcdef"]
    order = select_order("hash:header:X-User")
    # Recorded once: a change of these moves all clients to other origins at the next release.
    assert [order(members, *asking("", f"X-User: {n}"))[0].text[0] for n in range(12)] == list("aeeaeaacedbd")


def test_the_input_of_the_hash() -> None:
    members = [member(f"o{number}") for number in range(50)]

    def first(balance: str, *headers: str, ip: str = "192.0.2.9") -> str:
        return select_order(balance)(members, *asking(ip, *headers))[0].text

    assert first("hash:cookie:sid", "Cookie: a=b; sid=1") == first("hash:cookie:sid", "Cookie: sid=1", ip="192.0.2.1")
    assert first("hash:cookie:sid", "Cookie: sid=1") != first("hash:cookie:sid", "Cookie: sid=2")
    assert first("hash:header:x-user", "X-User: 1") == first("hash:header:X-USER", "x-user: 1", ip="192.0.2.1")
    # Without it the address is used.
    assert first("hash:cookie:sid") == first("hash:header:X-User") == first("hash:ip")


EJECTION = Ejection(failures=3, delay=Timeout(1), max_delay=Timeout(4))


def eject(one: Member, now: float = 0.0) -> None:
    assert [one.record_unreachable(now, EJECTION) for _ in range(3)] == [False, False, True]


def test_three_failures_in_a_row_eject_and_one_request_at_a_time_may_try() -> None:
    one = member("a")
    assert not one.record_unreachable(0, EJECTION)
    assert not one.record_unreachable(0, EJECTION)
    assert not one.record_connected()
    eject(one)
    assert not one.is_usable(0.89)
    assert one.is_usable(1.11)
    one.take()
    assert not one.is_usable(1.2)
    one.abandon_trial()
    assert one.is_usable(1.2)
    one.take()
    assert one.record_connected()
    assert one.is_usable(1.2)


def test_plain_requests_leave_the_trial_to_an_upgrade_request_for_a_while() -> None:
    one = member("a")
    eject(one)
    assert one.is_usable(1.2)
    assert not one.is_usable(1.2, plain=True)
    assert one.is_usable(1.2 + PLAIN_WAIT, plain=True)


def test_each_failed_trial_doubles_the_delay_up_to_the_longest() -> None:
    one, now = member("a"), 0.0
    eject(one)
    for delay in (1.0, 2.0, 4.0, 4.0):
        assert not one.is_usable(now + delay * 0.899)
        now += delay * 1.11
        assert one.is_usable(now)
        one.take()
        assert not one.record_unreachable(now, EJECTION)


def test_an_origin_that_only_accepts_connections_keeps_its_delay() -> None:
    one = member("a")
    eject(one)
    assert one.record_connected()
    eject(one, 10)
    assert not one.is_usable(11.5)
    assert one.record_connected()
    one.record_response("192.0.2.1", 12)
    eject(one, 20)
    assert one.is_usable(21.11)


def test_late_failures_of_many_at_once_eject_once_and_do_not_lengthen_it() -> None:
    one = member("a")
    assert [one.record_unreachable(0, EJECTION) for _ in range(100)].count(True) == 1
    assert one.is_usable(1.11)


def fail(one: Member, clients: Iterable[int], now: float = 0.0) -> bool:
    results = [one.record_no_response(f"192.0.2.{client}", now, EJECTION) for client in clients]
    return any(results)


def test_one_client_without_responses_ejects_nothing() -> None:
    one = member("a")
    assert not fail(one, [1] * 10_000)
    assert not fail(one, [1, 2, 3, 4] * 100)
    assert fail(one, [5])
    assert not one.is_usable(0.5)


def test_few_of_many_clients_without_responses_eject_nothing() -> None:
    one = member("a")
    for client in range(100, 110):
        one.record_response(f"192.0.2.{client}", 0)
    assert not fail(one, range(39))
    assert fail(one, range(40))


def test_the_last_result_of_a_client_counts_and_only_for_a_while() -> None:
    one = member("a")
    assert not fail(one, range(4))
    one.record_response("192.0.2.0", 1)
    assert not fail(one, [4], 1)
    assert not fail(one, [5], 1 + Responses.WINDOW)
    assert fail(one, range(4), 1 + Responses.WINDOW)


def test_the_memory_for_results_is_bounded() -> None:
    responses = Responses()
    for client in range(10 * Responses.MOST_CLIENTS):
        responses.add(str(client), 0, succeeded=client % 2 == 0)
    assert (
        repr(responses)
        == f"<Responses: {Responses.MOST_CLIENTS // 2} clients without, {Responses.MOST_CLIENTS // 2} with>"
    )


def test_health_checks() -> None:
    one = member("a")
    changes = [one.record_check(healthy=False) for _ in range(CHECKS_DOWN + 1)]
    assert changes == [False] * (CHECKS_DOWN - 1) + [True, False]
    assert not one.is_usable(0)
    eject(one)
    assert one.record_check(healthy=True)
    assert one.is_usable(0)


def test_an_origin_is_full_across_all_its_addresses() -> None:
    use = Use()
    first = Member(OriginAddress.parse("a:1"), socket.AF_INET, ("192.0.2.1", 1), use, most=2)
    second = Member(OriginAddress.parse("a:1"), socket.AF_INET, ("192.0.2.2", 1), use, most=2)
    found = []
    for step in (first.take, second.take, first.release):
        step()
        found.append((first.full, second.full))
    assert found == [(False, False), (True, True), (False, False)]
