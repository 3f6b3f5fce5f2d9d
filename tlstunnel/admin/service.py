"""Everything that is served at the admin address, as configured.

Tested by tests/promises/test_admin_address.py.
"""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tlstunnel.admin.access import AccessControl
from tlstunnel.admin.app import AdminApp
from tlstunnel.admin.history import Histories
from tlstunnel.admin.live import Ask, Live
from tlstunnel.admin.server import HttpServer
from tlstunnel.config.admin import Admin
from tlstunnel.config.problems import Problems
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.serving.admin_files import load_admin_files


class AdminService:
    """Serves the admin address. `ask` has commands carried out. The history is in `folder`, None if there is none.

    `show` returns the address of a client as it may be shown.
    """

    def __init__(self, ask: Ask, folder: Path | None, show: Callable[[str], str] = str) -> None:
        self._access = AccessControl()
        self._live = Live(ask)
        self._histories = Histories(folder) if folder is not None else None
        self._app = AdminApp(self._access, ask, self._live, self._histories)
        self._server = HttpServer(self._app, show)
        self._files: tuple[tuple[Path, float], ...] = ()
        self._certificates: tuple[tuple[Path, float], ...] = ()
        self._configured: Admin | None = None
        self._configuring = asyncio.Lock()
        self._log = structlog.get_logger()

    async def configure(self, admin: Admin) -> None:
        """Use these settings from now on. A file that cannot be used is logged, and admits nobody."""
        async with self._configuring:
            await self._configure(admin)

    async def refresh(self) -> None:
        """Read the files again if they have changed."""
        async with self._configuring:  # or settings that have just been replaced would be back
            admin = self._configured
            if admin is not None and self._files != await asyncio.to_thread(_stat_files, admin):
                await self._configure(admin)

    async def _configure(self, admin: Admin) -> None:
        files = await asyncio.to_thread(_stat_files, admin)
        problems = Problems()
        loaded = await asyncio.to_thread(load_admin_files, admin, problems)
        for problem in problems.found:
            self._log.warning(Event.ADMIN_NOT_CONFIGURED, reason=str(problem))
        # Who was let in by a certificate stays so as long as the connection.
        before = self._certificates
        self._certificates = tuple(file for file in files if file[0] in {admin.cert, admin.client_ca})
        changed = self._configured is not None and before != self._certificates
        self._configured = admin
        self._files = files
        self._access.configure(loaded.tokens, is_local=admin.is_local, client_access=admin.client_access)
        self._app.hosts = frozenset(admin.hosts)
        self._app.listen = f"[{admin.listen.host}]" if ":" in (admin.listen.host or "") else admin.listen.host or ""
        self._server.use(loaded.context)
        if changed:
            self._server.close_connections()

    def listen(self, sock: socket.socket | None) -> None:
        """Serve at this socket from now on."""
        self._server.listen(sock)

    def take_records(self, records: list[dict[str, Any]], left_out: int) -> None:
        """Send these records to watchers."""
        self._live.take_records(records, left_out)

    async def close(self) -> None:
        """Stop, and close all connections."""
        self._server.close()
        await self._live.close()
        if self._histories is not None:
            self._histories.close()


def _stat_files(admin: Admin) -> tuple[tuple[Path, float], ...]:
    paths = [path for path in (admin.cert, admin.key, admin.client_ca, *(one.file for one in admin.tokens)) if path]
    return tuple((path, _find_time(path)) for path in paths)


def _find_time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
