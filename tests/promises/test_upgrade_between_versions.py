"""A tunnel can be upgraded from the previous release and downgraded to it without losing a connection."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Certificate, Tunnel, WebsocketsOrigin, eventually
from tests.promises.firewalled import config_for
from tests.promises.numbered import Traffic
from tests.promises.versions import Versions, unpack, upgraded
from tlstunnel.processes.messages import FORMAT
from tlstunnel.processes.previous import FORMAT as PREVIOUS

WHEELS = sorted(Path(__file__).parent.parent.joinpath("versions").glob("*.whl"))

TUNNELS = 20

LIMIT = '[[sites.rate_limits]]\nname = "tunnels"\nmax_tunnels = 50\n'


@pytest.fixture(scope="module")
def origin() -> Iterator[WebsocketsOrigin]:
    with WebsocketsOrigin() as origin:
        yield origin


@pytest.fixture(scope="module", params=WHEELS, ids=lambda wheel: wheel.name.split("-py3")[0])
def previous(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("previous") / "unpacked"
    unpack(request.param, folder)
    return folder


@pytest.fixture
def versions(tmp_path: Path, previous: Path) -> Versions:
    """The earlier release, as ``previous``, is the current one; the code under test is ``present``."""
    versions = Versions(tmp_path / "versions")
    versions.install("present")
    versions.install_folder(previous, "previous")
    return versions


def children_of(pid: int) -> set[int]:
    """Return the pids of its children, also of those that have exited and were not waited for."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _generations(tunnel: Tunnel) -> dict[int, int]:
    """Return the number of tunnels of each generation."""
    found: dict[int, int] = {}
    for one in tunnel.status()["processes"]:
        found[one["generation"]] = found.get(one["generation"], 0) + one["tunnels"]
    return found


def test_the_wheel_has_the_previous_format() -> None:
    assert FORMAT == PREVIOUS + 1
    assert WHEELS


@pytest.mark.timeout(240)
@pytest.mark.parametrize("processes", [1, 2])
def test_to_the_present_code_and_back_and_again(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions, processes: int
) -> None:
    """Tunnels of every generation exchange numbered messages, and clients come and go, all along."""
    changes = ["present", "previous", "present"]
    with Tunnel(
        origin.address,
        certificate,
        arguments=("--processes", str(processes)),
        settings='[release]\ndrain_over = "1s"\n',
        environment=versions.environment,
        measured=True,
    ) as tunnel:
        parent = tunnel.parent

        async def run() -> None:
            traffic = Traffic(tunnel)
            loop = asyncio.get_running_loop()

            def change(number: int) -> None:
                versions.choose(changes[number])
                assert upgraded(tunnel).endswith(f"generation {number + 2}")
                asyncio.run_coroutine_threadsafe(traffic.keep_one_more(), loop).result(60)

            await traffic.through(TUNNELS, len(changes), change)
            assert _generations(tunnel) == {1: TUNNELS, 2: 1, 3: 1, 4: 1}
            await traffic.close()

        asyncio.run(run())
        eventually(lambda: len(tunnel.pids) == processes)
        assert tunnel.parent == parent
        assert [record for record in tunnel.records("connection") if record["status"] != 101] == []


def test_processes_of_the_earlier_release_are_drained_by_the_present_code(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    """Their tunnels end when the present release drains, and after `drain_after`."""
    with Tunnel(
        origin.address,
        certificate,
        settings='[release]\ndrain_over = "1s"\n',
        environment=versions.environment,
        measured=True,
    ) as tunnel:

        async def run() -> None:
            traffic = Traffic(tunnel)
            first = await traffic.opened()
            versions.choose("present")
            await asyncio.to_thread(upgraded, tunnel)
            second = await traffic.opened()
            assert _generations(tunnel) == {1: 1, 2: 1}
            states = {one["generation"]: one["state"] for one in tunnel.status()["processes"]}
            assert states == {1: "draining", 2: "serving"}
            await asyncio.gather(first.exchange(), second.exchange())
            await asyncio.to_thread(tunnel.run_command, "drain")
            for one in (first, second):
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await one.exchange()

        asyncio.run(run())
        assert tunnel.wait() == 0


def test_reload_after_an_upgrade(origin: WebsocketsOrigin, certificate: Certificate, versions: Versions) -> None:
    """The present code reloads beside processes of the earlier release, which it leaves alone."""
    text = config_for(origin.address, certificate)
    with Tunnel(None, certificate, config=text, environment=versions.environment, measured=True) as tunnel:

        async def run() -> None:
            traffic = Traffic(tunnel)
            one = await traffic.opened()
            versions.choose("present")
            await asyncio.to_thread(upgraded, tunnel)
            changes = await asyncio.to_thread(tunnel.reload, f"processes = 2\n{text}")
            assert changes == ["processes: changed"]
            await one.exchange()
            await traffic.close()
            await one.close()

        asyncio.run(run())
        eventually(lambda: len(tunnel.pids) == 2)


def test_a_ledger_ends_before_a_release_without_one_continues(
    origin: WebsocketsOrigin, certificate: Certificate, versions: Versions
) -> None:
    """Its processes count alone meanwhile, and with the others again once the present code continues."""
    text = config_for(origin.address, certificate, top="processes = 2", site=LIMIT)
    with Tunnel(None, certificate, config=text, environment=versions.environment, measured=True) as tunnel:

        async def run() -> None:
            traffic = Traffic(tunnel)
            first = await traffic.opened()
            versions.choose("present")
            await asyncio.to_thread(upgraded, tunnel)
            assert tunnel.status()["ledger"]["leases"] == 0  # a process of the earlier release counts alone
            second = await traffic.opened()
            assert tunnel.status()["ledger"]["leases"] == 1
            versions.choose("previous")
            await asyncio.to_thread(upgraded, tunnel)
            assert children_of(tunnel.parent) == set(tunnel.pids)
            third = await traffic.opened()
            versions.choose("present")
            await asyncio.to_thread(upgraded, tunnel)
            fourth = await traffic.opened()
            eventually(lambda: tunnel.status()["ledger"]["leases"] == 2)
            await asyncio.gather(*(one.exchange() for one in (first, second, third, fourth)))
            await traffic.close()
            for one in (first, second, third, fourth):
                await one.close()

        asyncio.run(run())
        eventually(lambda: tunnel.status()["ledger"]["leases"] == 0)
