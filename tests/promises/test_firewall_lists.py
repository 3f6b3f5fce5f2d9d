"""Lists are reloaded when their files change, an invalid file changes nothing, and no tunnel is affected."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    Certificate,
    Tunnel,
    WebsocketsOrigin,
    connect_tls,
    eventually,
    receive_exactly,
    upgrade,
)
from tests.promises.firewalled import connect_from, tunnel_to
from tests.promises.wire import read_until_end

STRANGER = "127.0.0.7"

TOP = 'lists = {{ botnets = "{file}", closed = "{closed}" }}\n{more}'


def _write(file: Path, text: str) -> None:
    """Replace the file atomically, as programs that renew lists do."""
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)  # noqa: PTH105


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "botnets.txt"
    file.write_text("# none yet\n")
    return file


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    file = tmp_path / "closed.txt"
    file.write_text("")
    return file


@pytest.fixture
def tunnel(certificate: Certificate, file: Path, closed: Path) -> Iterator[Tunnel]:
    site = (
        'block_addresses = ["@botnets"]\n[[sites.rules]]\nname = "closed rooms"\naction = "block"\nstatus = 404\n'
        "when = 'in_list(path, \"closed\")'\n"
    )
    with (
        WebsocketsOrigin() as origin,
        tunnel_to(origin.address, certificate, top=TOP.format(file=file, closed=closed, more=""), site=site) as tunnel,
    ):
        yield tunnel


def _status(tunnel: Tunnel, path: str = "/", ip: str = STRANGER) -> int:
    with connect_from(tunnel, ip) as client:
        status = upgrade(client, path).status
        if status != 101:
            read_until_end(client)
        return status


def test_changed_list_applies_and_tunnels_stay(tunnel: Tunnel, file: Path, closed: Path) -> None:
    with connect_from(tunnel, STRANGER) as client:
        assert upgrade(client).status == 101
        _write(file, f"# bad hosts\n{STRANGER}/32\n")
        eventually(lambda: _status(tunnel) == 403)
        assert _status(tunnel, ip="127.0.0.8") == 101
        client.sendall(b"\x81\x85\x00\x00\x00\x00hello")
        assert receive_exactly(client, 7) == b"\x81\x05hello"
        _write(file, "")
        eventually(lambda: _status(tunnel) == 101)
    _write(closed, "/attic\n/cellar\n")
    eventually(lambda: _status(tunnel, "/cellar") == 404)
    assert _status(tunnel, "/hall") == 101
    assert {record["list"] for record in tunnel.records("list reloaded")} == {"botnets", "closed"}


@pytest.mark.parametrize("how", ["words", "gone"])
def test_invalid_list_is_unchanged_and_reported(tunnel: Tunnel, file: Path, how: str) -> None:
    _write(file, f"{STRANGER}\n")
    eventually(lambda: _status(tunnel) == 403)
    if how == "words":
        _write(file, "127.0.0.0/8\nthis is no network\n")
    else:
        file.unlink()
    (record,) = tunnel.wait_records(1, "list not reloaded")
    assert str(file) in record["reason"]
    assert record["level"] == "warning"
    assert _status(tunnel) == 403
    assert _status(tunnel, ip="127.0.0.8") == 101
    _write(file, "")
    eventually(lambda: _status(tunnel) == 101)


def test_the_list_of_all_sites_acts_at_accept(certificate: Certificate, file: Path, closed: Path) -> None:
    top = TOP.format(file=file, closed=closed, more='block_addresses = ["@botnets"]')
    with WebsocketsOrigin() as origin, tunnel_to(origin.address, certificate, top=top) as tunnel:
        with connect_tls(tunnel) as client:
            assert upgrade(client).status == 101
        _write(file, f"{STRANGER}\n")

        def closed_unanswered() -> bool:
            try:
                return _status(tunnel) == 0
            except OSError:
                return True

        eventually(closed_unanswered)
        assert _status(tunnel, ip="127.0.0.8") == 101
