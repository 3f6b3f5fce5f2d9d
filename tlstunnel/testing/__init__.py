"""pytest fixtures for tests of edge workers: the real tunnel with a worker, and real origins behind it.

In a `conftest.py` or a test module::

    pytest_plugins = ["tlstunnel.testing"]

    def test_a_client_without_a_session_is_refused(edge_tunnel):
        tunnel = edge_tunnel("edge/chat.py:fetch", config={"sessions": "redis://localhost:6379/0"})
        result = tunnel.handshake("/chat", headers={"Cookie": "sid=1"})
        assert (result.status, result.request) == (401, None)

`EdgeTunnel` and `EdgeOrigin` are context managers too, for a fixture of your own that lasts for a whole module.
`worker_request` is for a test of the function alone.

PYTEST_DONT_REWRITE: without this word pytest warns when a test module imports from here before `pytest_plugins`.
"""

from tlstunnel.testing.client import HandshakeResult, Headers, worker_request
from tlstunnel.testing.fixtures import edge_origin, edge_tunnel
from tlstunnel.testing.origin import EdgeOrigin, OriginRequest
from tlstunnel.testing.program import Record
from tlstunnel.testing.tunnel import EdgeTunnel

__all__ = [
    "EdgeOrigin",
    "EdgeTunnel",
    "HandshakeResult",
    "Headers",
    "OriginRequest",
    "Record",
    "edge_origin",
    "edge_tunnel",
    "worker_request",
]
