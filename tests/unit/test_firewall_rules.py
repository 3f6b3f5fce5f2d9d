"""Rules: their order, each action, failures, and their cost."""

import re
import time
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from tests.handshakes import KEY, Field, request
from tlstunnel.config import RuleConfig, decode
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.expressions import Expressions
from tlstunnel.firewall.facts import FIELDS, Facts, gather
from tlstunnel.firewall.lists import NamedLists
from tlstunnel.firewall.rules import Rules, RulesOutcome, RuleTrace
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader, UpgradeRequest
from tlstunnel.metrics.families import RULES
from tlstunnel.metrics.registry import Registry

CONNECTION = Connection(
    ip="192.0.2.1",
    tls_version="TLSv1.3",
    tls_cipher="TLS_AES_128_GCM_SHA256",
    tls_sni="chat.example.com",
    tls_ja4="t13d",
    site="*",
)
CHROMIUM: tuple[Field, ...] = (
    (b"Host", b"chat.example.com"),
    (b"Connection", b"Upgrade"),
    (b"Pragma", b"no-cache"),
    (b"Cache-Control", b"no-cache"),
    (b"User-Agent", b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0.0.0"),
    (b"Upgrade", b"websocket"),
    (b"Origin", b"https://chat.example.com"),
    (b"Sec-WebSocket-Version", b"13"),
    (b"Accept-Encoding", b"gzip, deflate, br, zstd"),
    (b"Accept-Language", b"en-GB,en;q=0.9,de;q=0.8"),
    (b"Cookie", b"_ga=GA1.2.1234567890.1700000000; session=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc; theme=dark"),
    (b"Sec-WebSocket-Key", KEY),
    (b"Sec-WebSocket-Extensions", b"permessage-deflate; client_max_window_bits"),
    (b"Sec-WebSocket-Protocol", b"graphql-transport-ws"),
)
Action = Literal["block", "allow", "log", "skip"]


def upgrade(target: bytes = b"/socket?room=1") -> UpgradeRequest:
    found = RequestReader().feed(request(CHROMIUM, b"GET %b HTTP/1.1" % target))
    assert found is not None
    return found


def facts(target: bytes = b"/socket?room=1") -> Facts:
    return gather(upgrade(target), CONNECTION, strict_path=True, now=0)


def rule(name: str, action: Action = "block", when: str = "true", **more: Any) -> RuleConfig:
    return RuleConfig(name=name, when=when, action=action, **more)


def rules(*configs: RuleConfig, **more: Any) -> Rules:
    return Rules(configs, Expressions(NamedLists({"bots": ["198.51.100.0/24"]})), **more)


FAILING = 'headers["x-not-there"] == "a"'


def test_without_rules_everything_passes() -> None:
    assert rules().evaluate(facts()) == RulesOutcome(None, "", frozenset(), ())
    assert len(rules()) == 0


def test_block() -> None:
    outcome = rules(rule("no", when='path == "/socket"')).evaluate(facts())
    assert outcome.rule == "no"
    refusal = outcome.refusal
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (403, "rule: no")
    assert refusal.text == "refused by a rule of this site"
    assert rules(rule("no", when='path == "/"')).evaluate(facts()).refusal is None


def test_block_with_status_and_body() -> None:
    refusal = rules(rule("no", status=404, body="nothing here")).evaluate(facts()).refusal
    assert refusal is not None
    assert (refusal.status, refusal.text) == (404, "nothing here")


def test_allow_ends_the_rules_and_nothing_else() -> None:
    outcome = rules(rule("yes", "allow"), rule("no")).evaluate(facts())
    assert outcome == RulesOutcome(None, "yes", frozenset(), ())
    assert rules(rule("no"), rule("yes", "allow")).evaluate(facts()).rule == "no"


def test_log_continues() -> None:
    outcome = rules(rule("seen", "log"), rule("unseen", "log", "false"), rule("no"), rule("late", "log")).evaluate(
        facts()
    )
    assert (outcome.rule, outcome.logged) == ("no", ("seen",))


def test_skip_continues_and_adds_up() -> None:
    found = rules(
        rule("a", "skip", skip=("rate_limits",)),
        rule("b", "skip", "false", skip=("managed_rules",)),
        rule("c", "skip", skip=("rate_limits", "managed_rules")),
    )
    assert found.evaluate(facts()) == RulesOutcome(None, "", frozenset({"rate_limits", "managed_rules"}), ())
    outcome = (rules(rule("a", "skip", skip=("rate_limits",))) + rules(rule("no"))).evaluate(facts())
    assert (outcome.rule, outcome.skip) == ("no", frozenset({"rate_limits"}))


@pytest.mark.parametrize("action", ["block", "allow", "skip", "log"])
def test_mode_log_only_logs(action: Action) -> None:
    more: dict[str, Any] = {"skip": ("rate_limits",)} if action == "skip" else {}
    outcome = rules(rule("trial", action, mode="log", **more), rule("no")).evaluate(facts())
    assert (outcome.rule, outcome.skip, outcome.logged) == ("no", frozenset(), ("trial",))


def test_a_rule_that_fails_does_not_match() -> None:
    outcome = rules(rule("a", when=FAILING), rule("b", "allow", when=FAILING)).evaluate(facts())
    assert outcome == RulesOutcome(None, "", frozenset(), ())


@pytest.mark.parametrize("action", ["block", "allow", "skip", "log"])
def test_a_rule_that_fails_can_block(action: Action) -> None:
    more: dict[str, Any] = {"skip": ("rate_limits",)} if action == "skip" else {}
    outcome = rules(rule("a", action, when=FAILING, on_error="block", status=418, **more)).evaluate(facts())
    assert outcome.refusal is not None
    assert (outcome.rule, outcome.refusal.status) == ("a", 418)
    assert outcome.refusal.detail == 'there is no key "x-not-there"'
    outcome = rules(rule("a", action, when=FAILING, on_error="block", mode="log", **more)).evaluate(facts())
    assert (outcome.refusal, outcome.logged) == (None, ("a",))


def test_counters() -> None:
    metrics = Registry()
    found = rules(rule("a", "log"), rule("b", "log", when=FAILING), rule("c"), rule("d"), metrics=metrics)
    for _ in range(3):
        found.evaluate(facts())
    assert metrics[RULES].values == {("*", "a", "matched"): 3, ("*", "b", "failed"): 3, ("*", "c", "matched"): 3}


def test_failures_are_reported_once_a_minute_for_each_rule() -> None:
    now = 1000.0
    said: list[tuple[str, str]] = []
    found = rules(
        rule("a", when=FAILING),
        rule("b", when='query["n"][0] == "1"'),
        report=lambda name, error: said.append((name, error)),
        clock=lambda: now,
    )
    found.evaluate(facts(b"/?n=1"))
    assert said == [("a", 'there is no key "x-not-there"')]
    found.evaluate(facts())
    assert said[1:] == [("b", 'there is no key "n"')]
    now = 1059.9
    found.evaluate(facts())
    assert len(said) == 2
    now = 1060.0
    found.evaluate(facts())
    assert [name for name, _ in said[2:]] == ["a", "b"]


def test_joined_rules_are_evaluated_in_order_and_share_their_counters() -> None:
    metrics = Registry()
    expressions = Expressions()
    everywhere = Rules([rule("a", "log"), rule("b", "allow", 'path == "/ok"')], expressions, metrics=metrics)
    here = Rules([rule("c", when='host == "chat.example.com"')], expressions, metrics=metrics)
    joined = everywhere + here
    assert (len(everywhere), len(here), len(joined)) == (2, 1, 3)
    assert joined.evaluate(facts()).rule == "c"
    assert joined.evaluate(facts(b"/ok")).rule == "b"
    assert everywhere.evaluate(facts()).rule == ""
    assert metrics[RULES].values == {("*", "a", "matched"): 3, ("*", "b", "matched"): 1, ("*", "c", "matched"): 1}


def test_a_wrong_rule_is_named_with_the_place() -> None:
    with pytest.raises(ConfigurationError) as caught:
        rules(rule("fine"), rule("admin only", when='pth == "/"'))
    expected = 'rule "admin only": when: line 1, column 1: there is no field "pth"; did you mean "path"?'
    assert str(caught.value) == expected


# Several values of one cookie.


def with_cookies(*values: bytes) -> Facts:
    without = tuple(field for field in CHROMIUM if field[0] != b"Cookie")
    found = RequestReader().feed(request((*without, *((b"Cookie", value) for value in values)), b"GET / HTTP/1.1"))
    assert found is not None
    return gather(found, CONNECTION, strict_path=True, now=0)


IS_BANNED = 'cookies["s"] == "banned"'
IS_NOT_GOOD = 'cookies["s"] != "good"'


@pytest.mark.parametrize(
    ("when", "action", "cookies", "decides"),
    [
        (IS_BANNED, "block", b"s=x; s=banned", True),
        (IS_BANNED, "block", b"s=banned; s=x", True),
        (IS_BANNED, "block", b"s=x; s=banned; s=y", True),
        (IS_BANNED, "block", rb's="b\141nned"', True),
        (IS_BANNED, "block", b"s=%62anned", True),
        (IS_BANNED, "block", b"s=x; s=y; t=banned", False),
        (IS_NOT_GOOD, "block", b"s=good; s=good", False),
        (IS_NOT_GOOD, "block", b"s=good; s=x", True),
        (f"!({IS_BANNED})", "block", b"s=banned; s=x", True),
        (f'"s" in cookies && {IS_BANNED}', "block", b"s=x; s=banned", True),
        ('cookies.exists(n, cookies[n] == "banned")', "block", b"t=1; s=x; s=banned", True),
        ('cookies.a == "2" && cookies.b == "1"', "block", b"a=1; a=2; b=1; b=2", True),
        ('int(cookies["s"]) > 3', "block", b"s=x; s=4", True),
        # To allow, or to skip checks, all values must match: the origin may use any of them.
        ('cookies["s"] == "good"', "allow", b"s=good; s=x", False),
        ('cookies["s"] == "good"', "allow", b"s=x; s=good", False),
        ('cookies["s"].startsWith("g")', "allow", b"s=good; s=gold", True),
        (IS_NOT_GOOD, "allow", b"s=good; s=x", False),
        ('int(cookies["s"]) > 3', "allow", b"s=x; s=4", False),
    ],
)
def test_every_value_of_a_cookie_counts(when: str, action: Action, cookies: bytes, decides: bool) -> None:
    outcome = rules(rule("a", action, when)).evaluate(with_cookies(cookies))
    assert (outcome.rule == "a") == decides


def test_to_skip_checks_all_values_must_match() -> None:
    found = rules(rule("a", "skip", 'cookies["s"] == "good"', skip=("rate_limits",)))
    assert found.evaluate(with_cookies(b"s=good", b"s=good")).skip == {"rate_limits"}
    assert found.evaluate(with_cookies(b"s=good", b"s=x")).skip == frozenset()


def test_values_for_which_a_rule_fails() -> None:
    """A value that matches decides; otherwise the rule has failed, as it may have matched."""
    mixed = with_cookies(b"s=1; s=x")
    assert rules(rule("a", when='int(cookies["s"]) == 1', on_error="block")).evaluate(mixed).refusal is not None
    for action in ("block", "allow"):
        trace: list[RuleTrace] = []
        outcome = rules(rule("a", action, 'int(cookies["s"]) == 2', on_error="block")).evaluate(mixed, trace)
        assert outcome.refusal is not None
        assert trace[0].result == "failed"
        assert trace[0].values == {"cookies": {"s": ("1", "x")}}


def test_more_values_than_a_rule_reads_are_refused() -> None:
    five = with_cookies(b"s=1; s=2; s=3; s=4; s=5; t=1")
    for when in (IS_BANNED, "cookies.s == ''", "cookies.exists(n, cookies[n] == '')", "cookies == {}"):
        with pytest.raises(Refusal, match="too many cookies"):
            rules(rule("a", when=when)).evaluate(five)
    for when in ('cookies.t == "2"', '"s" in cookies && path == ""', 'cookies.exists(n, n == "x")'):
        assert rules(rule("a", when=when)).evaluate(five).refusal is None


def test_trace() -> None:
    trace: list[RuleTrace] = []
    found = rules(
        rule("a", "log", 'path == "/x" && host == ""'),
        rule("b", when=FAILING),
        rule("c", mode="log"),
        rule("d"),
        rule("e", when='query["room"][0] == "1"'),
    )
    assert found.evaluate(facts(), trace).rule == "d"
    assert [(entry.rule, entry.action, entry.mode, entry.result) for entry in trace] == [
        ("a", "log", "block", "not matched"),
        ("b", "block", "block", "failed"),
        ("c", "block", "log", "matched"),
        ("d", "block", "block", "matched"),
        ("e", "block", "block", "not evaluated"),
    ]
    assert trace[0].values == {"path": "/socket", "host": "chat.example.com"}
    assert trace[0].when == 'path == "/x" && host == ""'
    assert trace[1].error == 'there is no key "x-not-there"'
    assert trace[4].values == {"query": {"room": ["1"]}}


# Bypasses of rules that people write.

ADMIN = 'path.startsWith("/admin")'


@pytest.mark.parametrize(
    "target",
    [
        b"/admin",
        b"/admin/users",
        b"/%61dmin",
        b"/%61%64%6d%69%6e?x",
        b"/admin%20",
        b"/admin;x",
    ],
)
def test_no_spelling_of_a_path_bypasses_a_rule(target: bytes) -> None:
    assert rules(rule("admin", when=ADMIN)).evaluate(facts(target)).refusal is not None


def test_case_is_up_to_the_rule() -> None:
    assert rules(rule("admin", when=ADMIN)).evaluate(facts(b"/Admin")).refusal is None
    assert rules(rule("admin", when='path.lower().startsWith("/admin")')).evaluate(facts(b"/Admin")).refusal is not None


# The documentation.

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "firewall.md"
EXAMPLES = re.findall(r"^```toml\n(.*?)^```$", DOCUMENTATION.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_documentation_work(example: str) -> None:
    whole = (
        example
        if "[[sites]]" in example
        else re.sub(r"^\[\[sites\.", "[[sites]]\n[[sites.", example, count=1, flags=re.MULTILINE)
    )
    config = decode(whole.replace("[[sites]]", '[[sites]]\norigins = ["localhost:3000"]'), Path("/"), "firewall.md")
    expressions = Expressions(
        NamedLists({name: () if isinstance(of, str) else of for name, of in config.lists.items()})
    )
    for site in config.sites:
        Rules(site.rules, expressions).evaluate(facts())
        for limit in site.rate_limits:
            if limit.when is not None:
                expressions.compile(limit.when)


@pytest.mark.parametrize(
    ("method", "path", "site", "refused"),
    [
        ("POST", "/", b"cross-site", True),
        ("POST", "/", b"same-site", True),
        ("POST", "/", b"same-origin", False),
        ("POST", "/", None, False),
        ("POST", "/callback", b"cross-site", False),
        ("GET", "/", b"cross-site", False),
    ],
)
def test_the_rule_for_forms(method: str, path: str, site: bytes | None, refused: bool) -> None:
    (example,) = (found for found in EXAMPLES if "forms of other sites" in found)
    (config,) = msgspec.toml.decode(example)["sites"]["rules"]
    added = () if site is None else ((b"Sec-Fetch-Site", site),)
    fields = ((b"Host", b"chat.example.com"), (b"Content-Length", b"0"), (b"Origin", b"null"), *added)
    found = RequestReader(True).feed(request(fields, f"{method} {path} HTTP/1.1".encode()))
    assert found is not None
    form = gather(found, CONNECTION, strict_path=True, now=0)
    assert (rules(RuleConfig(**config)).evaluate(form).refusal is not None) == refused


def test_the_documentation_has_every_field_and_function() -> None:
    text = DOCUMENTATION.read_text(encoding="utf-8")
    section = text.partition("\n### Fields\n")[2].partition("\n### ")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == FIELDS
    section = text.partition("\n### Functions\n")[2].partition("\n### ")[0]
    named = set(re.findall(r"`(?:\w+\.)?(\w+)", section))
    assert {"ip_in", "in_list", "regex", "lower", "startsWith", "exists", "filter", "timestamp", "getHours"} <= named


# Cost.

KINDS = (
    'path.startsWith("/admin{}") && host == "chat.example.com"',
    'path in ["/a{}", "/b", "/c"] || method != "GET"',
    'ip_in(ip, "10.0.{}.0/24", "192.168.0.0/16")',
    'in_list(ip, "bots") && path != "/{}"',
    '"x-token" in headers && headers["x-token"] == "secret{}"',
    '"room" in query && query["room"][0] == "r{}"',
    '"theme" in cookies && cookies["theme"] == "light{}"',
)


def cost(kinds: tuple[str, ...], count: int) -> float:
    """Return the CPU seconds that `count` rules take, the best of several runs."""
    found = rules(*(rule(str(n), when=kinds[n % len(kinds)].replace("{}", str(n))) for n in range(count)))
    sent = upgrade()
    times = []
    for _ in range(20):
        began = time.process_time()
        for _ in range(10):
            outcome = found.evaluate(gather(sent, CONNECTION, strict_path=True, now=0))
        times.append((time.process_time() - began) / 10)
        assert outcome.refusal is None
    return min(times)


@pytest.mark.alone
def test_a_hundred_rules_cost_little() -> None:
    """Measured: 7 us for none, 120 us for ten, 0.35 ms for 100, 4 us for a regular expression. Bounds the order."""
    nothing = cost(KINDS, 0)
    print(f"\nrules of a handshake: none {nothing * 1e6:.0f} us", end="")
    for count in (10, 100):
        print(f", {count} {cost(KINDS, count) * 1e6:.0f} us", end="")
    assert cost(KINDS, 100) - nothing < 2.5e-3
    regular = (cost(('user_agent.regex("(?i)(curl|python-requests|sqlmap{})/")',), 100) - nothing) / 100
    print(f", a regular expression {regular * 1e6:.1f} us")
    assert regular < 50e-6
