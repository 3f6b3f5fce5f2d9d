"""The socket of the admin address. The parent has it, so it outlives every admin process, and an upgrade.

Connections wait in its backlog while another admin process is being started. While another program has the address, it
is tried again, and the tunnel serves without it.

Tested by tests/promises/test_admin_address.py.
"""

import asyncio
import contextlib
import os

import msgspec

from tlstunnel.addresses import ListenAddress
from tlstunnel.errors import ListenError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.sockets.listeners import Listener, adopt, is_in_use, listen

RETRY_SECONDS = 1.0
"""How often to try again to listen at an address that another program has."""

BACKLOG = 512
"""Connections that may wait to be accepted. Those of a flood come before a health check, and each costs half a
millisecond."""

MODE = 0o660
"""Of a Unix socket: everybody who may connect may read."""


class AdminSocketHandover(msgspec.Struct, frozen=True):
    """The socket as an upgrade hands it over: its address as configured, and its descriptor."""

    written: str
    fd: int


class AdminSocket:
    """Listens at the admin address. `changed` is set when there is another socket, or none any more.

    `address` is where it listens, None if it does not; `problem` is why not, "" without an admin address.
    """

    def __init__(self, kept: AdminSocketHandover | None = None) -> None:
        self.problem = ""
        self.changed = asyncio.Event()
        self._listener: Listener | None = None
        self._wanted: ListenAddress | None = None
        self._retrying: asyncio.Task[None] | None = None
        self._log = structlog.get_logger()
        if kept is not None:
            os.set_inheritable(kept.fd, False)
            with contextlib.suppress(ListenError):
                self._listener = adopt(kept.fd, ListenAddress.parse(kept.written))
                self._wanted = self._listener.written
                self.changed.set()

    @property
    def address(self) -> ListenAddress | None:
        """Where it listens."""
        return self._listener.address if self._listener is not None else None

    @property
    def descriptor(self) -> int | None:
        """The descriptor, None if it does not listen."""
        return self._listener.sock.fileno() if self._listener is not None else None

    def configure(self, wanted: ListenAddress | None) -> None:
        """Listen at this address from now on, or nowhere."""
        if wanted == self._wanted and (self._listener is not None or self._retrying is not None):
            return
        self.close()
        self._wanted = wanted
        if wanted is not None and not self._try(wanted):
            self._retrying = asyncio.ensure_future(self._retry(wanted))
        self.changed.set()

    def hand_over(self) -> AdminSocketHandover | None:
        """Return what the next program restores."""
        if self._listener is None:
            return None
        return AdminSocketHandover(str(self._listener.written), self._listener.sock.fileno())

    def close(self) -> None:
        """Stop listening, for good or until `configure`."""
        self._wanted = None
        if self._retrying is not None:
            self._retrying.cancel()
            self._retrying = None
        listener, self._listener, self.problem = self._listener, None, ""
        if listener is not None:
            listener.remove()

    def _try(self, wanted: ListenAddress) -> bool:
        """Listen; return False if that may succeed later."""
        try:
            (self._listener,) = listen(wanted, mode=MODE)
            self._listener.sock.listen(BACKLOG)
        except ListenError as error:
            in_use = is_in_use(error)
            problem = str(error).replace("with --listen", "with --admin or admin.listen")
            if problem != self.problem:
                self.problem = problem
                hint = {"hint": "tunnels are served; it is tried again until the address is free"} if in_use else {}
                self._log.warning(Event.NO_ADMIN_ADDRESS, reason=problem, **hint)
            return not in_use
        self.problem = ""
        return True

    async def _retry(self, wanted: ListenAddress) -> None:
        while not self._try(wanted):  # noqa: ASYNC110 - another program has the address
            await asyncio.sleep(RETRY_SECONDS)
        self._retrying = None
        self.changed.set()
