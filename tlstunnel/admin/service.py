"""Everything that is served at the admin address, as configured.

Tested by tests/promises/test_admin_address.py.
"""

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any, NamedTuple

from tlstunnel.admin.access import AccessControl
from tlstunnel.admin.app import AdminApp
from tlstunnel.admin.history import Histories
from tlstunnel.admin.live import Ask, Live
from tlstunnel.admin.server import HttpServer
from tlstunnel.admin.tokens import LoadedToken, load_tokens
from tlstunnel.config.admin import Admin
from tlstunnel.errors import ConfigurationError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog


class AdminService:
    """Serves the admin address. `ask` has commands carried out. The history is in `folder`, None if there is none."""

    def __init__(self, ask: Ask, folder: Path | None) -> None:
        self._access = AccessControl()
        self._live = Live(ask)
        self._histories = Histories(folder) if folder is not None else None
        self._app = AdminApp(self._access, ask, self._live, self._histories)
        self._server = HttpServer(self._app)
        self._files: tuple[tuple[Path, float], ...] = ()
        self._configured: Admin | None = None
        self._log = structlog.get_logger()

    async def configure(self, admin: Admin) -> None:
        """Use these settings from now on. If a file cannot be used, nobody gets in who needs it: it is logged."""
        loaded = await asyncio.to_thread(_load, admin)
        for problem in loaded.problems:
            self._log.warning(Event.ADMIN_NOT_CONFIGURED, reason=problem)
        changed = self._configured is not None and (self._configured.cert, self._configured.client_ca) != (
            admin.cert,
            admin.client_ca,
        )
        self._configured = admin
        self._files = loaded.files
        self._access.configure(loaded.tokens, is_local=admin.is_local, client_access=admin.client_access)
        self._app.hosts = frozenset(admin.hosts)
        self._app.listen = f"[{admin.listen.host}]" if ":" in (admin.listen.host or "") else admin.listen.host or ""
        self._server.use(loaded.context)
        if changed:
            self._server.close_connections()

    async def refresh(self) -> None:
        """Read the files again if they have changed."""
        admin = self._configured
        if admin is not None and self._files != await asyncio.to_thread(_stat_files, admin):
            await self.configure(admin)

    def listen(self, sock: socket.socket | None) -> None:
        """Serve at this socket from now on."""
        self._server.listen(sock)

    def take_records(self, records: list[dict[str, Any]], left_out: int) -> None:
        """Show these records to whoever watches."""
        self._live.take_records(records, left_out)

    async def close(self) -> None:
        """Stop, and close all connections."""
        self._server.close()
        await self._live.close()
        if self._histories is not None:
            self._histories.close()


class _Loaded(NamedTuple):
    tokens: tuple[LoadedToken, ...]
    context: ssl.SSLContext | None
    files: tuple[tuple[Path, float], ...]
    problems: list[str]


def _load(admin: Admin) -> _Loaded:
    """Read the files. One that cannot be used is a problem, and the others are used."""
    files = _stat_files(admin)
    tokens, problems = load_tokens(admin.tokens)
    context = None
    if admin.cert is not None:
        try:
            context = make_context(admin)
        except ConfigurationError as error:
            problems += error.problems
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # without a certificate: every handshake fails
    return _Loaded(tokens, context, files, problems)


def make_context(admin: Admin) -> ssl.SSLContext:
    """Return the context for TLS. Raises ConfigurationError."""
    assert admin.cert is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(admin.cert, admin.key, password=_refuse_passphrase)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"admin.cert: {admin.cert} and {admin.key} cannot be used: {error}") from None
    if admin.client_ca is not None:
        try:
            context.load_verify_locations(admin.client_ca)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"admin.client_ca: {admin.client_ca} cannot be used: {error}") from None
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _refuse_passphrase() -> str:
    raise ValueError("the private key is encrypted")


def _stat_files(admin: Admin) -> tuple[tuple[Path, float], ...]:
    paths = [path for path in (admin.cert, admin.key, admin.client_ca, *(one.file for one in admin.tokens)) if path]
    return tuple((path, _find_time(path)) for path in paths)


def _find_time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
