"""Fixtures for the unit tests."""

from collections.abc import Iterator

import pytest
import structlog

from tests.redis_server import RedisServer
from tlstunnel.journal import lines


@pytest.fixture(autouse=True)
def _default_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test configures: the log belongs to the process, and another test may capture it."""
    monkeypatch.setattr(lines, "_json_lines", None)
    yield
    if structlog.is_configured():
        structlog.reset_defaults()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    """Run a real `redis-server` for the tests of a module."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """Return the server of the module, without data."""
    shared_server.command("FLUSHALL")
    return shared_server
