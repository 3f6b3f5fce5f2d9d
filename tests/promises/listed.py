"""Real clients whose tunnels are listed, told apart by their path, and what the tunnel says about them."""

import contextlib
import ssl
from collections.abc import Iterator
from typing import Any

from tests.harness import Tunnel, client_context, receive_exactly, upgrade
from tests.promises.firewalled import connect_from
from tlstunnel.processes.reach import send_command


class Client:
    """A client with an open tunnel at `path`. `up` and `down` are the bytes that it has sent and received."""

    def __init__(self, tunnel: Tunnel, path: str, ip: str, context: ssl.SSLContext) -> None:
        self.path = path
        self.ip = ip
        self.sock = connect_from(tunnel, ip, context)
        self.up = self.down = 0
        assert upgrade(self.sock, path).status == 101

    def echo(self, size: int) -> None:
        """Send so many bytes, and receive them again."""
        self.sock.sendall(bytes(size))
        assert receive_exactly(self.sock, size) == bytes(size)
        self.up += size
        self.down += size


@contextlib.contextmanager
def clients_of(tunnel: Tunnel, count: int, prefix: str = "") -> Iterator[list[Client]]:
    """Open so many tunnels, each at a path and from an address of its own."""
    context = client_context(tunnel)
    with contextlib.ExitStack() as stack:
        clients = []
        for number in range(count):
            client = Client(tunnel, f"/{prefix}{number}", f"127.0.0.{number + 2}", context)
            stack.enter_context(client.sock)
            clients.append(client)
        yield clients


def ask(tunnel: Tunnel, **fields: Any) -> dict[str, Any]:
    """Return the result of the command `tunnels`."""
    return send_command(tunnel.control, {"do": "tunnels", **fields})


def list_all(tunnel: Tunnel, **fields: Any) -> list[dict[str, Any]]:
    """Return all tunnels, in as many pages as it takes."""
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = ask(tunnel, after=after, **fields)
        found += page["tunnels"]
        after = page["next"]
        if not after:
            assert len(found) == page["total"]
            return found
