"""Rate limits: what they count by, the refusal, and errors in their settings."""

import asyncio
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.handshakes import FIELDS, Field, request
from tlstunnel.config import RateLimitConfig, Timeout
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.expressions import Expressions
from tlstunnel.firewall.facts import Facts, gather
from tlstunnel.firewall.rate_limits import (
    LimitsOutcome,
    LimitTrace,
    RateLimits,
)
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader
from tlstunnel.metrics.families import RATE_LIMITS
from tlstunnel.metrics.registry import Registry
from tlstunnel.state.counters import LimitCheck, LimitResult
from tlstunnel.state.memory import MemoryCounters


class Clock:
    """A clock that the test advances, in seconds."""

    def __init__(self, now: float = 1200.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def facts(*more: Field, ip: str = "192.0.2.1", target: bytes = b"/chat", **connection: str) -> Facts:
    known: dict[str, Any] = {
        "tls_version": "",
        "tls_cipher": "",
        "tls_sni": "",
        "tls_ja4": "",
        "client_subject": "",
        "site": "",
    }
    found = RequestReader().feed(request((*FIELDS, *more), line=b"GET %b HTTP/1.1" % target))
    assert found is not None
    return gather(found, Connection(ip=ip, **(known | connection)), strict_path=True, now=0.0)


def config(name: str = "a", limit: str | None = "1/minute", **more: Any) -> RateLimitConfig:
    return RateLimitConfig(name=name, limit=limit, **more)


def limits(*configs: RateLimitConfig, **more: Any) -> RateLimits:
    return RateLimits(
        configs, more.pop("counters", None) or MemoryCounters(clock=Clock()), Expressions().condition, **more
    )


def check(limits: RateLimits, facts: Facts, trace: list[Any] | None = None) -> LimitsOutcome:
    return asyncio.run(limits.check(facts, trace))


def refused(limits: RateLimits, facts: Facts) -> Refusal:
    outcome = check(limits, facts)
    assert outcome.refusal is not None
    return outcome.refusal


def passes(limits: RateLimits, facts: Facts) -> bool:
    return check(limits, facts).refusal is None


# What they count by.


@pytest.mark.parametrize(
    ("key", "one", "same", "other"),
    [
        ("ip", facts(), facts(target=b"/x"), facts(ip="192.0.2.2")),
        ("ip", facts(ip="2001:db8::1"), facts(ip="2001:db8::ffff:1:2"), facts(ip="2001:db8:0:1::1")),
        ("ip", facts(ip="::1"), facts(ip="::2"), facts(ip="0:0:0:1::1")),
        ("ip", facts(ip="fe80::1%eth0"), facts(ip="fe80::2%eth1"), facts(ip="fe80:0:0:1::1")),
        ("ip", facts(ip="::ffff:192.0.2.1"), facts(ip="192.0.2.1"), facts(ip="::ffff:192.0.2.2")),
        ("ip", facts(ip="0:0:0:0:0:ffff:c000:201"), facts(ip="192.0.2.1"), facts(ip="::ffff:192.0.2.2")),
        ("ip", facts(ip=""), facts(ip=""), facts()),
        ("header:X-User", facts((b"x-user", b"a")), facts((b"X-USER", b"a"), ip="::1"), facts((b"X-User", b"A"))),
        ("header:X-User", facts((b"X-User", b"")), facts((b"X-User", b"")), facts((b"X-User", b"a"))),
        ("header:X-User", facts((b"X-User", b"\xff")), facts((b"X-User", b"\xff")), facts((b"X-User", b"\xfe"))),
        ("cookie:s", facts((b"Cookie", b"s=1")), facts((b"Cookie", b"a=1; s=1")), facts((b"Cookie", b"s=2"))),
        ("path", facts(), facts(target=b"/%63hat?x"), facts(target=b"/Chat")),
        ("host", facts(), facts(ip="::1"), facts((b"X", b"y"), ip="::1")),
        ("ja4", facts(tls_ja4="a"), facts(tls_ja4="a", ip="::1"), facts(tls_ja4="b")),
        ("client_subject", facts(client_subject="CN=a"), facts(client_subject="CN=a"), facts(client_subject="CN=b")),
    ],
)
def test_a_key(key: str, one: Facts, same: Facts, other: Facts) -> None:
    counting = limits(config(key=(key,)))
    assert passes(counting, one)
    assert not passes(counting, same)
    assert passes(counting, other) == (key != "host")


def test_the_host_of_a_wildcard_site() -> None:
    counting = limits(config(key=("host",)))
    other = RequestReader().feed(request().replace(b"chat.example.com", b"b.example.com"))
    assert other is not None
    assert passes(counting, facts())
    assert passes(counting, gather(other, facts().connection, strict_path=True, now=0.0))


@pytest.mark.parametrize(
    ("prefix", "ip", "passes_too"),
    [
        (128, "2001:db8::2", True),
        (127, "2001:db8::1", False),
        (48, "2001:db8:0:ffff::", False),
        (1, "7fff::", False),
        (1, "8000::", True),
        (32, "192.0.2.1", True),
    ],
)
def test_ipv6_prefix(prefix: int, ip: str, passes_too: bool) -> None:
    counting = limits(config(ipv6_prefix=prefix))
    assert passes(counting, facts(ip="2001:db8::"))
    assert passes(counting, facts(ip=ip)) == passes_too


@pytest.mark.parametrize("key", ["header:X-User", "cookie:s", "ja4", "client_subject"])
def test_request_without_a_part_of_the_key_is_not_counted(key: str) -> None:
    counting = limits(config(key=(key,)), config("both", key=("ip", key)))
    for _ in range(3):
        assert passes(counting, facts())


def cookies(value: bytes) -> Facts:
    return facts((b"Cookie", value))


@pytest.mark.parametrize(
    "again",
    [b"s=me; s=r2", b"s=r2; s=me", b'x=1; s="m\\145"', b"s=%6de", b"s=1; s=2; s=3; s=me"],
)
def test_each_value_of_a_cookie_is_counted(again: bytes) -> None:
    counting = limits(config(key=("cookie:s",)))
    assert passes(counting, cookies(b"s=r1; s=me"))
    assert not passes(counting, cookies(b"s=me"))
    assert not passes(counting, cookies(again))


def test_a_refused_value_of_a_cookie_counts_no_other() -> None:
    counting = limits(config(key=("cookie:s",)), config("ip", "2/minute"))
    assert passes(counting, cookies(b"s=a"))
    trace: list[LimitTrace] = []
    assert not passes(counting, cookies(b"s=b; s=a"))
    check(counting, cookies(b"s=b; s=a"), trace)
    assert trace[0] == LimitTrace("a", "block", (("cookie:s", "b"), ("cookie:s", "a")), "exceeded, for 60 s")
    assert passes(counting, cookies(b"s=b"))


def test_tunnels_of_each_value_of_a_cookie_are_returned() -> None:
    counters = MemoryCounters(clock=Clock())
    counting = limits(config(limit=None, max_tunnels=1, key=("cookie:s", "ip")), counters=counters)
    outcome = check(counting, cookies(b"s=a; s=b"))
    assert outcome.refusal is None
    assert not passes(counting, cookies(b"s=b"))
    outcome.lease.close()
    assert check(counting, cookies(b"s=b")).refusal is None


def test_more_values_of_a_cookie_than_are_counted_are_refused() -> None:
    five = cookies(b"s=1; s=2; s=3; s=4; s=5")
    for counting in (limits(config(key=("cookie:s",))), limits(config(when='cookies.s == "9"'))):
        with pytest.raises(Refusal) as caught:
            check(counting, five)
        assert (caught.value.status, caught.value.reason) == (400, "too many cookies")
    many = cookies(b"; ".join(b"%c=1; %c=2" % (name, name) for name in b"abcde"))
    with pytest.raises(Refusal, match="too many cookies"):
        check(limits(config(key=("cookie:a", "cookie:b", "cookie:c", "cookie:d", "cookie:e"))), many)
    assert passes(limits(config()), five)


def test_a_repeated_field_does_not_make_a_new_key() -> None:
    counting = limits(config(key=("header:X-Key",)))
    assert passes(counting, facts((b"X-Key", b"me")))
    with pytest.raises(Refusal, match="repeated field"):
        check(counting, facts((b"X-Key", b"me"), (b"x-key", b"other")))


def test_when_is_true_for_any_value_of_a_cookie() -> None:
    counting = limits(config(when='cookies["s"] == "me"'))
    assert passes(counting, cookies(b"s=a; s=me"))
    assert not passes(counting, cookies(b"s=me; s=a"))


def test_several_parts_count_together() -> None:
    counting = limits(config(key=("ip", "path")))
    assert passes(counting, facts())
    assert not passes(counting, facts())
    assert passes(counting, facts(ip="192.0.2.2"))
    assert passes(counting, facts(target=b"/other"))


class RecordingCounters(MemoryCounters):
    """Counters that record their checks."""

    def __init__(self) -> None:
        super().__init__(clock=Clock())
        self.checks: list[LimitCheck] = []

    async def check(self, checks: Any) -> list[LimitResult]:
        self.checks += checks
        return await super().check(checks)


values = st.binary(max_size=40).map(lambda data: bytes(0x21 + byte % 0x5E for byte in data)) | st.sampled_from(
    [b"", b"1:a", b"a1:b", b"1:a1:b", b"a" * 4000]
)


@given(st.tuples(values, values), st.tuples(values, values))
def test_keys_are_short_and_distinct(one: tuple[bytes, bytes], other: tuple[bytes, bytes]) -> None:
    counters = RecordingCounters()
    counting = limits(config(key=("header:A", "header:B")), counters=counters)
    for a, b in (one, other):
        check(counting, facts((b"A", a), (b"B", b)))
    first, second = counters.checks
    assert (first.key == second.key) == (one == other)
    assert len(first.key) == len(second.key) == 32


def test_limits_of_different_scopes_names_and_keys_share_nothing() -> None:
    counters = RecordingCounters()
    for scope, name, key in (("", "a", "ip"), ("b", "a", "ip"), ("", "b", "ip"), ("", "a", "header:Ip")):
        check(limits(config(name, key=(key,)), counters=counters, scope=scope), facts((b"Ip", b"192.0.2.1")))
    assert len({check.key for check in counters.checks}) == 4


def test_rebuilt_limits_continue_counting() -> None:
    counters = MemoryCounters(clock=Clock())
    assert passes(limits(config(), counters=counters), facts())
    assert not passes(limits(config(), counters=counters), facts())


# When they apply.


def test_when() -> None:
    counting = limits(config(when='path == "/login"'))
    for _ in range(3):
        assert passes(counting, facts())
    assert passes(counting, facts(target=b"/login"))
    assert not passes(counting, facts(target=b"/login"))
    assert passes(counting, facts())


def test_block_applies_to_all_requests_of_the_key() -> None:
    clock = Clock()
    counting = limits(
        config(when='path == "/login"', block_for=Timeout(600)),
        counters=MemoryCounters(clock=clock),
        metrics=Registry(),
    )
    assert passes(counting, facts())
    assert passes(counting, facts(target=b"/login"))
    assert not passes(counting, facts(target=b"/login"))
    refusal = refused(counting, facts())
    assert refusal.fields[0] == (b"Retry-After", b"600")
    assert passes(counting, facts(ip="192.0.2.2"))
    clock.now += 600
    assert passes(counting, facts())


def test_failing_when_applies_and_is_reported_once_a_minute() -> None:
    clock = Clock()
    told: list[tuple[str, str]] = []
    metrics = Registry()
    counting = limits(
        config("tiers", when='headers["x-tier"] != "gold"'),
        metrics=metrics,
        report=lambda name, why: told.append((name, why)),
        clock=clock,
    )
    for _ in range(2):
        assert passes(counting, facts((b"X-Tier", b"gold")))
    assert passes(counting, facts())
    assert not passes(counting, facts())
    assert told == [("tiers", 'there is no key "x-tier"')]
    assert metrics[RATE_LIMITS]["", "tiers", "condition failed", "block"] == 2
    assert not passes(counting, facts((b"X-Tier", b"silver")))
    assert passes(counting, facts((b"X-Tier", b"gold")))
    clock.now += 60
    check(counting, facts())
    assert len(told) == 2


def test_without_limits_everything_passes() -> None:
    trace: list[LimitTrace] = []
    outcome = check(limits(), facts(), trace)
    assert (outcome.refusal, outcome.limit, outcome.logged, trace) == (None, "", (), [])
    outcome.lease.close()


# The refusal.


def test_the_refusal() -> None:
    clock = Clock()
    counting = limits(config("per address", "30/minute"), counters=MemoryCounters(clock=clock))
    assert all(passes(counting, facts()) for _ in range(30))
    clock.now += 12.4
    outcome = check(counting, facts())
    refusal = outcome.refusal
    assert refusal is not None
    assert outcome.limit == "per address"
    assert (refusal.status, refusal.reason) == (429, "rate limit: per address")
    assert refusal.text == "too many handshakes; try again in 48 s"
    assert refusal.detail == "exceeded"
    assert refusal.fields == (
        (b"Retry-After", b"48"),
        (b"RateLimit", b'"per address";r=0;t=48'),
        (b"RateLimit-Policy", b'"per address";q=30;w=60'),
    )
    clock.now += 48
    assert passes(counting, facts())


def test_retry_after_is_at_least_a_second() -> None:
    clock = Clock()
    counting = limits(config(limit="1/second"), counters=MemoryCounters(clock=clock))
    assert passes(counting, facts())
    clock.now += 0.999
    assert refused(counting, facts()).fields[0] == (b"Retry-After", b"1")


class Rounding(MemoryCounters):
    """Counters with waits in the past, as a storage with another clock may return."""

    async def check(self, checks: Any) -> list[LimitResult]:
        return [LimitResult("limit", -0.5) for _ in checks]


def test_retry_after_is_at_least_a_second_for_any_storage() -> None:
    assert refused(limits(config(), counters=Rounding()), facts()).fields[0] == (b"Retry-After", b"1")


@pytest.mark.parametrize("strategy", ["fixed", "moving", "sliding"])
def test_request_passes_after_retry_after(strategy: str) -> None:
    clock = Clock()
    counting = limits(config(limit="7 per 13 seconds", strategy=strategy), counters=MemoryCounters(clock=clock))
    waits = 0
    for step in range(300):
        clock.now += step % 7 / 4
        refusal = check(counting, facts()).refusal
        if refusal is not None:
            waits += 1
            clock.now += int(refusal.fields[0][1])
            assert passes(counting, facts())
    assert waits > 5


def test_all_exceeded_limits_are_named_and_the_longest_wait_counts() -> None:
    counting = limits(
        config("minute", "1/minute"), config("free", "9/minute"), config("hour", "1/hour"), config("log", mode="log")
    )
    assert passes(counting, facts())
    outcome = check(counting, facts())
    assert outcome.refusal is not None
    assert outcome.limit == "minute"
    assert outcome.logged == ("log",)
    assert outcome.refusal.fields == (
        (b"Retry-After", b"3600"),
        (b"RateLimit", b'"minute";r=0;t=60, "hour";r=0;t=3600'),
        (b"RateLimit-Policy", b'"minute";q=1;w=60, "hour";q=1;w=3600'),
    )


# RFC 9651 section 4.2.5.
SF_STRING = re.compile(rb'"((?:[\x20\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')


@given(st.text(max_size=20) | st.sampled_from(['a"b\\c', "für alle", "a\r\nX: y", "\ud800"]))
def test_any_name_can_be_sent_in_the_fields(name: str) -> None:
    counting = limits(config(name))
    assert passes(counting, facts())
    refusal = refused(counting, facts())
    fields = dict(refusal.fields)
    shown, policy = fields[b"RateLimit"], fields[b"RateLimit-Policy"]
    found = SF_STRING.match(shown)
    assert found is not None
    assert shown[found.end() :] == b";r=0;t=60"
    assert policy == found[0] + b";q=1;w=60"
    if name.isascii() and name.isprintable():
        assert re.sub(rb"\\(.)", rb"\1", found[1]) == name.encode()


# Tunnels.


def test_tunnels() -> None:
    counting = limits(config("open", None, max_tunnels=2))
    outcomes = [check(counting, facts()) for _ in range(2)]
    refusal = refused(counting, facts())
    assert (refusal.status, refusal.reason, refusal.detail) == (429, "rate limit: open", "too many tunnels")
    assert refusal.text == "too many tunnels are open; try again in 10 s"
    assert refusal.fields == (
        (b"Retry-After", b"10"),
        (b"RateLimit", b'"open";r=0'),
        (b"RateLimit-Policy", b'"open";q=2;qu="concurrent-requests"'),
    )
    assert passes(counting, facts(ip="192.0.2.2"))
    for _ in range(3):
        outcomes[0].lease.close()
    assert passes(counting, facts())
    assert not passes(counting, facts())


def test_refused_request_holds_nothing() -> None:
    counters = RecordingCounters()
    counting = limits(config("open", None, max_tunnels=9), config(), counters=counters)
    taken = check(counting, facts())
    for _ in range(9):
        outcome = check(counting, facts())
        assert outcome.refusal is not None
        outcome.lease.close()
    key = counters.checks[0].key
    assert counters.open_tunnels(key) == 1
    taken.lease.close()
    assert counters.open_tunnels(key) == 0


def test_limit_and_max_tunnels_together() -> None:
    counting = limits(config(limit="3/minute", max_tunnels=1))
    lease = check(counting, facts()).lease
    refusal = refused(counting, facts())
    assert refusal.detail == "too many tunnels"
    assert (b"RateLimit-Policy", b'"a";q=1;qu="concurrent-requests"') in refusal.fields
    for _ in range(2):
        lease.close()
        lease = check(counting, facts()).lease
    lease.close()
    assert refused(counting, facts()).detail == "exceeded"


@pytest.mark.parametrize("strategy", ["fixed", "moving", "sliding"])
def test_exact_under_200_clients_at_once(strategy: str) -> None:
    clock = Clock()
    counters = MemoryCounters(clock=clock)
    counting = limits(
        config("rate", "60/minute", strategy=strategy), config("open", None, max_tunnels=50), counters=counters
    )
    seen = facts()

    async def client() -> LimitsOutcome:
        await asyncio.sleep(0)
        return await counting.check(seen)

    async def clients() -> list[LimitsOutcome]:
        return await asyncio.gather(*(client() for _ in range(200)))

    outcomes = asyncio.run(clients())
    reasons = Counter(outcome.refusal.detail if outcome.refusal else "" for outcome in outcomes)
    assert reasons == {"": 50, "too many tunnels": 150}
    for outcome in outcomes:
        outcome.lease.close()
    outcomes = asyncio.run(clients())
    assert sum(outcome.refusal is None for outcome in outcomes) == 10
    for outcome in outcomes:
        outcome.lease.close()
    clock.now += 120
    outcomes = asyncio.run(clients())
    assert sum(outcome.refusal is None for outcome in outcomes) == 50


# Mode "log", joined limits, metrics, the trace.


def test_mode_log_counts_and_refuses_nothing() -> None:
    metrics = Registry()
    counting = limits(
        config(mode="log", limit="2/minute"), config("open", None, mode="log", max_tunnels=3), metrics=metrics
    )
    outcomes = [check(counting, facts()) for _ in range(5)]
    assert all(outcome.refusal is None and outcome.limit == "" for outcome in outcomes)
    assert [outcome.logged for outcome in outcomes] == [(), (), ("a",), ("a", "open"), ("a", "open")]
    for outcome in outcomes:
        outcome.lease.close()
    assert check(counting, facts()).logged == ("a",)
    assert metrics[RATE_LIMITS].values == {
        ("", "a", "passed", "log"): 2,
        ("", "a", "exceeded", "log"): 4,
        ("", "open", "passed", "log"): 4,
        ("", "open", "too many tunnels", "log"): 2,
    }


def test_metrics_count_outcomes() -> None:
    metrics = Registry()
    counting = limits(config(block_for=Timeout(60)), config("never", when='path == "/other"'), metrics=metrics)
    for _ in range(4):
        check(counting, facts())
    assert metrics[RATE_LIMITS].values == {
        ("", "a", "passed", "block"): 1,
        ("", "a", "exceeded", "block"): 1,
        ("", "a", "blocked", "block"): 2,
    }


def test_refused_request_uses_up_no_other_limit() -> None:
    counting = limits(config("mine"), config("shared", "3/minute", key=("path",)))
    for _ in range(9):
        check(counting, facts())
    assert passes(counting, facts(ip="192.0.2.2"))
    assert passes(counting, facts(ip="192.0.2.3"))
    assert check(counting, facts(ip="192.0.2.4")).limit == "shared"


def test_joined_limits_are_checked_at_once() -> None:
    counters = MemoryCounters(clock=Clock())
    metrics = Registry()
    everywhere = limits(config(limit="2/minute"), counters=counters, metrics=metrics)
    site = limits(config(), counters=counters, scope="chat.example.com", metrics=metrics)
    both = everywhere + site
    assert (len(everywhere), len(site), len(both)) == (1, 1, 2)
    assert passes(both, facts())
    for _ in range(9):
        assert check(both, facts()).limit == "a"
    assert passes(everywhere, facts())  # not used up by what the site's limit refused
    assert not passes(everywhere, facts())


def test_the_trace() -> None:
    counting = limits(
        config(),
        config("cookie", key=("ip", "cookie:s")),
        config("login", when='path == "/login"', block_for=Timeout(60)),
        config("open", None, max_tunnels=1, mode="log"),
    )
    first: list[LimitTrace] = []
    second: list[LimitTrace] = []
    check(counting, facts(), first)
    check(counting, facts(), second)
    ip = (("ip", "192.0.2.1"),)
    assert first == [
        LimitTrace("a", "block", ip, "within the limit"),
        LimitTrace("cookie", "block", ip, "does not apply: the request has no cookie:s"),
        LimitTrace("login", "block", ip, "does not apply: when is false"),
        LimitTrace("open", "log", ip, "within the limit"),
    ]
    assert second[0] == LimitTrace("a", "block", ip, "exceeded, for 60 s")
    assert second[3] == LimitTrace("open", "log", ip, "too many tunnels, only logged, for 10 s")
    nothing: list[LimitTrace] = []
    check(limits(config(key=("ja4", "cookie:s"))), facts(), nothing)
    assert nothing == [LimitTrace("a", "block", (), "does not apply: the request has no ja4 and no cookie:s")]


# Errors when they are loaded.


@pytest.mark.parametrize(
    ("limit", "parts"),
    [
        ("10/10s", ['"10/10s" is not a limit; write "10 per 10 seconds"']),
        ("30/m", ['write "30/minute"']),
        ("30 per min", ['write "30/minute"']),
        ("5/h", ['write "5/hour"']),
        ("5 per 2d", ['write "5 per 2 days"']),
        ("5/week", ["second, minute, hour, day"]),
        ("5/w", ['write "5 per 7 days"']),
        ("5/minuets", ['write "5/minute"']),
        ("5/2 minuets", ['write "5 per 2 minutes"']),
        ("30", ['"30/minute", "1000/hour" or "10 per 10 seconds"']),
        ("", ['"" is not a limit; write "30/minute"']),
        ("-1/minute", ["is not a limit"]),
        ("1.5/minute", ["is not a limit"]),
        ("x/minute", ["is not a limit"]),
        ("1" * 5000 + "/minute", ["is not a limit"]),
        ("1/second; 5/minute", ["contains several limits; write a rate limit for each"]),
        ("0/minute", ["allows no request", 'action = "block"']),
        ("5 per 0 minutes", ["allows no request"]),
        ("1" + "0" * 15 + "/minute", ["is too large"]),
        ("1/367 days", ["is too large"]),
    ],
)
def test_invalid_limit(limit: str, parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        limits(config("mine", limit))
    message = str(caught.value)
    assert message.startswith('rate limit "mine": ')
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("limit", "fields"),
    [
        ("30/minute", b"q=30;w=60"),
        ("30 per minute", b"q=30;w=60"),
        ("30 PER MINUTES", b"q=30;w=60"),
        ("10 per 10 seconds", b"q=10;w=10"),
        ("10/10 seconds", b"q=10;w=10"),
        ("5/2 days", b"q=5;w=172800"),
    ],
)
def test_valid_limit(limit: str, fields: bytes) -> None:
    counting = limits(config(limit=limit))
    while (refusal := check(counting, facts()).refusal) is None:
        pass
    assert refusal.fields[2][1] == b'"a";' + fields


def test_a_moving_window_is_not_too_large() -> None:
    limits(config(limit="1000/minute", strategy="moving"))
    limits(config(limit="1000000/minute", strategy="sliding"))
    with pytest.raises(ConfigurationError, match='at most 1000; write strategy = "sliding"'):
        limits(config(limit="1001/minute", strategy="moving"))


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("IP", 'unknown key "IP"; did you mean "ip"?'),
        ("client-subject", 'did you mean "client_subject"?'),
        ("headers:X-User", 'did you mean "header:X-User"?'),
        ("Cookie:s", 'did you mean "cookie:s"?'),
        ("header", 'key "header" does not name a header; write "header:NAME", such as "header:X-User"'),
        ("header:", "does not name a header"),
        ("header:X User", "does not name a header"),
        ("cookie:", "does not name a cookie"),
        ("cookie:a;b", "does not name a cookie"),
        ("zzz", "keys are ip, header:NAME, cookie:NAME, path, host, ja4, client_subject"),
        ("", 'unknown key ""; keys are ip'),
        ("ip:1", 'did you mean "ip"?'),
    ],
)
def test_an_unknown_key(key: str, part: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        limits(config("mine", key=("ip", key)))
    assert str(caught.value).startswith('rate limit "mine": ')
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([config(), config()], 'rate limit "a": two limits have this name and would share a counter'),
        ([config(limit=None)], 'rate limit "a": it has neither limit nor max_tunnels; write limit = "30/minute"'),
        ([config(key=())], 'rate limit "a": key is empty; it may contain'),
        ([config("b\n", when="pth == 'x'")], 'rate limit "b\\n": when: line 1, column 1: '),
        ([config(when="path")], 'rate limit "a": when: line 1, column 1: '),
    ],
)
def test_invalid_settings(configs: list[RateLimitConfig], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        limits(*configs)
    assert message in str(caught.value)
