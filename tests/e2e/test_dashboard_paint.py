"""How fast the dashboard is there, and what it costs the processes that serve while somebody looks at it."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.dashboard import Client, Dashboard, dashboard_config, dashboard_to
from tests.harness import Certificate, RawOrigin, Tunnel, assert_below, echo_bytes

ROUNDS = 7
TUNNELS = 20
ROUND_SECONDS = 8.0


@pytest.fixture(scope="module")
def dashboard(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    folder = tmp_path_factory.mktemp("dashboard")
    with RawOrigin(echo_bytes) as origin:
        config = dashboard_config(origin.address, certificate, folder)
        with (
            Tunnel(None, certificate, config=config, measured=True) as tunnel,
            dashboard_to(tunnel, folder / "home") as dashboard,
        ):
            yield dashboard


@pytest.mark.alone
def test_the_first_paint_comes_at_once(dashboard: Dashboard) -> None:
    browser = dashboard.page.context.browser
    assert browser is not None

    def measure() -> float:
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(dashboard.address)
            page.locator("#state[data-state=live]").wait_for()
            return float(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))

    assert_below(200, measure)


@pytest.mark.soak
def test_who_looks_costs_the_serving_processes_little(dashboard: Dashboard) -> None:
    """Rounds with the page open and without it take turns; the medians of the CPU time of a message are compared."""
    page = dashboard.page
    costs: dict[bool, list[float]] = {False: [], True: []}
    idle: dict[bool, list[float]] = {False: [], True: []}
    with dashboard.clients.connected(TUNNELS) as connected:
        for number in range(2 * ROUNDS):
            looked_at = number % 2 == 1
            page.goto("about:blank")
            if looked_at:
                dashboard.show()
            idle[looked_at].append(
                _measure(dashboard.tunnel.pids, lambda: time.sleep(ROUND_SECONDS / 2)) / ROUND_SECONDS * 2
            )
            messages = 0

            def converse(until: float) -> None:
                nonlocal messages
                while time.monotonic() < until:
                    messages += _exchange(connected)

            cpu = _measure(dashboard.tunnel.pids, lambda: converse(time.monotonic() + ROUND_SECONDS))
            costs[looked_at].append(cpu / messages)
    without, with_page = (statistics.median(costs[looked_at]) for looked_at in (False, True))
    print(
        f"CPU time of the serving processes for a message: {without * 1e6:.2f} us, with the page {with_page * 1e6:.2f}"
    )
    print(f"without traffic, in a second: {statistics.median(idle[False]) * 1e3:.2f} ms,", end=" ")
    print(f"with the page {statistics.median(idle[True]) * 1e3:.2f} ms")
    assert with_page < 1.03 * without


def _exchange(connected: list[Client]) -> int:
    for client in connected:
        client.sock.sendall(b"x" * 100)
    for client in connected:
        client.sock.recv(100)
    return len(connected)


def _measure(pids: list[int], act: Callable[[], None]) -> float:
    """Return the CPU time, in seconds, that these processes use while something is done."""
    before = _cpu_seconds(pids)
    act()
    return _cpu_seconds(pids) - before


def _cpu_seconds(pids: list[int]) -> float:
    nanoseconds = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread has ended
                nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9
