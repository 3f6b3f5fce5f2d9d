"""What each site has used of a process, and what of it is sent."""

import pytest

from tlstunnel.metrics import usage as module
from tlstunnel.metrics.usage import FIELDS, Usage
from tlstunnel.state.history.samples import Counts


def values(**given: int) -> list[int]:
    return [given.get(name, 0) for name in FIELDS]


def test_the_fields_are_those_of_the_history() -> None:
    """In the same order; the CPU time is added by the parent."""
    assert ("tunnels", *Counts._fields[:-1]) == FIELDS
    assert Counts._fields[-1] == "cpu"


def test_only_what_has_changed_is_sent() -> None:
    usage = Usage()
    usage.change("a.example").handshakes += 1
    usage.change("b.example").limited += 1
    assert usage.take_changes() == {"a.example": values(handshakes=1), "b.example": values(limited=1)}
    assert usage.take_changes() == {}
    usage.change("b.example").limited += 1
    assert usage.take_changes() == {"b.example": values(limited=2)}


def test_open_tunnels_and_what_they_move_are_sent_when_they_change() -> None:
    usage = Usage()
    usage.change("a.example").handshakes += 2
    usage.note_open({"a.example": (2, 10, 20)})
    opened = usage.is_open
    assert opened
    assert usage.take_changes() == {"a.example": values(tunnels=2, handshakes=2, bytes_up=10, bytes_down=20)}
    usage.note_open({"a.example": (2, 10, 20)})
    assert usage.take_changes() == {}
    usage.note_open({"a.example": (2, 11, 20)})
    assert usage.take_changes() == {"a.example": values(tunnels=2, handshakes=2, bytes_up=11, bytes_down=20)}
    ended = usage.change("a.example")
    ended.bytes_up += 11
    ended.bytes_down += 25
    usage.note_open({})
    assert not usage.is_open
    assert usage.take_changes() == {"a.example": values(handshakes=2, bytes_up=11, bytes_down=25)}


def test_connections_without_a_site_and_too_many_sites_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SITES", 1)
    usage = Usage()
    for site in ("", "a.example", "b.example"):
        usage.change(site).unfinished += 1
    assert usage.take_changes() == {"a.example": values(unfinished=1)}
