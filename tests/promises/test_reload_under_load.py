"""Tunnels exchange numbered messages through reload after reload: none is dropped, nothing is lost or reordered."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Certificate, Tunnel, WebsocketsOrigin
from tests.promises.firewalled import config_for
from tests.promises.numbered import Traffic

TUNNELS, RELOADS = 300, 5


@pytest.fixture(scope="module")
def origin() -> Iterator[WebsocketsOrigin]:
    with WebsocketsOrigin() as origin:
        yield origin


def _configurations(origin: str, certificate: Certificate, folder: Path) -> Iterator[str]:
    """Certificates, rules, origins and sites, in turn; every second one has a pair of its own."""
    for number in itertools.count():
        cert, key = folder / f"{number % 2}.pem", folder / f"{number % 2}-key.pem"
        cert.write_bytes(certificate.cert.read_bytes())
        key.write_bytes(certificate.key.read_bytes())
        site = f'[[sites.rules]]\nname = "rule {number}"\nwhen = \'path == "/{number}"\'\naction = "block"\n'
        limit = '[[sites.rate_limits]]\nname = "many"\nlimit = "1000000/day"\n' if number % 3 else ""
        other = f'[[sites]]\nnames = ["s{number}.example"]\norigins = ["localhost:{1000 + number}"]\n'
        own = Certificate(certificate.ca, cert, key)
        text = config_for(origin, own, site=site + limit)
        yield text + other + f'cert = "{cert}"\nkey = "{key}"\n'


async def _through_reloads(tunnel: Tunnel, configurations: Iterator[str], tunnels: int, reloads: int) -> None:
    def reload(_: int) -> None:
        said = tunnel.reload(next(configurations))
        assert any("rules" in line for line in said), said

    traffic = Traffic(tunnel)
    await traffic.through(tunnels, reloads, reload)
    await traffic.close()
    # Only the tunnels that came and went have ended.
    refused = [record for record in tunnel.records("connection") if record["status"] != 101]
    assert refused == []


def _run(origin: WebsocketsOrigin, certificate: Certificate, folder: Path, tunnels: int, reloads: int) -> None:
    configurations = _configurations(origin.address, certificate, folder)
    with Tunnel(None, certificate, config=next(configurations), measured=True) as tunnel:
        asyncio.run(_through_reloads(tunnel, configurations, tunnels, reloads))
        assert len(tunnel.records("reloaded")) == reloads


def test_numbered_messages_through_reloads(origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path) -> None:
    _run(origin, certificate, tmp_path, TUNNELS, RELOADS)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_numbered_messages_through_a_hundred_reloads(
    origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path
) -> None:
    _run(origin, certificate, tmp_path, 2_000, 100)


def _memory_after(tunnel: Tunnel, reloads: int, configurations: Iterator[str]) -> int:
    """Return RSS after that many reloads, requested over the control socket itself: no process each."""
    from tlstunnel.processes.reach import send_command  # noqa: PLC0415

    for _ in range(reloads):
        tunnel.file.write_text(next(configurations))
        assert send_command(tunnel.control, {"do": "reload"})["changes"]
    return tunnel.rss()


def _memory(origin: WebsocketsOrigin, certificate: Certificate, folder: Path, warm: int, reloads: int) -> None:
    configurations = _configurations(origin.address, certificate, folder)
    with Tunnel(None, certificate, config=next(configurations), measured=True) as tunnel:
        descriptors = tunnel.descriptors()
        before = _memory_after(tunnel, warm, configurations)
        after = _memory_after(tunnel, reloads, configurations)
        print(f"{reloads} reloads: RSS {before >> 10} -> {after >> 10} KiB")
        # A leaked context takes 20 KiB and more, a configuration of two sites about the same.
        assert after - before < max(reloads, 200) * 5 * 1024
        assert abs(tunnel.descriptors() - descriptors) <= 2


def test_memory_after_reloads(origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path) -> None:
    _memory(origin, certificate, tmp_path, 100, 200)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_memory_after_a_thousand_reloads(origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path) -> None:
    _memory(origin, certificate, tmp_path, 200, 1000)
