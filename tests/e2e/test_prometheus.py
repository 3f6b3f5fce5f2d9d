"""A real Prometheus reads a tunnel: every query of the dashboard has an answer, and the alert rules are tested."""

import json
import os
import re
import signal
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    connect_tcp,
    connect_tls,
    echo_bytes,
    eventually,
    receive_all,
    require,
    upgrade,
)
from tests.metrics import config_with_a_closed_origin
from tlstunnel.metrics.families import FAMILIES
from tlstunnel.testing.program import Program

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())] + [
    ("annotation", DASHBOARD["annotations"]["list"][0]["expr"])
]

VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$site": ".*"}

ALMOST_NEVER = (
    "tlstunnel_accept_pauses_total",
    "tlstunnel_ledger_failures_total",
    "tlstunnel_health_checks_total",
    "tlstunnel_firewall_managed",
    "tlstunnel_valkey_up",
    "changes(tlstunnel_generation",
)
"""What has no value here: the queries with it are only checked for errors."""


@pytest.fixture(scope="module")
def tunnel(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    folder = tmp_path_factory.mktemp("prometheus")
    worker = folder / "worker.py"
    worker.write_text(EDGE)
    with socket.socket() as closed, RawOrigin(echo_bytes) as origin:
        closed.bind(("127.0.0.1", 0))
        config = config_with_a_closed_origin(
            origin.address,
            closed.getsockname()[1],
            certificate,
            folder,
            ejected="1s",
            top='block_addresses = ["127.0.0.2"]\nadmin.listen = "127.0.0.1:0"',
            site=f'web_origins = ["https://a.example"]\nworker = "{worker}:fetch"',
        )
        with Tunnel(None, certificate, config=config, errors_expected=True) as tunnel:
            yield tunnel


EDGE = """
async def fetch(request, env):
    return request
"""


def make_traffic(tunnel: Tunnel) -> None:
    """Have something of everything happen."""
    with connect_tls(tunnel) as client:
        upgrade(client)
    for path, headers in (("/admin", ()), ("/", [("Origin", "https://b.example")])):
        with connect_tls(tunnel) as client:
            upgrade(client, path, headers)
            receive_all(client)
    with connect_tcp(tunnel) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        receive_all(client)
    with suppress(OSError), socket.socket() as client:
        client.bind(("127.0.0.2", 0))
        client.connect(("127.0.0.1", tunnel.port))


class Prometheus:
    """Debian's Prometheus, which reads the tunnel once a second."""

    def __init__(self, target: str, folder: Path) -> None:
        self._target = target
        self._folder = folder
        self._program = Program("Prometheus")
        self._url = ""

    def __enter__(self) -> "Prometheus":
        file = self._folder / "prometheus.yml"
        scrape = f"{{ job_name: tlstunnel, static_configs: [{{ targets: ['{self._target}'] }}] }}"
        file.write_text(
            "global: { scrape_interval: 1s, evaluation_interval: 1s }\n"
            f"rule_files: ['{MONITORING / 'alerts.yml'}']\nscrape_configs: [{scrape}]\n"
        )
        command = [require("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={self._folder / 'data'}"]
        self._program.start([*command, "--web.listen-address=127.0.0.1:0"], environment=os.environ)
        found = eventually(lambda: re.search(r'"Listening on" address=(127\.0\.0\.1:[0-9]+)', self._program.text))
        assert found is not None
        self._url = f"http://{found[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self._program.end()

    def read(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]

    def query(self, query: str) -> list[Any]:
        """Return the series of the result."""
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        assert "$" not in query
        found: list[Any] = self.read("query", query=query)["result"]
        return found


@pytest.fixture(scope="module")
def prometheus(tunnel: Tunnel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has read the tunnel often enough for rates."""
    address = urllib.parse.urlsplit(tunnel.wait_records(1, "admin address")[0]["address"]).netloc
    make_traffic(tunnel)
    tunnel.reload()
    os.kill(tunnel.pids[0], signal.SIGKILL)
    eventually(lambda: len(tunnel.pids) == 2)
    with ExitStack() as stack:
        prometheus = stack.enter_context(Prometheus(address, tmp_path_factory.mktemp("data")))
        client = stack.enter_context(connect_tls(tunnel))
        eventually(lambda: upgrade(client).status)

        def has_read_enough() -> bool:
            make_traffic(tunnel)
            found = prometheus.query("count_over_time(tlstunnel_ledger_up[1m])")
            return bool(found) and int(found[0]["value"][1]) >= 4

        eventually(has_read_enough, interval=0.5)
        yield prometheus


def test_it_reads_the_tunnel_without_complaint(prometheus: Prometheus) -> None:
    (target,) = prometheus.read("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert target["lastScrapeDuration"] < 2.0
    kinds = {name: found[0] for name, found in prometheus.read("metadata").items()}
    for family in FAMILIES.values():
        name = family.name.removesuffix("_total") if family.name.removesuffix("_total") in kinds else family.name
        if name in kinds:
            assert (kinds[name]["type"], kinds[name]["help"]) == (family.kind, family.help)
    assert len(kinds) > len(FAMILIES) // 2


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title}-{n}" for n, (title, _) in enumerate(QUERIES)])
def test_every_query_of_the_dashboard_has_an_answer(prometheus: Prometheus, title: str, query: str) -> None:
    found = prometheus.query(query)
    assert found or any(name in query for name in ALMOST_NEVER), f"{title}: {query}"


def test_every_family_is_in_the_dashboard() -> None:
    text = " ".join(query for _, query in QUERIES)
    assert [name for name in FAMILIES if name not in text] == []


def test_the_variables_of_the_dashboard_have_values(prometheus: Prometheus) -> None:
    names = {}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            matched = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert matched is not None
            names[variable["name"]] = prometheus.read(f"label/{matched[2]}/values", **{"match[]": matched[1]})
    assert names["site"] == ["localhost"]
    assert len(names["instance"]) == 1


def test_no_alert_of_what_is_well_fires(prometheus: Prometheus) -> None:
    groups = prometheus.read("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
    firing = {rule["name"] for rule in rules if rule["state"] == "firing"}
    assert "TlstunnelDown" not in firing


def test_the_alert_rules() -> None:
    promtool = require("promtool", "prometheus")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_of_the_alert_rules_can_fail(tmp_path: Path) -> None:
    (tmp_path / "alerts.yml").write_text((MONITORING / "alerts.yml").read_text().replace("> 0.85 *", "> 0.95 *"))
    (tmp_path / "alerts_test.yml").write_text((MONITORING / "alerts_test.yml").read_text())
    command = [require("promtool", "prometheus"), "test", "rules", "alerts_test.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "TlstunnelConnectionsNearLimit" in done.stdout + done.stderr


def test_every_alert_is_tested_and_explained() -> None:
    rules = re.findall(r"- alert: (\w+)", (MONITORING / "alerts.yml").read_text())
    tests, page = ((MONITORING / name).read_text() for name in ("alerts_test.yml", "README.md"))
    assert len(rules) == len(set(rules))
    assert [rule for rule in rules if f"- name: {rule}\n" not in tests] == []
    assert [rule for rule in rules if f"`{rule}`" not in page] == []
