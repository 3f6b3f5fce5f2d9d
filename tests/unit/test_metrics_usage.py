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
    assert usage.take_changes() == ({"a.example": values(handshakes=1), "b.example": values(limited=1)}, False)
    assert usage.take_changes() == ({}, False)
    usage.change("b.example").limited += 1
    assert usage.take_changes() == ({"b.example": values(limited=2)}, False)


def test_what_open_tunnels_move_is_sent_when_it_was_looked_for() -> None:
    usage = Usage()
    usage.change("a.example").handshakes += 2
    usage.note_open({"a.example": (2, 10, 20)})
    opened = usage.is_open
    assert opened
    assert usage.take_changes()[0] == {"a.example": values(tunnels=2, handshakes=2, bytes_up=10, bytes_down=20)}
    assert usage.find_moved()
    assert usage.take_changes()[0] == {"a.example": values(tunnels=2, handshakes=2, bytes_up=10, bytes_down=20)}
    assert not usage.find_moved()
    usage.note_open({"a.example": (2, 11, 20)})
    assert usage.take_changes()[0] == {}
    assert usage.find_moved()
    assert usage.take_changes()[0] == {"a.example": values(tunnels=2, handshakes=2, bytes_up=11, bytes_down=20)}
    ended = usage.change("a.example")
    ended.bytes_up += 11
    ended.bytes_down += 25
    usage.note_open({})
    assert not usage.is_open
    assert usage.take_changes()[0] == {"a.example": values(handshakes=2, bytes_up=11, bytes_down=25)}


def test_bytes_of_many_sites_are_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what concerns connections at once."""
    monkeypatch.setattr(module, "MOST_MOVED", 2)
    usage = Usage()
    names = [f"{number}.example" for number in range(7)]
    for name in names:
        usage.change(name).handshakes += 1
    assert usage.take_changes() == ({name: values(handshakes=1) for name in names}, False)
    usage.note_open(dict.fromkeys(names, (1, 5, 5)))
    usage.find_moved()
    usage.change("0.example").handshakes += 1
    found: list[str] = []
    for parts in (3, 2, 2):
        sites, are_more = usage.take_changes()
        assert len(sites) == parts
        assert "0.example" in sites or found
        found += sites
        assert are_more == (len(found) < len(names))
    assert sorted(found) == names


def test_connections_without_a_site_and_too_many_sites_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SITES", 1)
    usage = Usage()
    for site in ("", "a.example", "b.example"):
        usage.change(site).unfinished += 1
    assert usage.take_changes()[0] == {"a.example": values(unfinished=1)}
