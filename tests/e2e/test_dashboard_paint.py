"""How fast the dashboard is there, and what it costs the processes that serve while somebody looks at it."""

import contextlib
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.dashboard import Dashboard, dashboard_config, dashboard_to
from tests.harness import REPOSITORY, Certificate, RawOrigin, Tunnel, assert_below, echo_bytes, require

ROUNDS = 5
TUNNELS = 20
ROUND_SECONDS = 5.0


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
def test_who_looks_costs_the_serving_processes_little(
    certificate: Certificate, tmp_path: Path, load: tuple[Path, Path]
) -> None:
    """Rounds with the page open and without it take turns; the medians of the CPU time of a message are compared."""
    client, origin = load
    costs: dict[bool, list[float]] = {False: [], True: []}
    idle: dict[bool, list[float]] = {False: [], True: []}
    with (
        Talker(origin) as answering,
        Tunnel(
            None,
            certificate,
            config=dashboard_config(f"127.0.0.1:{answering.read()['port']}", certificate, tmp_path),
            measured=True,
        ) as tunnel,
        dashboard_to(tunnel, tmp_path / "home") as dashboard,
        Talker(client, str(tunnel.port)) as talker,
    ):
        talker.ask(f"open {TUNNELS} /echo")
        for number in range(2 * ROUNDS):
            looked_at = number % 2 == 1
            dashboard.page.goto("about:blank")
            if looked_at:
                dashboard.show()
            before = _cpu_seconds(tunnel.pids)
            time.sleep(ROUND_SECONDS)
            idle[looked_at].append((_cpu_seconds(tunnel.pids) - before) / ROUND_SECONDS)
            before = _cpu_seconds(tunnel.pids)
            messages = talker.ask(f"echo {TUNNELS} 100 {ROUND_SECONDS}")["messages"]
            costs[looked_at].append((_cpu_seconds(tunnel.pids) - before) / messages)
    without, looked = (statistics.median(costs[looked_at]) * 1e6 for looked_at in (False, True))
    print(f"CPU time of the serving processes for a message: {without:.2f} us, with the page {looked:.2f} us")
    without_traffic = [f"{statistics.median(idle[looked_at]) * 1e3:.2f} ms" for looked_at in (False, True)]
    print(f"without traffic, for a second: {without_traffic[0]}, with the page {without_traffic[1]}")
    assert looked < 1.03 * without


class Talker:
    """A program of scripts/load that answers each line with a line of JSON."""

    def __init__(self, program: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [str(program), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def read(self) -> dict[str, Any]:
        """Return the next line."""
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer
        return answer

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command, and return the answer."""
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)
        return self.read()


@pytest.fixture
def load() -> tuple[Path, Path]:
    """The load generator and the origin of scripts/bench."""
    for program in ("gcc", "make"):
        require(program)
    subprocess.run(["make", "--silent", "-C", str(REPOSITORY / "scripts" / "load")], check=True, timeout=60)
    folder = REPOSITORY / "build" / "load"
    return folder / "client", folder / "origin"


def _cpu_seconds(pids: list[int]) -> float:
    nanoseconds = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread has ended
                nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9
