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

_NOT_COVERED = {
    "test_any_order",
    "test_certificates",
    "test_close_timeout",
    "test_curl",
    "test_demo",
    "test_edge_examples",
    "test_edge_failures",
    "test_edge_reload",
    "test_edge_workers",
    "test_finite_field_key_exchange",
    "test_firewall_managed",
    "test_firewall_rate_limits",
    "test_loading_corpus",
    "test_log_escaping",
    "test_metrics",
    "test_openssl",
    "test_origin_lying",
    "test_origin_tls",
    "test_python_websockets",
    "test_recipes",
    "test_reload",
    "test_systemd",
    "test_testing_fixtures",
    "test_upgrade",
}
"""Files that start many programs, which others cover: without coverage, a start takes half of the CPU time.

Together, their programs reach 0.6 % of the lines and branches that no other test reaches.
"""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Measure the coverage of the programs that the test starts, unless others cover them."""
    if _COVERAGE is not None:
        if item.path.stem in _NOT_COVERED:
            os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
        else:
            os.environ["COVERAGE_PROCESS_CONFIG"] = _COVERAGE


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Return a test authority and a certificate for localhost, 127.0.0.1 and ::1, made once per session."""
    issued = issue.create(["localhost", "127.0.0.1", "::1"], tmp_path_factory.mktemp("certs"))
    return Certificate(issued.ca, issued.cert, issued.key)
