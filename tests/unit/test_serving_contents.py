"""Which files a reload reports as changed."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tlstunnel.certificates import issue
from tlstunnel.serving.loading import Description, load

WORKER = "async def fetch(request, env):\n    return request\n"

CONFIG = """
[lists]
office = "office.txt"
inline = ["10.0.0.1"]

[[sites]]
names = ["chat.example", "www.chat.example"]
origins = ["wss://localhost:3000"]
worker = "edge/auth.py:fetch"
cert = "own/chat.example.pem"
key = "own/chat.example-key.pem"
client_ca = "client-ca.pem"
origin_ca = "origin-ca.pem"

[[sites]]
names = ["other.example"]
origins = ["localhost:3000"]
worker = "edge/auth.py:fetch"
cert = "own/chat.example.pem"
key = "own/chat.example-key.pem"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_pair(tmp_path)
    (tmp_path / "edge").mkdir()
    (tmp_path / "edge" / "auth.py").write_text(WORKER)
    (tmp_path / "office.txt").write_text("10.0.0.1\n")
    for name in ("client-ca.pem", "origin-ca.pem"):
        (tmp_path / name).write_bytes((tmp_path / "own" / "ca.pem").read_bytes())
    (tmp_path / "t.toml").write_text(CONFIG)
    return tmp_path


def make_pair(folder: Path) -> None:
    issue.create(("chat.example",), folder / "own", force=True)


def find_changes(folder: Path, *changes: Callable[[], object]) -> list[str]:
    """Return what a reload reports after these changes."""

    async def run() -> list[str]:
        before = load(Description.from_file(folder / "t.toml"))
        try:
            for change in changes:
                change()
            after = load(Description.from_file(folder / "t.toml"), before=before)
            found = after.describe_changes(before)
            await after.close()
        finally:
            await before.close()
        return found

    return asyncio.run(run())


def test_nothing(folder: Path) -> None:
    worker = folder / "edge" / "auth.py"
    assert find_changes(folder, lambda: worker.write_text(worker.read_text())) == []


def test_a_worker(folder: Path) -> None:
    worker = folder / "edge" / "auth.py"
    assert find_changes(folder, lambda: worker.write_text(f"{WORKER}\n")) == ["worker edge/auth.py: reloaded"]


def test_a_certificate(folder: Path) -> None:
    assert find_changes(folder, lambda: make_pair(folder)) == ["certificate chat.example: replaced, 396 days"]


def test_lists(folder: Path) -> None:
    office = folder / "office.txt"
    assert find_changes(folder, lambda: office.write_text("10.0.0.1\n10.0.0.2\n")) == ["list office: 2 entries"]
    assert find_changes(folder, lambda: office.write_text("bob # and no one else\n")) == ["list office: 1 entry"]
    text = CONFIG.replace('["10.0.0.1"]', "[]")
    assert find_changes(folder, lambda: (folder / "t.toml").write_text(text)) == [
        "lists: changed",
        "list inline: 0 entries",
    ]


def test_authorities(folder: Path) -> None:
    other = folder / "other"
    issue.create(("other",), other, force=True)
    both = (other / "ca.pem").read_bytes() + (folder / "origin-ca.pem").read_bytes()
    assert find_changes(
        folder,
        lambda: (folder / "client-ca.pem").write_bytes(both),
        lambda: (folder / "origin-ca.pem").write_bytes(both),
    ) == [
        "origin_ca origin-ca.pem: reloaded",
        "client certificates chat.example: authorities or revocation lists reloaded",
    ]
