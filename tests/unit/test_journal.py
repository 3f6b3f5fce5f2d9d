"""The record of a connection, and samples of failures that have none."""

import asyncio

import pytest
from structlog.testing import capture_logs

from tests.unit.test_journal_lines import FACTS, filled
from tlstunnel.journal import journal as recording
from tlstunnel.journal.events import Reason
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record
from tlstunnel.metrics.families import (
    CONNECTIONS,
    CONNECTIONS_NOT_ACCEPTED,
    TLS_HANDSHAKES_FAILED,
    TUNNEL_LIFETIME_SECONDS,
)

# Records.


def test_record_of_a_connection() -> None:
    record = filled()
    with capture_logs() as logs:
        Journal().ended(record, up=12, down=345)
    (line,) = logs
    assert line.pop("seconds") >= 0
    assert line == {
        "event": "connection",
        "log_level": "info",
        **FACTS,
        "up": 12,
        "down": 345,
        "ended_by": "client",
        "reason": "closed",
    }


def test_seconds_are_those_since_the_beginning() -> None:
    record = filled()
    record.started -= 61.5
    with capture_logs() as logs:
        Journal().ended(record)
    assert logs[0]["seconds"] == pytest.approx(61.5, abs=5)


def test_peer_is_logged_if_it_is_not_the_client() -> None:
    record = filled()
    assert "peer" not in record.facts()
    record.client = "198.51.100.7"
    assert record.facts() == {**FACTS, "client": "198.51.100.7", "peer": "192.0.2.1"}


def test_detail_is_logged_if_there_is_one() -> None:
    record = filled()
    record.detail = "101 with a wrong Sec-WebSocket-Accept"
    assert record.facts() == {**FACTS, "detail": "101 with a wrong Sec-WebSocket-Accept"}


@pytest.mark.parametrize(
    "sent", [b"https://a.example/?token=x", b"https://u:p@a.example", b"https://a.example#x", b"x"]
)
def test_what_is_no_web_origin_is_not_logged_since_it_may_have_a_secret(sent: bytes) -> None:
    record = filled()
    record.take_headers(sent, b"")
    assert "web_origin" not in record.facts()
    record.take_headers(b"https://a.example:8443", b"")
    assert record.facts()["web_origin"] == "https://a.example:8443"


def test_new_record_has_every_field() -> None:
    assert Record("a", "").facts().keys() == FACTS.keys()


def test_opening_is_logged_if_configured() -> None:
    with capture_logs() as logs:
        Journal(opened=True).opened(filled())
    assert logs == [{"event": "opened", "log_level": "info", **FACTS}]


def test_opening_is_counted_only_by_default() -> None:
    journal = Journal()
    with capture_logs() as logs:
        journal.opened(filled())
        journal.opened(filled())
    assert logs == []
    assert journal.metrics.usage.change("chat.example.com").handshakes == 2


def test_ends_are_counted_by_side_and_reason() -> None:
    journal, other = Journal(), filled()
    other.ended_by, other.reason = "origin", "reset"
    with capture_logs() as logs:
        for record in (filled(), other, filled()):
            journal.ended(record)
    assert len(logs) == 3
    site = "chat.example.com"
    assert journal.metrics[CONNECTIONS].values == {(site, "client", "closed"): 2, (site, "origin", "reset"): 1}


def test_only_the_fixed_part_of_a_reason_is_counted() -> None:
    journal = Journal()
    for reason in ("TLS error: BAD_RECORD_MAC", "TLS error: DECRYPTION_FAILED", "rule: a", "of some other release"):
        record = filled()
        record.reason = reason
        with capture_logs() as logs:
            journal.ended(record)
        assert logs[0]["reason"] == reason
    counted = {reason: count for (_, _, reason), count in journal.metrics[CONNECTIONS].values.items()}
    assert counted == {"TLS error": 2, "rule": 1, "other": 1}


def test_bytes_are_counted_at_the_end() -> None:
    journal = Journal()
    with capture_logs():
        journal.ended(filled(), up=12, down=345)
        journal.ended(filled(), up=1)
    site = "chat.example.com"
    usage = journal.metrics.usage.change(site)
    assert (usage.bytes_up, usage.bytes_down) == (13, 345)
    assert journal.metrics.snapshot().total(TUNNEL_LIFETIME_SECONDS, le="1.0") == 2


def test_listeners_get_each_record_once_it_is_complete() -> None:
    journal, record = Journal(), filled()
    heard: list[tuple[Record, int, int]] = []
    journal.listeners.append(lambda _, one: heard.append((one, one.up, one.down)))
    failed = filled()
    with capture_logs():
        journal.failed(failed, Reason.TLS_TIMED_OUT)
        journal.ended(record, 1, 2)
    assert heard == [(failed, 0, 0), (record, 1, 2)]


# Samples.


def test_failures_before_a_request_are_counted_and_one_is_logged() -> None:
    journal = Journal()
    with capture_logs() as logs:
        for _ in range(1000):
            journal.failed(Record("a", "192.0.2.1"), "tls: handshake failed", "NO_SHARED_CIPHER")
    assert logs == [
        {
            "event": "no TLS handshake",
            "log_level": "warning",
            "reason": "tls: handshake failed",
            "suppressed": 0,
            "client": "192.0.2.1",
            "detail": "NO_SHARED_CIPHER",
        }
    ]
    assert journal.metrics[TLS_HANDSHAKES_FAILED].values == {("tls: handshake failed",): 1000}


def test_later_sample_has_the_number_that_were_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    with capture_logs() as logs:
        for _ in range(5):
            journal.not_accepted("192.0.2.1", Reason.UNTRUSTED_PROXY)
        monkeypatch.setattr(recording, "SAMPLE_SECONDS", 0.0)
        journal.not_accepted("192.0.2.1", Reason.UNTRUSTED_PROXY)
        journal.not_accepted("192.0.2.1", Reason.UNTRUSTED_PROXY)
    assert [line["suppressed"] for line in logs] == [0, 4, 0]
    assert journal.metrics[CONNECTIONS_NOT_ACCEPTED].values == {("untrusted proxy",): 7}


def test_suppressed_lines_are_counted_when_the_window_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SAMPLE_SECONDS", 0.05)
    journal = Journal()

    async def flood() -> None:
        async with asyncio.timeout(20):
            for number in range(5):
                journal.failed(Record("a", f"192.0.2.{number}"), "tls: handshake failed", f"FAILURE {number}")
            while len(logs) < 2:
                await asyncio.sleep(0.001)

    with capture_logs() as logs:
        asyncio.run(flood())
        journal.flush()
    assert [(line["detail"], line["suppressed"]) for line in logs] == [("FAILURE 0", 0), ("FAILURE 4", 3)]


def test_suppressed_lines_are_counted_at_the_end_of_the_process() -> None:
    journal = Journal()
    with capture_logs() as logs:
        for _ in range(3):
            journal.not_accepted("192.0.2.1", Reason.ADDRESS_BLOCKED)
        journal.failed(Record("a", "192.0.2.2"), Reason.ADDRESS_BLOCKED)
        journal.flush()
        journal.flush()
    assert [(line["event"], line["suppressed"]) for line in logs] == [
        ("not accepted", 0),
        ("no TLS handshake", 0),  # the same reason does not hide another event
        ("not accepted", 1),
    ]


@pytest.mark.parametrize(
    ("reason", "level"),
    [
        (Reason.HELLO_CLIENT_CLOSED, "info"),
        (Reason.PROXY_CLIENT_CLOSED, "info"),
        (Reason.HELLO_MALFORMED, "warning"),
        (Reason.TLS_CLIENT_CLOSED, "warning"),
    ],
)
def test_health_checks_by_tcp_are_no_warning(reason: Reason, level: str) -> None:
    with capture_logs() as logs:
        Journal().failed(Record("a", "192.0.2.1"), reason)
    assert [line["log_level"] for line in logs] == [level]


def test_each_kind_is_sampled_separately() -> None:
    journal = Journal()
    with capture_logs() as logs:
        for why in ("hello: timed out", "hello: not TLS", "hello: timed out", "hello: not TLS"):
            journal.failed(Record("a", "192.0.2.1"), why)
    assert [line["reason"] for line in logs] == ["hello: timed out", "hello: not TLS"]


def test_sample_has_the_sni_if_there_is_one() -> None:
    record = Record("a", "192.0.2.1")
    record.sni = "nobody.example.com"
    with capture_logs() as logs:
        Journal().failed(record, "hello: no site for this name")
    assert logs[0]["sni"] == "nobody.example.com"
