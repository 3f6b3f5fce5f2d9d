"""Fixtures for all tests."""

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

from tests.harness import Certificate
from tlstunnel.certificates import issue

# A false property mostly fails with few examples. ./scripts/soak takes many; ./scripts/matrix --subset takes few,
# since what differs between Python versions shows with few. A busy machine is slow, which is no fault.
for _name, _examples in (("normal", 50), ("many", 3_000), ("few", 15)):
    settings.register_profile(
        _name, max_examples=_examples, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
settings.load_profile("normal")

# Some containers forbid to write compiled modules. Then each program that a test starts compiles the whole package,
# which takes as long as the rest of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# All clients connect to this machine, whatever proxy the environment has for others.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "localhost,127.0.0.1,::1"


_COVERAGE = os.environ.get("COVERAGE_PROCESS_CONFIG")

_MEASURED = {
    "test_admin_actions",
    "test_admin_api",
    "test_admin_live",
    "test_drain",
    "test_edge_no_open_relay",
    "test_edge_run",
    "test_elected",
    "test_health_path",
    "test_hello_in_pieces",
    "test_http_pass",
    "test_inventory",
    "test_origins_several",
    "test_plans",
    "test_processes",
    "test_refusals",
    "test_shared_counts",
    "test_slow_loris",
    "test_smuggling",
    "test_top",
    "test_tunnels_ended",
    "test_upgrade",
    "test_usage",
}
"""Promises and files of e2e whose programs are measured, which doubles the CPU time of their start.

The others' programs reach 1 % of the lines and branches that neither these nor the units reach. If the coverage falls
below what is required although a promise tests the new code, add that promise.
"""

_UNMEASURED_UNITS = {"test_firewall_managed_rule_sets", "test_history_writer", "test_loading_corpus", "test_supervisor"}
"""Units that start many programs, which the others reach too."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Measure the coverage of the programs that the test starts, unless others cover them."""
    if _COVERAGE is not None:
        name, is_unit = item.path.stem, item.path.parent.name == "unit"
        if name in _MEASURED or (is_unit and name not in _UNMEASURED_UNITS):
            os.environ["COVERAGE_PROCESS_CONFIG"] = _COVERAGE
        else:
            os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Return a test authority and a certificate for localhost, 127.0.0.1 and ::1, made once per session."""
    issued = issue.create(["localhost", "127.0.0.1", "::1"], tmp_path_factory.mktemp("certs"))
    return Certificate(issued.ca, issued.cert, issued.key)
