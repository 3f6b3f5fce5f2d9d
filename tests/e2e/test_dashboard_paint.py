"""How fast the dashboard is there, and what it costs the processes that serve while somebody looks at it."""

import contextlib
import json
import statistics
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from websockets.sync.client import connect
from websockets.typing import Origin

from tests.dashboard import Dashboard, dashboard_config, dashboard_to
from tests.harness import REPOSITORY, Certificate, RawOrigin, Tunnel, assert_below, echo_bytes, require

ROUNDS = 5
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


REQUESTS = {
    "/api/v1/usage": 15,
    "/api/v1/notices": 15,
    "/api/v1/loads": 15,
    "/api/v1/origins?unhealthy=true&limit=20": 5,
    "/api/v1/tunnels?sort=rate&limit=200": 5,
    "/api/v1/refusals?limit=100": 5,
    "/metrics": 1,
}
"""What the page asks for besides what is live, and a scrape, with the seconds between two requests."""


class Viewer:
    """Watches and asks as the page does, with a scrape a second, but without a browser on the same cores."""

    def __init__(self, address: str) -> None:
        self._host = address.removeprefix("http://").rstrip("/")
        self._gone = threading.Event()
        self._overviews = 0
        self._problems: list[Exception] = []
        self._threads = [threading.Thread(target=self._run, args=(work,)) for work in (self._watch, self._ask)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._gone.set()
        for thread in self._threads:
            thread.join()
        assert not self._problems
        assert self._overviews > ROUND_SECONDS, "it did not look"

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._problems.append(error)

    def _watch(self) -> None:
        with connect(f"ws://{self._host}/api/v1/live", origin=Origin(f"http://{self._host}")) as live:
            live.send(json.dumps({"watch": ["overview"]}))
            while not self._gone.is_set():
                with contextlib.suppress(TimeoutError):
                    self._overviews += "overview" in json.loads(live.recv(timeout=1))

    def _ask(self) -> None:
        second = 0
        while not self._gone.wait(1):
            for target, seconds in REQUESTS.items():
                if second % seconds == 0:
                    with urllib.request.urlopen(f"http://{self._host}{target}", timeout=10) as response:
                        response.read()
            second += 1


@pytest.mark.soak
def test_who_looks_costs_the_serving_processes_little(
    certificate: Certificate, tmp_path: Path, load: tuple[Path, Path]
) -> None:
    """Rounds with a viewer and without one take turns; the medians of the CPU time of a unit of work are compared.

    The load has one connection at a time. With more, a process serves several for each wake-up, and fewer of them when
    the viewer takes time from the load: a message then costs up to a tenth more, which is not what looking costs.
    """
    client, origin = load
    costs: dict[tuple[str, bool], list[float]] = {}
    with (
        Talker(origin) as answering,
        Tunnel(
            None,
            certificate,
            config=dashboard_config(f"127.0.0.1:{answering.read()['port']}", certificate, tmp_path),
            measured=True,
        ) as tunnel,
        Talker(client, str(tunnel.port)) as talker,
    ):
        serving = [one["process"] for one in tunnel.status()["processes"]]
        talker.ask("open 1 /echo")
        for number in range(2 * ROUNDS):
            looked_at = number % 2 == 1
            with Viewer(tunnel.records("admin address")[0]["address"]) if looked_at else contextlib.nullcontext():
                for work, command in (
                    ("messages", f"echo 1 100 {ROUND_SECONDS}"),
                    ("handshakes", f"handshakes 1 {ROUND_SECONDS} full"),
                ):
                    before = _cpu_seconds(serving)
                    done = talker.ask(command)[work]
                    costs.setdefault((work, looked_at), []).append((_cpu_seconds(serving) - before) / done)
    for work in ("messages", "handshakes"):
        without, looked = (statistics.median(costs[work, looked_at]) * 1e6 for looked_at in (False, True))
        print(f"{work}: {without:.2f} us of CPU time each, with a viewer {looked:.2f} us")
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
