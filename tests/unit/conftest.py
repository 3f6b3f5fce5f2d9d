"""Fixtures for the unit tests."""

from collections.abc import Iterator

import pytest
import structlog

from tlstunnel.journal import lines


@pytest.fixture(autouse=True)
def _default_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a test configures: the log belongs to the process, and another test may capture it."""
    monkeypatch.setattr(lines, "_json_lines", None)
    yield
    if structlog.is_configured():
        structlog.reset_defaults()
