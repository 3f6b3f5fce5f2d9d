"""The pytest fixtures.

Tested by tests/e2e/test_testing_fixtures.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tlstunnel.testing.origin import EdgeOrigin
from tlstunnel.testing.tunnel import EdgeTunnel


@pytest.fixture
def edge_origin() -> Iterator[Callable[[], EdgeOrigin]]:
    """Start origins for this test: each call returns a new `EdgeOrigin`."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(EdgeOrigin())


@pytest.fixture
def edge_tunnel(
    request: pytest.FixtureRequest, edge_origin: Callable[[], EdgeOrigin]
) -> Iterator[Callable[..., EdgeTunnel]]:
    """Start tunnels for this test: call it as `EdgeTunnel`. If the test fails, their logs are shown."""

    def start(*arguments: Any, **options: Any) -> EdgeTunnel:
        __tracebackhide__ = True
        tunnel = stack.enter_context(EdgeTunnel(*arguments, **options))
        logs.callback(lambda: request.node.add_report_section("teardown", "log of the tunnel", tunnel.text))
        return tunnel

    with contextlib.ExitStack() as logs, contextlib.ExitStack() as stack:
        yield start
