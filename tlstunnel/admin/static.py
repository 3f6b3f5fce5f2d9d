"""The files of the dashboard: a fixed table, read once. A request is never turned into a path.

Tested by tests/unit/test_admin_static.py.
"""

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
    "png": "image/png",
    "ico": "image/vnd.microsoft.icon",
    "txt": "text/plain; charset=utf-8",
    "woff2": "font/woff2",
}
"""Media types by the ending of a name. Other files are not served."""

_COMPRESSED = frozenset({"html", "css", "js", "mjs", "json", "svg", "txt"})

PAGES = {"/": "index.html", "/try": "try.html"}
"""The paths of pages; what else is in the folder is below /static/."""

API_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self';"
    " connect-src 'self'; frame-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
TRY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src wss:;"
    " frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)
"""The page that tries a tunnel connects to that, which has another address, and has no other rights."""


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file: its text, also compressed if that is shorter, its media type, and what `If-None-Match` is compared to."""

    content: bytes
    compressed: bytes | None
    media_type: str
    etag: str
    policy: str


@cache
def load_files() -> dict[str, StaticFile]:
    """Return the files by path."""
    folder = resources.files("tlstunnel.admin") / "page"
    found = dict(_walk(folder, ""))
    files = {f"/static/{name}": _make(name, content, API_POLICY) for name, content in found.items()}
    for path, name in PAGES.items():
        if name in found:
            files[path] = _make(name, found[name], TRY_POLICY if path == "/try" else PAGE_POLICY)
            files.pop(f"/static/{name}", None)
    return files


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for one in folder.iterdir():
        if one.is_dir():
            yield from _walk(one, f"{prefix}{one.name}/")
        elif one.name.rpartition(".")[2] in TYPES:
            yield f"{prefix}{one.name}", one.read_bytes()


def _make(name: str, content: bytes, policy: str) -> StaticFile:
    ending = name.rpartition(".")[2]
    compressed = gzip.compress(content, 9, mtime=0) if ending in _COMPRESSED else content
    etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return StaticFile(content, compressed if len(compressed) < len(content) else None, TYPES[ending], etag, policy)
