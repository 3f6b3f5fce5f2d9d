"""The dashboard in Chromium, before a real tunnel with real clients: its figures are those that the clients count."""

import ssl
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tests.dashboard import VIEWS, Dashboard, dashboard_config, dashboard_to, render_bytes
from tests.harness import (
    REPOSITORY,
    TIMEOUT,
    Certificate,
    RawOrigin,
    Tunnel,
    assert_below,
    echo_bytes,
    eventually,
    missing,
)

AXE = REPOSITORY / "tests" / "clients" / "node_modules" / "axe-core" / "axe.min.js"

HOSTILE = "<img src=x onerror=window.attacked=1><script>window.attacked=2</script>"
PATH = "/chat/<img/src=x/onerror=window.attacked=3>"

MOST_BYTES = 150_000
"""What the browser may fetch to show the page."""


@pytest.fixture(scope="module")
def shared(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    folder = tmp_path_factory.mktemp("dashboard")
    with RawOrigin(echo_bytes) as origin:
        config = dashboard_config(origin.address, certificate, folder)
        with Tunnel(None, certificate, config=config) as tunnel, dashboard_to(tunnel, folder / "home") as dashboard:
            yield dashboard


@pytest.fixture
def dashboard(shared: Dashboard) -> Iterator[Dashboard]:
    """Yield the dashboard; what its console says, such as a violation of the content security policy, is a fault."""
    shared.faults.clear()
    yield shared
    shared.close_dialogs()
    assert shared.faults == []


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_figures_are_those_that_the_clients_count(dashboard: Dashboard) -> None:
    clients = dashboard.clients
    with clients.connected(5) as connected:
        for index, client in enumerate(connected):
            client.exchange(100 * (index + 1))
        for _ in range(3):
            clients.be_refused()
        dashboard.show()
        expect(dashboard.tile("Open tunnels")).to_have_text("5")
        expect(dashboard.tile("Handshakes", "more")).to_have_text(f"{clients.opened} opened since the start")
        expect(dashboard.tile("Refused", "more")).to_have_text(f"{clients.refused} since the start")
        traffic = f"{render_bytes(clients.up)} up, {render_bytes(clients.down)} down since the start"
        expect(dashboard.tile("Traffic", "more")).to_have_text(traffic)
        expect(dashboard.tile("Processes")).to_have_text("2 serving")
        eventually(
            lambda: [row["Since the start"] for row in dashboard.rows("Refusals by reason")] == [str(clients.refused)]
        )
        eventually(lambda: dashboard.rows("Top clients"))
        rows = eventually(lambda: [row for row in dashboard.rows("Top clients") if row["Tunnels"] == "5"])
        assert [(row["Client"], row["Refused recently"]) for row in rows] == [("127.0.0.1", str(clients.refused))]
        eventually(lambda: [row["Since the start"] for row in dashboard.rows("Top rules")] == [str(clients.refused)])
        # Latencies are those of the time in which somebody looks.
        with clients.connected(1, "/latency"):
            eventually(lambda: any(row["Stage"] == "Whole handshake" for row in dashboard.rows("Latency by stage")))
        assert {row["Number"] for row in dashboard.rows("Latency by stage")} == {"1"}
    expect(dashboard.tile("Open tunnels")).to_have_text("0")


def test_each_tunnel_has_a_row_with_its_own_bytes(dashboard: Dashboard) -> None:
    with dashboard.clients.connected(4, "/each") as connected:
        for index, client in enumerate(connected):
            client.exchange(10 + index)
        dashboard.show("tunnels")
        own = {client.path: (f"{client.up} B", f"{client.down} B") for client in connected}
        eventually(lambda: {row["Path"]: (row["Up"], row["Down"]) for row in dashboard.rows("Open tunnels")} == own)
        expect(dashboard.panel("Open tunnels").locator(".panel-head .note")).to_have_text("4 tunnels")
        dashboard.view.get_by_label("Client").fill("192.0.2.1")
        expect(dashboard.view.get_by_text("No open tunnel matches.")).to_be_visible()
        dashboard.view.get_by_role("button", name="Clear").click()
        dashboard.wait_rows("Open tunnels", 4)
        dashboard.view.get_by_role("button", name="Up").click()
        eventually(lambda: [row["Up"] for row in dashboard.rows("Open tunnels")] == ["13 B", "12 B", "11 B", "10 B"])


def test_a_site_is_compared_with_its_guideline(dashboard: Dashboard) -> None:
    clients = dashboard.clients
    with clients.connected(6, "/site"):
        clients.be_refused()
        dashboard.show("sites")
        (row,) = eventually(lambda: [row for row in dashboard.rows("Sites") if row["Tunnels"] == "6"])
        assert row["Site"] == "localhost"
        assert row["Compared with the guideline"].startswith("guideline 4")
        assert (row["Handshakes"], row["Refused"]) == (str(clients.opened), str(clients.refused))
        dashboard.view.get_by_role("button", name="localhost").click()
        expect(dashboard.dialog).to_contain_text("4 concurrent tunnels")
        # Going over a plan is no offence, and a guideline is no limit.
        assert "limit" not in dashboard.view.inner_text().lower().replace("rate limit", "")


def test_origins_and_certificates_and_processes(dashboard: Dashboard) -> None:
    with dashboard.clients.connected(3, "/origins"):
        dashboard.show("origins")
        first, second = dashboard.wait_rows("Origins", 2)
        rows = {first["Origin"]: first, second["Origin"]: second}
        assert "backup" in rows["127.0.0.1:1"]["State"]
        assert int(first["Tunnels"]) + int(second["Tunnels"]) == 3
        dashboard.show("certificates")
        (certificate,) = dashboard.wait_rows("Certificates", 1)
        assert "localhost" in certificate["Names"]
        status = dashboard.tunnel.records("certificates")[0]
        assert abs(int(certificate["Left"].split()[0]) - status["days_left"]) <= 1
        dashboard.show("processes")
        eventually(lambda: sum(int(row["Tunnels"]) for row in dashboard.rows("Processes")) == 3)
        assert {row["Process"] for row in dashboard.rows("Processes")} == {str(pid) for pid in dashboard.tunnel.pids}
        assert {row["Generation"] for row in dashboard.rows("Processes")} == {"1"}
        assert dashboard.rows("Configuration")[-1]["What"] == "start"
        dashboard.view.get_by_role("button", name="Show the configuration").click()
        expect(dashboard.dialog.locator("pre")).to_contain_text('"guideline": 4')


def test_a_chart_has_a_summary_and_a_table(dashboard: Dashboard) -> None:
    with dashboard.clients.connected(2, "/chart"):
        dashboard.show()
        expect(dashboard.tile("Open tunnels")).to_have_text("2")
        chart = dashboard.view.locator("figure").filter(has_text="Open tunnels")
        expect(chart.locator(".summary")).to_contain_text("Tunnels 2")
        chart.locator("summary").click()
        expect(chart.locator("tbody tr").first.locator("td").first).to_have_text("2")
        chart.locator("summary").click()
        dashboard.view.get_by_role("button", name="24 h").click()
        expect(chart.locator(".note")).to_have_text("the most at once, and the mean")
        dashboard.view.get_by_role("button", name="5 min").click()


def test_a_change_is_shown_within_two_seconds(dashboard: Dashboard) -> None:
    dashboard.show()
    expect(dashboard.tile("Open tunnels")).to_have_text("0")

    def measure() -> float:
        with dashboard.clients.connected(1, "/soon"):
            began = time.monotonic()
            expect(dashboard.tile("Open tunnels")).to_have_text("1")
            took = time.monotonic() - began
        expect(dashboard.tile("Open tunnels")).to_have_text("0")
        return took

    assert_below(2.0, measure)


# --- refusals and records ---------------------------------------------------------------------------------------------


def test_a_refusal_says_what_every_stage_decided_and_how_to_change_it(dashboard: Dashboard) -> None:
    dashboard.clients.be_refused("/scan/why")
    dashboard.show("handshakes")
    eventually(lambda: any(row["Path"] == "/scan/why" for row in dashboard.rows("Recent refusals")))
    dashboard.panel("Recent refusals").locator("tr", has_text="/scan/why").get_by_role("button").click()
    stages = dashboard.dialog.locator(".stages li")
    expect(stages.filter(has_text="firewall: rules")).to_contain_text("refused")
    expect(stages.filter(has_text="TLS").first).to_contain_text("passed")
    expect(stages.filter(has_text="origin").last).to_contain_text("not reached")
    expect(dashboard.dialog).to_contain_text("How to change that")
    expect(dashboard.dialog).to_contain_text("scanner")


def test_records_come_as_connections_end(dashboard: Dashboard) -> None:
    dashboard.show("handshakes")
    panel = dashboard.panel("Live records")
    panel.get_by_label("Verdict").select_option("pass")
    expect(panel.locator(".empty")).to_be_visible()

    def find_ended() -> bool:
        # Processes begin to send records shortly after they were asked to.
        with dashboard.clients.connected(1, "/ended") as (client,):
            client.exchange(77)
        dashboard.clients.be_refused("/scan/filtered")
        return any(row["Path"] == "/ended/0" for row in dashboard.rows("Live records"))

    eventually(find_ended, interval=0.3)
    assert {row["Verdict"] for row in dashboard.rows("Live records")} == {"passed"}
    panel.locator("tr", has_text="/ended/0").first.get_by_role("button").click()
    expect(dashboard.dialog).to_contain_text("77 B")


def test_what_clients_send_is_text(dashboard: Dashboard) -> None:
    with dashboard.clients.connected(1, PATH, (("User-Agent", HOSTILE), ("Origin", "https://<b>web</b>"))):
        dashboard.show("tunnels")
        (row,) = dashboard.wait_rows("Open tunnels", 1)
        assert row["Path"] == f"{PATH}/0"
        dashboard.view.locator("tbody button").click()
        expect(dashboard.dialog).to_contain_text(HOSTILE)
        assert dashboard.page.locator("main img, main b, dialog img, dialog b, dialog script").count() == 0
        dashboard.close_dialogs()
    dashboard.clients.be_refused(f"/scan{PATH}")
    dashboard.show("handshakes")
    eventually(lambda: any(PATH in row["Path"] for row in dashboard.rows("Recent refusals")))
    dashboard.panel("Recent refusals").locator("tr", has_text=PATH).first.get_by_role("button").click()
    expect(dashboard.dialog).to_contain_text(PATH)
    assert dashboard.page.locator("main img, dialog img").count() == 0
    assert dashboard.page.evaluate("window.attacked") is None


# --- actions ----------------------------------------------------------------------------------------------------------


def test_a_tunnel_is_ended_by_who_has_logged_in(dashboard: Dashboard) -> None:
    with dashboard.clients.connected(2, "/end") as (first, second):
        dashboard.show("tunnels")
        dashboard.wait_rows("Open tunnels", 2)
        dashboard.panel("Open tunnels").locator("tr", has_text="/end/0").get_by_role("button").click()
        dashboard.dialog.get_by_role("button", name="End this tunnel").click()
        dashboard.dialog.get_by_label("Token").fill("a wrong one, which nobody has ever had")
        dashboard.dialog.get_by_role("button", name="Log in").click()
        expect(dashboard.dialog.get_by_role("status")).to_contain_text("not known")
        (fault,) = dashboard.faults  # the console has each response that is an error
        assert "401" in fault
        dashboard.faults.clear()
        dashboard.close_dialogs()
        dashboard.log_in()
        dashboard.panel("Open tunnels").locator("tr", has_text="/end/0").get_by_role("button").click()
        dashboard.dialog.get_by_role("button", name="End this tunnel").click()
        expect(dashboard.dialog).to_contain_text("/end/0")
        assert first.is_open()
        dashboard.dialog.get_by_role("button", name="End the tunnel").click()
        expect(dashboard.dialog.get_by_role("status")).to_contain_text("1 tunnel is being ended")
        first.sock.settimeout(TIMEOUT)
        assert _read_to_end(first.sock)
        assert second.is_open()
        dashboard.close_dialogs()
        dashboard.wait_rows("Open tunnels", 1)
        dashboard.log_out()


def test_a_throttle_is_set_and_lifted(dashboard: Dashboard) -> None:
    dashboard.show("sites")
    dashboard.log_in()
    dashboard.view.get_by_role("button", name="localhost").click()
    dashboard.dialog.get_by_role("button", name="Throttle").click()
    dashboard.dialog.get_by_label("Rate").fill("often")
    dashboard.dialog.get_by_label("Why").fill("a <b>flood</b>")
    dashboard.dialog.get_by_label("It is against abuse").check()
    dashboard.dialog.get_by_role("button", name="Throttle").click()
    expect(dashboard.dialog.locator(".result.bad")).to_contain_text("often")
    (fault,) = dashboard.faults
    assert "409" in fault or "400" in fault
    dashboard.faults.clear()
    dashboard.dialog.get_by_label("Rate").fill("5000/minute")
    dashboard.dialog.get_by_role("button", name="Throttle").click()
    expect(dashboard.dialog.locator(".result.good")).to_contain_text("New handshakes of localhost above 5000/minute")
    dashboard.close_dialogs()
    (row,) = dashboard.wait_rows("Throttles", 1)
    assert (row["Why"], row["Who"]) == ("a <b>flood</b>", "token operator")
    dashboard.show("overview")
    expect(dashboard.panel("Attention")).to_contain_text("New handshakes of localhost are throttled to 5000/minute")
    dashboard.show("sites")
    dashboard.panel("Throttles").locator("tbody button").click()
    dashboard.dialog.get_by_role("button", name="Release").click()
    expect(dashboard.dialog.locator(".result.good")).to_have_text("1 throttle was lifted.")
    dashboard.close_dialogs()
    dashboard.wait_rows("Throttles", 0)
    dashboard.log_out()


def _read_to_end(sock: ssl.SSLSocket) -> bool:
    try:
        while sock.recv(65536):
            pass
    except (ConnectionError, ssl.SSLError):
        return True
    return True


# --- for everybody ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_view_has_a_serious_fault_of_accessibility(dashboard: Dashboard, scheme: str) -> None:
    axe = AXE.read_text() if AXE.exists() else missing("axe-core not found: ./scripts/install gets it")
    page = dashboard.page
    width = 1280 if scheme == "light" else 390
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    found = []
    with dashboard.clients.connected(2, "/axe"):
        dashboard.clients.be_refused()
        for view in VIEWS:
            dashboard.show(view)
            if view in {"tunnels", "handshakes", "sites"}:
                dashboard.view.locator("tbody button").first.click()
                dashboard.dialog.wait_for()
                found += _find_faults(dashboard, axe)
                dashboard.close_dialogs()
            found += _find_faults(dashboard, axe)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{view} is too wide"
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 844})
    assert found == []


def _find_faults(dashboard: Dashboard, axe: str) -> list[str]:
    dashboard.page.evaluate(axe)
    violations = dashboard.page.evaluate(
        "async () => (await axe.run(document, { resultTypes: ['violations'] })).violations"
    )
    return [
        f"{dashboard.page.url}: {one['id']}: {one['nodes'][0]['target']} {one['nodes'][0]['failureSummary']}"
        for one in violations
        if one["impact"] in {"serious", "critical"}
    ]


def test_the_keyboard_is_enough(dashboard: Dashboard) -> None:
    with dashboard.clients.connected(1, "/keys"):
        dashboard.show("tunnels")
        dashboard.wait_rows("Open tunnels", 1)
        row = dashboard.view.locator("tbody button")
        row.focus()
        dashboard.page.keyboard.press("Enter")
        expect(dashboard.dialog).to_contain_text("/keys/0")
        dashboard.page.keyboard.press("Escape")
        expect(dashboard.dialog).to_have_count(0)
        expect(row).to_be_focused()
        dashboard.page.locator("nav a", has_text="Sites").focus()
        dashboard.page.keyboard.press("Enter")
        expect(dashboard.panel("Sites")).to_be_visible()


def test_the_page_weighs_little_and_has_nothing_of_others(dashboard: Dashboard) -> None:
    browser = dashboard.page.context.browser
    assert browser is not None
    with browser.new_context() as context:
        page = context.new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(dashboard.address)
        page.locator("#state[data-state=live]").wait_for()
        sizes = page.evaluate(
            """() => [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")]
              .filter((entry) => !entry.name.includes("/api/")).map((entry) => entry.transferSize)"""
        )
    assert min(sizes) > 0
    assert sum(sizes) < MOST_BYTES
    assert [url for url in requests if not url.startswith(dashboard.address)] == []
