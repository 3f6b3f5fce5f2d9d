"""A tunnel with its dashboard in a browser, and clients that count what they do, to compare the two."""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from playwright.sync_api import ConsoleMessage, Locator, Page

from tests.browser import browser_page
from tests.harness import TIMEOUT, Certificate, Header, Tunnel, connect_tls, eventually, receive_exactly, upgrade

TOKEN = "a-token-of-the-tests-with-43-characters-0000"

VIEWS = ("overview", "tunnels", "handshakes", "sites", "origins", "certificates", "processes", "try")

RULE = """
[[sites.rules]]
name = "scanner"
when = 'path.startsWith("/scan")'
action = "block"
"""


def dashboard_config(
    origin: str, certificate: Certificate, folder: Path, *, admin: str = "127.0.0.1:0", site: str = ""
) -> str:
    """Return a configuration with a dashboard, a token, two processes, a plan, a rule, and a backup that is down."""
    more = f"default = true\n{site}\n{RULE}"
    return f"""
{render_top(folder, drain_over="0s", admin=admin)}

[plans.small]
guideline = 4
label = "Small"

{render_site("localhost", "small", origin, certificate, more)}
"""


def render_top(folder: Path, *, drain_over: str, admin: str = "127.0.0.1:0") -> str:
    """Return the beginning of a configuration with a dashboard, a token, and two processes."""
    token = folder / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    return f"""
listen = ["127.0.0.1:0"]
processes = 2
state.dir = "{folder / "state"}"
release.drain_over = "{drain_over}"

[admin]
listen = "{admin}"

[[admin.tokens]]
name = "operator"
file = "{token}"
access = "full"
"""


def render_site(name: str, plan: str, origin: str, certificate: Certificate, more: str = "") -> str:
    """Return the table of a site with a plan, and a backup that is down; `more` comes at its end."""
    return f"""
[[sites]]
names = ["{name}"]
plan = "{plan}"
origins = ["{origin}", {{ address = "127.0.0.1:1", backup = true }}]
cert = "{certificate.cert}"
key = "{certificate.key}"
{more}
"""


@dataclass(eq=False)
class Client:
    """An open tunnel to an origin that echoes, and how many bytes it has sent and received through it."""

    sock: ssl.SSLSocket
    path: str
    up: int = 0
    down: int = 0

    def exchange(self, size: int) -> None:
        """Send so many bytes, and wait for their echo."""
        self.sock.sendall(b"x" * size)
        self.up += size
        self.down += len(receive_exactly(self.sock, size))

    def is_open(self) -> bool:
        """Whether the other side still echoes."""
        try:
            self.exchange(1)
        except (OSError, AssertionError):
            return False
        return True


@dataclass(eq=False)
class Clients:
    """All clients of a tunnel since its start, and what they have seen themselves."""

    tunnel: Tunnel
    opened: int = 0
    refused: int = 0
    open: list[Client] = field(default_factory=list)
    ended: list[Client] = field(default_factory=list)

    @property
    def up(self) -> int:
        """Bytes that all clients have sent through tunnels."""
        return sum(client.up for client in self.open + self.ended)

    @property
    def down(self) -> int:
        """Bytes that all clients have received through tunnels."""
        return sum(client.down for client in self.open + self.ended)

    @contextlib.contextmanager
    def connected(self, number: int, path: str = "/chat", headers: tuple[Header, ...] = ()) -> Iterator[list[Client]]:
        """Open so many tunnels; close those of them that are still open at the end."""
        found = [self.connect(f"{path}/{index}", headers) for index in range(number)]
        try:
            yield found
        finally:
            for client in found:
                self.close(client)

    def connect(self, path: str, headers: tuple[Header, ...] = ()) -> Client:
        """Open a tunnel."""
        sock = connect_tls(self.tunnel)
        response = upgrade(sock, path, headers)
        assert response.status == 101, response
        client = Client(sock, path)
        self.opened += 1
        self.open.append(client)
        return client

    def close(self, client: Client) -> None:
        """Close a tunnel, if it is open, and wait until the other side has closed it too."""
        if client not in self.open:
            return
        self.open.remove(client)
        self.ended.append(client)
        with contextlib.suppress(OSError):
            client.sock.unwrap()
        client.sock.close()

    def be_refused(self, path: str = "/scan") -> None:
        """Have a handshake refused by the rule."""
        with connect_tls(self.tunnel) as sock:
            assert upgrade(sock, path).status == 403
        self.refused += 1


class Dashboard:
    """The page, and what a test does with it. Whatever its console says is a fault."""

    def __init__(self, page: Page, tunnel: Tunnel) -> None:
        self.page = page
        self.tunnel = tunnel
        self.clients = Clients(tunnel)
        self.faults: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))

    @property
    def address(self) -> str:
        """The address of the dashboard, which ends with a slash."""
        return str(self.tunnel.wait_record(lambda record: record["event"] == "admin address")["address"])

    def show(self, view: str = "overview") -> Self:
        """Show a view, and wait until its figures are live."""
        url = f"{self.address}#/{view}"
        if self.page.url.startswith(self.address):
            self.page.evaluate("(hash) => { location.hash = hash; }", f"#/{view}")
        else:
            self.page.goto(url)
        self.page.locator("#state[data-state=live]").wait_for()
        self.view.wait_for()
        return self

    @property
    def view(self) -> Locator:
        """The view that is shown."""
        return self.page.locator("main > .view:not([hidden])")

    @property
    def dialog(self) -> Locator:
        """The dialog that is shown."""
        return self.page.locator("dialog[open]")

    def panel(self, title: str) -> Locator:
        """A panel of the view, by its heading."""
        return self.view.locator("section.panel").filter(has=self.page.locator(f'h2:text-is("{title}")'))

    def tile(self, title: str, part: str = "value") -> Locator:
        """The figure of a tile of the overview; "more" is the line below it."""
        return self.view.locator(".tile").filter(has=self.page.locator(f'h2:text-is("{title}")')).locator(f".{part}")

    def rows(self, title: str) -> list[dict[str, str]]:
        """The rows of the table in a panel, each by the titles of its columns."""
        found: list[dict[str, str]] = self.panel(title).evaluate(
            """(panel) => {
              const table = panel.querySelector(".table table");
              const titles = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent);
              if (table.closest("[hidden]")) return [];
              return [...table.querySelectorAll("tbody tr")].map((row) =>
                Object.fromEntries([...row.children].map((cell, index) => [titles[index], cell.textContent])));
            }"""
        )
        return found

    def wait_rows(self, title: str, number: int) -> list[dict[str, str]]:
        """Wait until the table in a panel has so many rows, and return them."""
        eventually(lambda: len(self.rows(title)) == number)
        return self.rows(title)

    def log_in(self) -> None:
        """Log in with the token."""
        self.page.locator("#session").click()
        self.dialog.get_by_label("Token").fill(TOKEN)
        self.dialog.get_by_role("button", name="Log in").click()
        self.page.locator('#session:text-is("Log out operator")').wait_for()

    def log_out(self) -> None:
        """Log out."""
        self.page.locator("#session").click()
        self.dialog.get_by_role("button", name="Log out").click()
        self.page.locator('#session:text-is("Log in")').wait_for()
        self.close_dialogs()

    def close_dialogs(self) -> None:
        """Close all dialogs."""
        while self.dialog.count():
            self.page.keyboard.press("Escape")

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.faults.append(f"{message.type}: {message.text} ({message.location.get('url', '')})")


@contextlib.contextmanager
def dashboard_to(tunnel: Tunnel, home: Path) -> Iterator[Dashboard]:
    """Yield the dashboard of a tunnel, in a browser that trusts it."""
    with browser_page(home, tunnel.ca) as page:
        page.set_default_timeout(2 * TIMEOUT * 1000)
        yield Dashboard(page, tunnel)


def free_port() -> int:
    """Return a port of loopback that nothing uses at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def render_bytes(size: int) -> str:
    """Return a size as the dashboard shows it, up to a megabyte."""
    if size < 1000:
        return f"{size} B"
    return f"{size / 1000:.1f} kB" if size < 100_000 else f"{size / 1000:.0f} kB"
