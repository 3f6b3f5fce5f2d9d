"""Debian's Chromium for a test, with a home of its own and one authority that it trusts."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.harness import TIMEOUT, require
from tlstunnel.testing.program import kill_left_behind, mark_environment

_OPTIONS = [
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def browser_page(home: Path, ca: Path) -> Iterator[Page]:
    """Yield an empty page, on which every wait fails after `TIMEOUT`. No process may be left at the end."""
    chromium = require("chromium")
    _trust(home, ca)
    mark, environment = mark_environment({"HOME": str(home), "PATH": os.environ["PATH"]})
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=_OPTIONS, env={**environment})
            try:
                page = browser.new_page()
                page.set_default_timeout(TIMEOUT * 1000)
                yield page
            finally:
                browser.close()
    finally:
        orphans = kill_left_behind(mark)
    assert orphans == []


def _trust(home: Path, ca: Path) -> None:
    """Trust an authority as a user does, in the NSS database of the home folder, and not by a flag."""
    database = home / ".pki" / "nssdb"
    database.mkdir(parents=True)
    certutil = require("certutil", "libnss3-tools")
    for action in (["-N", "--empty-password"], ["-A", "-t", "C,,", "-n", "tlstunnel test", "-i", str(ca)]):
        subprocess.run([certutil, "-d", f"sql:{database}", *action], check=True, timeout=30)
