"""The checks of the firewall act in order, each by itself and before those after it, and each action works."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus.managed_rules import require_libmodsecurity
from tests.harness import TIMEOUT, Certificate, Tunnel
from tests.promises.firewalled import Outcome, Servers, try_handshake, tunnel_to, write_rules
from tests.promises.scripted_origin import ScriptedOrigin

BLOCKED_BY_ALL, BLOCKED_BY_THE_SITE, UNTRUSTED, PROXY = "127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5"

TOP = f"""
block_addresses = ["{BLOCKED_BY_ALL}"]

[[rules]]
name = "admins of all sites"
when = 'path.startsWith("/admin")'
action = "block"
"""

SITE = f"""
block_addresses = ["{BLOCKED_BY_THE_SITE}"]
web_origins = ["same"]

[[sites.rules]]
name = "admins of the site"
when = 'path.startsWith("/admin") || path == "/hidden"'
action = "block"
status = 404
body = "there is nothing here"

[[sites.rules]]
name = "noted"
when = '"note" in query'
action = "log"

[[sites.rules]]
name = "friends"
when = '"friend" in query'
action = "allow"

[[sites.rules]]
name = "no limits"
when = '"free" in query'
action = "skip"
skip = ["rate_limits"]

[[sites.rules]]
name = "no managed rules"
when = '"raw" in query'
action = "skip"
skip = ["managed_rules"]

[[sites.rules]]
name = "strangers"
when = '"stranger" in query'
action = "block"

[[sites.rules]]
name = "closed"
when = 'headers["x-key"] != "sesame" && path == "/vault"'
action = "block"
on_error = "block"

[[sites.rules]]
name = "open"
when = 'headers["x-key"] != "sesame" && path == "/vault"'
action = "block"

[[sites.rate_limits]]
name = "users"
key = ["header:X-User"]
limit = "1/day"
strategy = "moving"

[sites.managed_rules]
rules = "{{rules}}"
timeout = "10s"
"""

SPENT = ("X-User", "spent")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_libmodsecurity()
    return write_rules(tmp_path_factory.mktemp("rules"))


@pytest.fixture(scope="module")
def servers(certificate: Certificate, rules: Path) -> Iterator[Servers]:
    """Configure a user who has opened all of the day's tunnels."""
    with (
        ScriptedOrigin() as origin,
        tunnel_to(origin.address, certificate, top=TOP, site=SITE.replace("{rules}", str(rules))) as tunnel,
    ):
        assert try_handshake((origin, tunnel), headers=[SPENT]).status == 101
        yield origin, tunnel


def _closed_at_accept(tunnel: Tunnel, ip: str) -> None:
    """Check that it ends without a byte, although the client sent none: the tunnel did not wait for a ClientHello."""
    with (
        socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT, source_address=(ip, 0)) as client,
        contextlib.suppress(ConnectionResetError),
    ):
        assert client.recv(1) == b""


OFFENCES: dict[str, tuple[int, str]] = {
    "addresses": (403, "address blocked"),
    "origin": (403, "web origin not allowed"),
    "rules": (403, "rule: admins of all sites"),
    "rate limits": (429, "rate limit: users"),
    "managed rules": (403, "managed rules"),
}
"""What is wrong with a request, in the order of the checks that find it, with the reasons of their refusals."""


def _offending(servers: Servers, offences: list[str]) -> Outcome:
    """Send a request with all of these offences."""
    headers = [SPENT] if "rate limits" in offences else []
    headers += [("Origin", "https://evil.example")] if "origin" in offences else []
    target = ("/admin" if "rules" in offences else "/chat") + ("?x=bad" if "managed rules" in offences else "?x=good")
    return try_handshake(servers, target, headers, ip=BLOCKED_BY_THE_SITE if "addresses" in offences else "127.0.0.1")


@pytest.mark.parametrize("offence", OFFENCES)
def test_first_check_that_refuses_decides(servers: Servers, offence: str) -> None:
    """Removing one offence after the other shows the next check."""
    order = list(OFFENCES)
    outcome = _offending(servers, order[order.index(offence) :])
    assert (outcome.status, outcome.reason) == OFFENCES[offence]


@pytest.mark.parametrize("offence", OFFENCES)
def test_each_check_refuses_by_itself(servers: Servers, offence: str) -> None:
    outcome = _offending(servers, [offence])
    assert (outcome.status, outcome.reason) == OFFENCES[offence]
    assert not any(sent in outcome.body for sent in ("evil", "/admin", "spent", "bad")), "it repeats what was sent"


def test_without_an_offence_it_passes(servers: Servers) -> None:
    outcome = _offending(servers, [])
    assert outcome.status == 101
    assert not {"rule", "logged", "managed_rules"} & outcome.record.keys()


def test_the_list_of_all_sites_closes_before_tls(servers: Servers) -> None:
    """Counted, and a sample of it logged; no record, as there is no request."""
    _, tunnel = servers
    for _ in range(3):
        _closed_at_accept(tunnel, BLOCKED_BY_ALL)
    line = tunnel.wait_record(lambda record: record["event"] == "not accepted")
    assert (line["reason"], line["client"], line["level"]) == ("address blocked", BLOCKED_BY_ALL, "warning")
    assert try_handshake(servers).status == 101  # those logged before it have been read
    assert len(tunnel.records("not accepted")) == 1
    assert not [record for record in tunnel.records() if record.get("client") == BLOCKED_BY_ALL and record != line]


def test_detail_of_a_refused_web_origin_is_in_the_log_and_not_in_the_response(servers: Servers) -> None:
    outcome = _offending(servers, ["origin"])
    assert outcome.record["detail"] == "https://evil.example"
    assert "evil" not in outcome.body


def test_refusal_by_a_rate_limit_says_when_to_retry(servers: Servers) -> None:
    headers = _offending(servers, ["rate limits"]).headers
    wait = int(headers["Retry-After"])
    assert 86_000 < wait <= 86_400
    assert headers["RateLimit"] == f'"users";r=0;t={wait}'
    assert headers["RateLimit-Policy"] == '"users";q=1;w=86400'


def test_a_refusal_by_managed_rules_names_them_in_the_log(servers: Servers) -> None:
    outcome = _offending(servers, ["managed rules"])
    assert outcome.record["managed_rules"]["matches"] == [{"id": 1001, "message": "bad x"}]
    assert "1001" in outcome.record["detail"]
    assert "1001" not in outcome.body


def test_request_that_another_check_refuses_uses_up_no_limit(servers: Servers) -> None:
    fresh = ("X-User", "fresh")
    for target, headers in (("/admin", [fresh]), ("/chat", [fresh, ("Origin", "https://evil.example")])):
        assert try_handshake(servers, target, headers).status == 403
    assert try_handshake(servers, headers=[fresh]).status == 101
    assert try_handshake(servers, headers=[fresh]).status == 429


# --- actions ---------------------------------------------------------------------------------------------------------


def test_block_has_a_status_and_a_body(servers: Servers) -> None:
    outcome = try_handshake(servers, "/hidden")
    assert (outcome.status, outcome.reason, outcome.record["rule"]) == (
        404,
        "rule: admins of the site",
        "admins of the site",
    )
    assert outcome.body.startswith("404 Not Found: there is nothing here\n")


def test_rules_of_all_sites_come_before_the_sites_own(servers: Servers) -> None:
    assert try_handshake(servers, "/admin").reason == "rule: admins of all sites"


def test_log_continues(servers: Servers) -> None:
    outcome = try_handshake(servers, "/chat?note")
    assert (outcome.status, outcome.record["logged"]) == (101, ["noted"])
    outcome = try_handshake(servers, "/chat?note&stranger")
    assert (outcome.reason, outcome.record["logged"]) == ("rule: strangers", ["noted"])


def test_allow_ends_the_rules_and_nothing_else(servers: Servers) -> None:
    assert try_handshake(servers, "/chat?stranger").reason == "rule: strangers"
    outcome = try_handshake(servers, "/chat?friend&stranger")
    assert (outcome.status, outcome.record["rule"]) == (101, "friends")
    assert try_handshake(servers, "/chat?friend", [SPENT]).reason == "rate limit: users"
    assert try_handshake(servers, "/chat?friend&x=bad").reason == "managed rules"


def test_skip_skips_the_named_checks_and_continues(servers: Servers) -> None:
    assert try_handshake(servers, "/chat?free", [SPENT]).status == 101
    assert try_handshake(servers, "/chat?free&x=bad", [SPENT]).reason == "managed rules"
    assert try_handshake(servers, "/chat?raw&x=bad").status == 101
    assert try_handshake(servers, "/chat?raw", [SPENT]).reason == "rate limit: users"
    assert try_handshake(servers, "/chat?free&raw&x=bad", [SPENT]).status == 101
    assert try_handshake(servers, "/chat?free&raw&stranger", [SPENT]).reason == "rule: strangers"


def test_failing_rule_does_not_match_unless_on_error_is_block(servers: Servers) -> None:
    """Of two rules that need the same header, the one that blocks on errors does so; logged once, not each time."""
    _, tunnel = servers
    assert try_handshake(servers, "/vault", [("X-Key", "sesame")]).status == 101
    assert try_handshake(servers, "/vault", [("X-Key", "wrong")]).reason == "rule: closed"
    for _ in range(3):
        outcome = try_handshake(servers, "/chat?friend")  # allowed before the rules that would fail
        assert outcome.status == 101
        outcome = try_handshake(servers, "/vault")
        assert (outcome.status, outcome.reason) == (403, "rule: closed")
    failed = [record for record in tunnel.records("rule failed") if record["rule"] == "closed"]
    assert len(failed) == 1
    assert failed[0]["level"] == "warning"


# --- mode = "log" ----------------------------------------------------------------------------------------------------

LOGGED_TOP = f"""
block_addresses = ["{BLOCKED_BY_ALL}"]
addresses_mode = "log"

[[rules]]
name = "admins"
when = 'path.startsWith("/admin")'
action = "block"
mode = "log"

[[rate_limits]]
name = "all"
limit = "1/day"
strategy = "moving"
max_tunnels = 1
mode = "log"
"""

LOGGED_SITE = f"""
block_addresses = ["{BLOCKED_BY_ALL}"]
addresses_mode = "log"
web_origins = ["same"]
web_origins_mode = "log"

[[sites.rules]]
name = "skips"
when = 'path.startsWith("/admin")'
action = "skip"
skip = ["rate_limits", "managed_rules"]
mode = "log"

[[sites.rate_limits]]
name = "users"
key = ["header:X-User"]
limit = "1/day"
strategy = "moving"
mode = "log"

[sites.managed_rules]
rules = "{{rules}}"
timeout = "10s"
mode = "log"
"""


def test_mode_log_everywhere_passes_all_and_records_what_would_refuse(certificate: Certificate, rules: Path) -> None:
    site = LOGGED_SITE.replace("{rules}", str(rules))
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, top=LOGGED_TOP, site=site) as tunnel:
        headers = [SPENT, ("Origin", "https://evil.example")]
        first = try_handshake((origin, tunnel), "/admin?x=bad", headers, ip=BLOCKED_BY_ALL)
        again = try_handshake((origin, tunnel), "/admin?x=bad", headers, ip=BLOCKED_BY_ALL)
        clean = try_handshake((origin, tunnel), "/chat?x=good")
        assert not tunnel.records("not accepted")
    assert (first.status, again.status, clean.status) == (101, 101, 101)
    rules_and_before = ["addresses", "web origin", "admins", "skips"]
    assert first.record["logged"] == [*rules_and_before, "managed rules"]
    assert again.record["logged"] == [*rules_and_before, "all", "users", "managed rules"]
    assert again.record["managed_rules"]["matches"] == [{"id": 1001, "message": "bad x"}]
    assert "rule" not in again.record
    assert not {"rule", "logged", "managed_rules"} & clean.record.keys()


# --- behind a proxy --------------------------------------------------------------------------------------------------

BEHIND = {
    "top": f'trusted_proxies = ["{PROXY}"]\nblock_addresses = ["203.0.113.0/24"]\n',
    "site": """
allow_addresses = ["127.0.0.4", "192.0.2.0/24", "203.0.113.0/24"]

[[sites.rules]]
name = "one of them"
when = 'ip_in(ip, "192.0.2.66")'
action = "block"

[[sites.rate_limits]]
name = "addresses"
limit = "2/day"
strategy = "moving"
when = 'path == "/limited"'
""",
}


@pytest.fixture(scope="module")
def behind(certificate: Certificate) -> Iterator[Servers]:
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, **BEHIND) as tunnel:
        yield origin, tunnel


@pytest.mark.parametrize(
    ("claimed", "reason"),
    [
        ("192.0.2.1", ""),
        ("203.0.113.9", "address blocked"),  # of all sites, though at accept it was the proxy's
        ("::ffff:203.0.113.9", "address blocked"),
        ("::ffff:cb00:7109", "address blocked"),
        ("192.0.2.1, 203.0.113.9", "address blocked"),
        ("203.0.113.9, 192.0.2.1", ""),  # what the client has set itself
        ("198.51.100.1", "address not allowed"),
        ("192.0.2.66", "rule: one of them"),
        ("::ffff:192.0.2.66", "rule: one of them"),
        ("0:0:0:0:0:ffff:192.0.2.66", "rule: one of them"),
    ],
)
def test_client_behind_a_trusted_proxy_is_checked(behind: Servers, claimed: str, reason: str) -> None:
    outcome = try_handshake(behind, headers=[("X-Forwarded-For", claimed)], ip=PROXY)
    if reason:
        assert (outcome.status, outcome.reason) == (403, reason)
    else:
        assert (outcome.status, outcome.record["client"]) == (101, "192.0.2.1")
    assert outcome.record["peer"] == PROXY


@pytest.mark.parametrize("claimed", ["203.0.113.9", "192.0.2.66", "198.51.100.1", "127.0.0.1", "::1", "nonsense", ""])
def test_claims_of_an_untrusted_client_are_ignored(behind: Servers, claimed: str) -> None:
    """They neither block nor admit a client under another address: the origin gets the real one."""
    headers = [(name, claimed) for name in ("X-Forwarded-For", "X-Real-IP")] + [("Forwarded", f"for={claimed}")]
    outcome = try_handshake(behind, headers=headers, ip=UNTRUSTED)
    assert (outcome.status, outcome.record["client"]) == (101, UNTRUSTED)
    assert f"X-Forwarded-For: {UNTRUSTED}\r\n".encode() in outcome.head
    if claimed not in ("", "127.0.0.1"):
        assert claimed.encode() not in outcome.head
    for allowed in ("192.0.2.1", UNTRUSTED):
        outcome = try_handshake(behind, headers=[("X-Forwarded-For", allowed)], ip="127.0.0.6")
        assert (outcome.status, outcome.reason, outcome.record["client"]) == (403, "address not allowed", "127.0.0.6")


def test_clients_behind_a_proxy_are_counted_separately(behind: Servers) -> None:
    def status_for(client: str, ip: str = PROXY) -> int:
        return try_handshake(behind, "/limited", [("X-Forwarded-For", client)], ip=ip).status

    assert [status_for("192.0.2.7") for _ in range(3)] == [101, 101, 429]
    assert status_for("::ffff:192.0.2.7") == 429
    assert [status_for("192.0.2.8") for _ in range(3)] == [101, 101, 429]
    # A client that changes its claims is still the same client.
    assert [status_for(f"192.0.2.{number}", UNTRUSTED) for number in range(20, 23)] == [101, 101, 429]
