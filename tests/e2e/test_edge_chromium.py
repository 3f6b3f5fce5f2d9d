"""A browser's page before an edge worker: what a script can send, and what it learns about a refusal."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page

from tests.browser import browser_page
from tests.harness import REPOSITORY
from tlstunnel.testing import EdgeTunnel

ASK = """
([uri, protocols]) => new Promise((resolve) => {
  const socket = new WebSocket(uri, protocols);
  socket.onopen = () => socket.send("grüße");
  socket.onmessage = (event) => { resolve([socket.protocol, event.data]); socket.close(); };
  socket.onerror = () => resolve(null);
})
"""


@pytest.fixture(scope="module")
def tunnel() -> Iterator[EdgeTunnel]:
    with EdgeTunnel(f"{REPOSITORY}/docs/edge/token_subprotocol.py:fetch") as tunnel:
        yield tunnel


@pytest.fixture(scope="module")
def page(tunnel: EdgeTunnel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("home"), tunnel.ca) as page:
        yield page


def test_a_script_signs_in_by_a_subprotocol(tunnel: EdgeTunnel, page: Page) -> None:
    """The origin gets a field that scripts cannot set instead of the token; the page gets its own subprotocol."""
    before = len(tunnel.origin.requests)
    assert page.evaluate(ASK, [tunnel.uri, ["chat", "bearer.abc.def-123"]]) == ["chat", "grüße"]
    (request,) = tunnel.origin.requests[before:]
    assert request.headers["Authorization"] == "Bearer abc.def-123"
    assert request.headers["Sec-WebSocket-Protocol"] == "chat"
    assert b"bearer." not in request.head.lower().replace(b"authorization: bearer ", b"")


def test_a_refusal_is_an_error_event_of_the_page(tunnel: EdgeTunnel, page: Page) -> None:
    """The page learns no more than that; the log has the rest. Nothing reaches the origin."""
    before = len(tunnel.origin.requests)
    assert page.evaluate(ASK, [tunnel.uri, ["bearer.abc"]]) is None
    record = tunnel.wait_for("connection", status=400)
    assert (record["reason"], record["verdict"]) == ("edge: reply", "refused")
    assert tunnel.origin.requests[before:] == []


def test_without_a_token_the_request_is_forwarded_unchanged(tunnel: EdgeTunnel, page: Page) -> None:
    before = len(tunnel.origin.requests)
    assert page.evaluate(ASK, [tunnel.uri, []]) == ["", "grüße"]
    (request,) = tunnel.origin.requests[before:]
    assert "Authorization" not in request.headers
