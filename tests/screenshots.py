"""Makes the screenshots of the dashboard and of `tlstunnel top`: a real tunnel, real traffic, and Chromium.

    ./scripts/screenshots [FOLDER]

Traffic runs for a minute and a half, so that charts have something to show. It looks best with Debian's fonts-inter.
"""

import asyncio
import contextlib
import random
import ssl
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from tests.browser import browser_page
from tests.dashboard import render_site, render_top
from tests.harness import REPOSITORY, Certificate, Tunnel, WebsocketsOrigin, eventually
from tests.promises.versions import Versions, upgraded
from tlstunnel.certificates import issue
from tlstunnel.cli.top.app import Top
from tlstunnel.cli.top.source import Source

SITES = ("chat.example", "games.example", "feed.example")
SECONDS = 90
MOST_BYTES = 150_000
COLOURS = 256

RULES = """
[[sites.rules]]
name = "no scanners"
when = 'path.startsWith("/admin")'
action = "block"

[[sites.rate_limits]]
name = "per address"
limit = "30/minute"
"""


def main() -> None:
    """Make all screenshots, in the folder that the command line names."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "docs" / "dashboard"
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, WebsocketsOrigin() as origin:
        folder = Path(name)
        versions = Versions(folder / "versions")
        issued = issue.create(list(SITES), folder / "certs")
        certificate = Certificate(issued.ca, issued.cert, issued.key)
        config = _render(origin.address, certificate, folder)
        with (
            Tunnel(None, certificate, config=config, environment=versions.environment, measured=True) as tunnel,
            _traffic(tunnel, 14, SECONDS),
            browser_page(folder / "home", tunnel.ca) as page,
        ):
            versions.install("1.1.0")
            upgraded(tunnel)
            with _traffic(tunnel, 40, SECONDS):
                _take_all(page, tunnel, target)
                with ThreadPoolExecutor() as executor:  # this thread has the loop of the browser
                    drawing = executor.submit(asyncio.run, _draw_top(tunnel)).result()
                page.goto("about:blank")  # the policy of the dashboard does not allow the styles of the drawing
                page.set_viewport_size({"width": 1600, "height": 586})
                page.set_content(f"<body style='margin: 0'>{drawing}")
                _take(page, target / "top.png")


def _render(origin: str, certificate: Certificate, folder: Path) -> str:
    sites = (
        render_site(name, plan, origin, certificate, RULES)
        for name, plan in zip(SITES, ("small", "medium", "medium"), strict=True)
    )
    return f"""
{render_top(folder, drain_over="10m")}

[plans.small]
guideline = 15
label = "Small"
next = "medium"

[plans.medium]
guideline = 50
label = "Medium"
{"".join(sites)}
"""


@contextlib.contextmanager
def _traffic(tunnel: Tunnel, clients: int, seconds: float) -> Iterator[None]:
    """Have clients converse through the tunnel, and some be refused, for so long or until the end."""
    loop = asyncio.new_event_loop()
    tasks: list[asyncio.Task[None]] = []

    async def run() -> None:
        context = ssl.create_default_context(cafile=tunnel.ca)
        tasks.extend(asyncio.ensure_future(_converse(tunnel.port, context, seconds)) for _ in range(clients))
        tasks.extend(asyncio.ensure_future(_be_refused(tunnel.port, context, seconds)) for _ in range(2))
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    try:
        yield
    finally:
        for task in tasks:
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()


async def _converse(port: int, context: ssl.SSLContext, seconds: float) -> None:
    site = random.choices(SITES, (5, 3, 2))[0]
    await asyncio.sleep(random.uniform(0, 20))
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        with contextlib.suppress(OSError, WebSocketException):
            async with connect(
                f"wss://{site}/rooms/{random.randint(1, 40)}",
                host="127.0.0.1",
                port=port,
                ssl=context,
                compression=None,
                local_addr=(f"127.0.0.{random.randint(2, 9)}", 0),
            ) as client:
                for _ in range(random.randint(10, 400)):
                    await client.send("x" * random.randint(100, 4000))
                    await client.recv()
                    await asyncio.sleep(random.uniform(0.05, 0.4))
        await asyncio.sleep(random.uniform(0.5, 3))


async def _be_refused(port: int, context: ssl.SSLContext, seconds: float) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        path = random.choice(("admin/login.php", "admin/.env", "rooms/7"))
        address = (f"127.0.0.{random.choice((20, 21))}", 0)
        with contextlib.suppress(OSError, WebSocketException):
            async with connect(
                f"wss://{SITES[0]}/{path}", host="127.0.0.1", port=port, ssl=context, local_addr=address
            ):
                pass
        await asyncio.sleep(random.uniform(0.3, 2))


def _take_all(page: Page, tunnel: Tunnel, target: Path) -> None:
    address = tunnel.wait_record(lambda record: record["event"] == "admin address")["address"]
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.emulate_media(color_scheme="light")
    page.goto(f"{address}#/overview")
    page.wait_for_timeout(SECONDS * 500)
    _take(page, target / "overview-light.png")
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(1500)
    _take(page, target / "overview-dark.png")
    _go(page, "handshakes")
    page.locator("tbody button", has_text=":").first.click()
    page.wait_for_timeout(500)
    _take(page, target / "refusal-dark.png")
    page.keyboard.press("Escape")
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1280, "height": 620})
    _go(page, "sites")
    eventually(lambda: page.locator("main > .view:not([hidden]) tbody tr").count() >= len(SITES))
    _take(page, target / "sites-light.png")
    _go(page, "processes")
    _take(page, target / "processes-light.png")
    page.set_viewport_size({"width": 390, "height": 844})
    _go(page, "overview")
    _take(page, target / "overview-phone.png")


async def _draw_top(tunnel: Tunnel) -> str:
    """Return what `tlstunnel top` shows of the tunnel, as SVG."""
    assert tunnel.control is not None
    app = Top(Source(tunnel.control), 1.0)
    async with app.run_test(size=(130, 22)) as pilot:
        await pilot.press("2")
        await asyncio.sleep(4)
        return app.export_screenshot()


def _go(page: Page, view: str) -> None:
    page.evaluate("(hash) => { location.hash = hash; }", f"#/{view}")
    page.wait_for_timeout(3000)


def _take(page: Page, path: Path) -> None:
    """Take a screenshot, with few colours, so that it is small."""
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.name}: {size // 1000} kB")
    if size > MOST_BYTES:
        raise SystemExit(f"{path} has {size} bytes, more than {MOST_BYTES}")


if __name__ == "__main__":
    main()
