"""What every stage decided, from a record."""

from pathlib import Path
from typing import Any

import pytest

from tlstunnel.commands.records import StageStatus
from tlstunnel.config import decode
from tlstunnel.inventory.stages import STAGES, Checks, describe_stages
from tlstunnel.journal.events import Reason

CHECKS = Checks(
    addresses=False,
    web_origins=True,
    rules=frozenset({"inside"}),
    limits=frozenset({"per address"}),
    managed=False,
    worker="",
)


def record(reason: str, **fields: Any) -> dict[str, Any]:
    known = {"event": "connection", "client": "192.0.2.1", "site": "a.test", "verdict": "refused", "path": "/x"}
    return {**known, "reason": reason, **fields}


def decisions(stages: list[StageStatus]) -> dict[str, str]:
    return {stage.stage: stage.decision for stage in stages}


def test_stages_before_have_passed_and_those_after_were_not_reached() -> None:
    stages = describe_stages(record("rule: inside", status=403, rule="inside", tls_version="TLSv1.3"), CHECKS)
    found = decisions(stages)
    assert list(found) == list(STAGES)
    assert found["firewall: rules"] == "refused"
    assert {found[name] for name in STAGES[: STAGES.index("firewall: rules")]} == {"passed", "not configured"}
    assert {found[name] for name in STAGES[STAGES.index("firewall: rules") + 1 :]} == {"not reached"}
    by_name = {stage.stage: stage.detail for stage in stages}
    assert by_name["firewall: rules"] == "rule: inside; the tunnel responded with 403"
    assert found["firewall: address lists"] == "not configured"
    assert found["firewall: target"] == "passed"
    assert by_name["accept"] == "from 192.0.2.1"


def test_what_was_only_logged_is_named_at_its_check() -> None:
    logged = ["addresses", "web origin", "inside", "per address", "managed rules"]
    stages = describe_stages(record("no origin", status=503, logged=logged), CHECKS)
    assert [stage.stage for stage in stages if stage.decision == "logged"] == [
        "firewall: address lists",
        "firewall: web origin",
        "firewall: rules",
        "firewall: rate limits",
        "firewall: managed rules",
    ]
    assert decisions(stages)["origin"] == "refused"


def test_a_check_that_refuses_can_have_logged_before() -> None:
    stages = describe_stages(record("rule: last", status=403, logged=["inside"]), CHECKS)
    assert [stage.decision for stage in stages if stage.stage == "firewall: rules"] == ["logged", "refused"]


@pytest.mark.parametrize(
    ("fields", "stage", "decision"),
    [
        ({"reason": "hello: plain HTTP", "event": "no TLS handshake"}, "hello", "refused"),
        ({"reason": "hello: client closed", "event": "no TLS handshake"}, "hello", "ended"),
        ({"reason": "hello: no site for this name", "event": "no TLS handshake"}, "site", "refused"),
        ({"reason": "tls: no client certificate", "event": "no TLS handshake"}, "TLS", "refused"),
        ({"reason": "tls: timed out", "event": "no TLS handshake"}, "TLS", "ended"),
        ({"reason": "PROXY header: malformed", "event": "no TLS handshake"}, "accept", "refused"),
        ({"reason": "address blocked", "event": "no TLS handshake"}, "accept", "refused"),
        ({"reason": "address blocked", "event": "not accepted"}, "accept", "refused"),
        ({"reason": "address blocked"}, "firewall: address lists", "refused"),
        ({"reason": "method"}, "request", "refused"),
        ({"reason": "request timed out", "origin": "127.0.0.1:1"}, "response", "refused"),
        ({"reason": "edge: reply"}, "edge", "refused"),
        ({"reason": "origin unreachable", "origin": "127.0.0.1:1"}, "origin", "refused"),
        ({"reason": "declined", "verdict": "pass", "status": 404, "ended_by": "origin"}, "response", "ended"),
        ({"reason": "closed during the handshake", "verdict": ""}, "request", "ended"),
        ({"reason": "closed during the handshake", "verdict": "", "edge": "forwarded"}, "origin", "ended"),
        ({"reason": "closed during the handshake", "verdict": "", "origin": "127.0.0.1:1"}, "origin", "ended"),
        ({"reason": "closed during the handshake", "verdict": "", "origin": "x", "status": 9}, "response", "ended"),
        ({"reason": "of a later release"}, "request", "refused"),
    ],
)
def test_where_it_ended(fields: dict[str, Any], stage: str, decision: str) -> None:
    (found,) = [one for one in describe_stages(record(**fields)) if one.decision in {"refused", "ended"}]
    assert (found.stage, found.decision) == (stage, decision)


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_has_a_stage(reason: Reason) -> None:
    for event in ("connection", "no TLS handshake", "not accepted"):
        stages = describe_stages(record(f"{reason}", event=event), CHECKS)
        assert [stage.decision for stage in stages if stage.decision in {"refused", "ended"}]


def test_a_proxy_and_an_allowing_rule_are_named() -> None:
    stages = describe_stages(record("no origin", peer="10.0.0.1", rule="inside", sni="a.test"), CHECKS)
    by_name = {stage.stage: stage.detail for stage in stages}
    assert by_name["accept"] == "from 192.0.2.1, through the proxy 10.0.0.1"
    assert by_name["firewall: rules"] == "allowed by inside"
    assert by_name["hello"] == "for a.test"


def test_the_checks_of_a_site_are_those_of_all_sites_and_its_own() -> None:
    config = decode(
        """
        [[rules]]
        name = "all"
        when = "false"
        action = "block"
        [[sites]]
        names = ["a.test"]
        origins = ["127.0.0.1:1"]
        block_addresses = ["192.0.2.0/24"]
        worker = "w.py:fetch"
          [[sites.rate_limits]]
          name = "some"
          limit = "1/minute"
        """,
        Path("/"),
        "tlstunnel.toml",
    )
    checks = Checks.of(config.sites[0], config)
    assert checks == Checks(
        addresses=True,
        web_origins=False,
        rules=frozenset({"all"}),
        limits=frozenset({"some"}),
        managed=False,
        worker="/w.py:fetch",
    )
