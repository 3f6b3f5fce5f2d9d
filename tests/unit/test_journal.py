"""The record of a connection, and samples of what has none."""

import pytest
from structlog.testing import capture_logs

from tlstunnel.journal import journal as recording
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.record import Record


def filled() -> Record:
    record = Record("0123456789abcdef", "192.0.2.1")
    record.site, record.sni, record.ja4 = "chat.example.com", "chat.example.com", "t13d1516h2_8daaf6152771_e5627efa2ab1"
    record.tls_version, record.cipher = "TLSv1.3", "TLS_AES_128_GCM_SHA256"
    record.path, record.origin = "/chat", "localhost:3000"
    record.status, record.verdict = 101, "pass"
    record.ended_by, record.reason = "client", "closed"
    return record


FACTS = {
    "id": "0123456789abcdef",
    "client": "192.0.2.1",
    "site": "chat.example.com",
    "sni": "chat.example.com",
    "ja4": "t13d1516h2_8daaf6152771_e5627efa2ab1",
    "tls_version": "TLSv1.3",
    "cipher": "TLS_AES_128_GCM_SHA256",
    "path": "/chat",
    "status": 101,
    "verdict": "pass",
    "origin": "localhost:3000",
}


# What is said of a connection.


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


def test_peer_is_named_where_it_is_not_the_client() -> None:
    record = filled()
    assert "peer" not in record.facts()
    record.client = "198.51.100.7"
    assert record.facts() == {**FACTS, "client": "198.51.100.7", "peer": "192.0.2.1"}


def test_detail_is_named_where_there_is_one() -> None:
    record = filled()
    record.detail = "101 with a wrong Sec-WebSocket-Accept"
    assert record.facts() == {**FACTS, "detail": "101 with a wrong Sec-WebSocket-Accept"}


def test_new_record_has_every_field() -> None:
    assert Record("a", "").facts().keys() == FACTS.keys()


def test_opening_is_logged_where_asked_for() -> None:
    with capture_logs() as logs:
        Journal(opened=True).opened(filled())
    assert logs == [{"event": "opened", "log_level": "info", **FACTS}]


def test_opening_is_counted_only_by_default() -> None:
    journal = Journal()
    with capture_logs() as logs:
        journal.opened(filled())
        journal.opened(filled())
    assert logs == []
    assert journal.counters["opened"] == 2


def test_ends_are_counted_by_who_and_why() -> None:
    journal, other = Journal(), filled()
    other.ended_by, other.reason = "origin", "reset"
    with capture_logs() as logs:
        for record in (filled(), other, filled()):
            journal.ended(record)
    assert len(logs) == 3
    assert journal.counters == {"ended: client: closed": 2, "ended: origin: reset": 1}


# Samples.


def test_failures_before_a_request_are_counted_and_one_is_logged() -> None:
    journal = Journal()
    with capture_logs() as logs:
        for _ in range(1000):
            journal.failed(Record("a", "192.0.2.1"), "tls: handshake failed", "NO_SHARED_CIPHER")
    assert logs == [
        {
            "event": "no handshake",
            "log_level": "warning",
            "reason": "tls: handshake failed",
            "unsaid": 0,
            "client": "192.0.2.1",
            "detail": "NO_SHARED_CIPHER",
        }
    ]
    assert journal.counters == {"tls: handshake failed": 1000}


def test_later_sample_says_how_many_were_not_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal()
    with capture_logs() as logs:
        for _ in range(5):
            journal.sampled("no handshake", "hello: timed out")
        monkeypatch.setattr(recording, "SAMPLE_SECONDS", 0.0)
        journal.sampled("no handshake", "hello: timed out")
        journal.sampled("no handshake", "hello: timed out")
    assert [line["unsaid"] for line in logs] == [0, 4, 0]
    assert journal.counters == {"hello: timed out": 7}


def test_each_kind_is_sampled_alone() -> None:
    journal = Journal()
    with capture_logs() as logs:
        for why in ("hello: timed out", "hello: not TLS", "hello: timed out", "hello: not TLS"):
            journal.failed(Record("a", "192.0.2.1"), why)
    assert [line["reason"] for line in logs] == ["hello: timed out", "hello: not TLS"]


def test_sample_names_the_sni_where_there_is_one() -> None:
    record = Record("a", "192.0.2.1")
    record.sni = "nobody.example.com"
    with capture_logs() as logs:
        Journal().failed(record, "hello: no site of this name")
    assert logs[0]["sni"] == "nobody.example.com"
