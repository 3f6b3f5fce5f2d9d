"""The dashboard through changes: a reload, a killed process, an upgrade, a tunnel that is gone and comes back."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.dashboard import Dashboard, dashboard_config, dashboard_to, free_port
from tests.harness import Certificate, RawOrigin, Tunnel, WebsocketsOrigin, echo_bytes, eventually
from tests.promises.versions import Versions, upgraded

ROUTE = """
[[sites.routes]]
path = "/messages"
origins = ["{address}"]
"""


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(echo_bytes) as origin:
        yield origin


@pytest.fixture(scope="module")
def config(origin: RawOrigin, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with WebsocketsOrigin() as messages:
        folder = tmp_path_factory.mktemp("tunnel")
        yield dashboard_config(
            origin.address,
            certificate,
            folder,
            admin=f"127.0.0.1:{free_port()}",
            site=ROUTE.format(address=messages.address),
        )


@pytest.fixture
def tunnel(config: str, certificate: Certificate, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Tunnel]:
    environment = Versions(tmp_path).environment if "upgrade" in request.node.name else {}
    with Tunnel(None, certificate, config=config, errors_expected=True, environment=environment) as tunnel:
        yield tunnel


@pytest.fixture
def dashboard(tunnel: Tunnel, tmp_path: Path) -> Iterator[Dashboard]:
    with dashboard_to(tunnel, tmp_path / "home") as dashboard:
        yield dashboard
        assert dashboard.faults == []


def test_a_reload_and_a_killed_process(dashboard: Dashboard, tunnel: Tunnel) -> None:
    """One test, since a tunnel and a browser take long to start."""
    dashboard.show("processes")
    config = tunnel.file.read_text()
    tunnel.file.write_text(config.replace("/scan", "/search"))
    dashboard.log_in()
    dashboard.view.get_by_role("button", name="Reload").click()
    dashboard.dialog.get_by_role("button", name="Reload").click()
    expect(dashboard.dialog.get_by_role("status")).to_have_text("site localhost: changed: rules")
    dashboard.close_dialogs()
    row = eventually(lambda: [row for row in dashboard.rows("Configuration") if row["What"] == "reload"])[0]
    assert row["Who"] == "token operator"
    dashboard.view.locator("tr", has_text="reload").get_by_role("button").click()
    expect(dashboard.dialog).to_contain_text("site localhost: changed: rules")
    dashboard.close_dialogs()

    clients = dashboard.clients
    with clients.connected(8) as connected:
        dashboard.show("overview")
        expect(dashboard.tile("Open tunnels")).to_have_text("8")
        expect(dashboard.tile("Handshakes", "more")).to_have_text(f"{clients.opened} opened since the start")
        before = tunnel.pids
        os.kill(before[0], signal.SIGKILL)
        tunnel.wait_record(lambda record: record["event"] == "process exited")
        left = [client for client in connected if client.is_open()]
        expect(dashboard.tile("Open tunnels")).to_have_text(str(len(left)))
        # What was counted stays, also what the killed process had counted.
        expect(dashboard.tile("Handshakes", "more")).to_have_text(f"{clients.opened} opened since the start")
        eventually(lambda: len(tunnel.pids) == 2 and before[0] not in tunnel.pids)
        dashboard.show("processes")
        eventually(lambda: {row["Process"] for row in dashboard.rows("Processes")} == {str(pid) for pid in tunnel.pids})
        eventually(lambda: sum(int(row["Tunnels"]) for row in dashboard.rows("Processes")) == len(left))
        clients.be_refused("/search")
        dashboard.show("overview")
        expect(dashboard.tile("Refused", "more")).to_have_text(f"{clients.refused} since the start")


def test_a_browser_converses_and_a_tunnel_that_is_gone_is_not_shown_as_live(
    dashboard: Dashboard, tunnel: Tunnel, certificate: Certificate
) -> None:
    dashboard.show("try")
    frame = dashboard.page.frame_locator("iframe")
    expect(frame.get_by_label("Address")).to_have_value(f"wss://localhost:{tunnel.port}/")
    frame.get_by_label("Address").fill(f"wss://localhost:{tunnel.port}/messages")
    frame.get_by_role("button", name="Connect", exact=True).click()
    expect(frame.get_by_role("status")).to_contain_text("Connected in")
    frame.get_by_role("button", name="Send 20").click()
    expect(frame.locator(".facts dd").first).to_have_text("20")
    expect(frame.locator(".conversation li").last).to_contain_text("hello 20")
    frame.get_by_role("button", name="Disconnect").click()
    expect(frame.get_by_role("status")).to_contain_text("Closed with 1000")
    (record,) = tunnel.wait_records(1)
    assert (record["path"], record["status"]) == ("/messages", 101)

    frame.get_by_label("Address").fill(f"wss://localhost:{free_port()}/")
    frame.get_by_role("button", name="Connect", exact=True).click()
    expect(frame.locator(".help")).to_contain_text("does not trust the certificate")
    assert all("ERR_CONNECTION_REFUSED" in fault for fault in dashboard.faults)

    dashboard.show("overview")
    tunnel.stop()
    banner = dashboard.page.locator("#banner")
    expect(banner).to_contain_text("The tunnel cannot be reached. The figures are those of")
    expect(dashboard.page.locator("#state")).to_have_text("Tunnel gone")
    with Tunnel(None, certificate, config=tunnel.file.read_text()):
        dashboard.page.locator("#state[data-state=live]").wait_for()
        expect(banner).to_be_hidden()
        expect(dashboard.tile("Open tunnels")).to_have_text("0")
        expect(dashboard.tile("Handshakes", "more")).to_have_text("0 opened since the start")
    dashboard.faults.clear()  # the console has each request that failed meanwhile


@pytest.mark.soak
def test_an_upgrade_keeps_what_was_counted(dashboard: Dashboard, tunnel: Tunnel, tmp_path: Path) -> None:
    clients = dashboard.clients
    with clients.connected(5) as connected:
        dashboard.show("overview")
        expect(dashboard.tile("Open tunnels")).to_have_text("5")
        versions = Versions(tmp_path)
        versions.install("2.0.0")
        upgraded(tunnel)
        expect(dashboard.page.locator("#version")).to_have_text("2.0.0, generation 2")
        with clients.connected(2, "/new"):
            expect(dashboard.tile("Open tunnels")).to_have_text("7")
            expect(dashboard.tile("Handshakes", "more")).to_have_text(f"{clients.opened} opened since the start")
            dashboard.show("processes")
            expect(dashboard.view.locator(".lead")).to_contain_text("Generation 2 (2.0.0) serves new connections")
            rows = dashboard.rows("Processes")
            old = [row for row in rows if row["Generation"] == "1"]
            assert {row["State"] for row in old} == {"draining"}
            assert sum(int(row["Tunnels"]) for row in old) == sum(client.is_open() for client in connected)
            assert sum(int(row["Tunnels"]) for row in rows if row["Generation"] == "2") == 2
    dashboard.faults.clear()  # the connection to the page was closed in between
