"""What the parent does for plans: it has serving processes observe their connections, and tells the admin process.

It also passes on what the admin process decides: throttles, to all serving processes. They hold on while there is no
admin process, until their time is over.

Tested by tests/promises/test_plans.py.
"""

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from tlstunnel.config import Config
from tlstunnel.errors import ControlError, ProcessError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.plans.observer import Observed
from tlstunnel.processes.admin_socket import AdminSocket
from tlstunnel.processes.children import Child, Role
from tlstunnel.processes.messages import (
    Administer,
    Adopt,
    Ask,
    MinuteOver,
    Observe,
    Recorded,
    Seen,
    SeenElsewhere,
    SeenHere,
    ServeAdmin,
    Stop,
    Throttle,
    Throttled,
)
from tlstunnel.state.throttles import ThrottleRule

KEY_BYTES = 32

MINUTE = 60.0

SETTLE_SECONDS = 3.0
"""How long after the end of a minute it is assessed: the history has it by then, and what processes have seen."""

ANSWER_SECONDS = 30.0
"""How long the admin process may take to carry out a command: it may wait for a disk."""

STOP_SECONDS = 1.0
"""How long it may take to reply when it is to stop."""

EXIT_SECONDS = 5.0
"""How long it may take to exit. Then it is killed, which loses nothing."""


def find_sites_with_plans(config: Config) -> list[str]:
    """Return the sites that have a plan or a guideline. The others are only measured."""
    return [site.names[0] for site in config.sites if site.plan is not None or site.guideline is not None]


class Overseer:
    """Knows the admin process. `list_children` returns the children that have not exited, `get_config` what is served.

    `get_minute` returns the tunnels that are open, and the load, for the end of a minute. `get_ledger` returns the
    ledger, None if there is none. `key` is the one of the previous program, if there is one, and `rules` are its
    throttles. `socket` is that of the admin address.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what it mediates between
        self,
        list_children: Callable[[], Iterable[Child]],
        get_config: Callable[[], Config],
        get_minute: Callable[[], MinuteOver],
        get_ledger: Callable[[], Child | None],
        run_in_background: Callable[[Coroutine[Any, Any, None]], None],
        key: str = "",
        rules: Iterable[ThrottleRule] = (),
        socket: AdminSocket | None = None,
    ) -> None:
        self._list_children = list_children
        self._get_config = get_config
        self._get_minute = get_minute
        self._get_ledger = get_ledger
        self._run_in_background = run_in_background
        self._key = bytes.fromhex(key) if key else secrets.token_bytes(KEY_BYTES)
        self._rules = list(rules)
        self.socket = AdminSocket() if socket is None else socket
        self._reconfiguring = asyncio.Lock()
        self._log = structlog.get_logger()

    @property
    def key(self) -> str:
        """The key that addresses are counted with, for the next program."""
        return self._key.hex()

    @property
    def rules(self) -> list[ThrottleRule]:
        """The throttles that hold."""
        now = time.time()
        return [rule for rule in self._rules if now < rule.until]

    @property
    def admin(self) -> Child | None:
        """The admin process, None if there is none that responds."""
        admin = self.find()
        return admin if admin is not None and not admin.silent else None

    def find(self) -> Child | None:
        """Return the admin process, also one that does not respond."""
        found = [child for child in self._list_children() if child.identity.role is Role.ADMIN and child.ready]
        return next((child for child in found if not child.draining), None)

    @property
    def is_needed(self) -> bool:
        """Whether there has to be an admin process."""
        config = self._get_config()
        return config.admin is not None or bool(find_sites_with_plans(config))

    def open(self) -> None:
        """Listen at the admin address, or close it, as configured."""
        admin = self._get_config().admin
        self.socket.configure(admin.listen if admin is not None else None)

    async def begin(self, admin: Child) -> None:
        """Have a new admin process begin. Raises ProcessError."""
        await admin.link.request(Administer(key=self._key))
        await self._send_socket(admin)

    async def prepare(self, child: Child) -> None:
        """Tell a serving process what to observe, and which throttles hold. One of an earlier release refuses it."""
        sites = find_sites_with_plans(self._get_config())
        if sites or self._rules:
            with contextlib.suppress(ProcessError):
                await child.request(Observe(key=self._key, sites=sites))
                await child.request(Throttle(rules=self.rules))

    async def reconfigure(self, text: str | None, before: Config) -> None:
        """Give the configuration, which serving processes have by now, to all. `before` is the previous one."""
        config = self._get_config()
        sites = find_sites_with_plans(config)
        await asyncio.gather(*(self._try(child, Observe(key=self._key, sites=sites)) for child in self._list_serving()))
        self.open()
        moved = _list_fixed_settings(before) != _list_fixed_settings(config)
        self._run_in_background(self._reconfigure_admin(text, moved=moved))

    async def _reconfigure_admin(self, text: str | None, *, moved: bool) -> None:
        """Give the configuration to the admin process, for which a reload does not wait."""
        async with self._reconfiguring:
            admin = self.find()
            if admin is None:
                return
            if moved or not self.is_needed or not await self._try(admin, Adopt(config=text)):
                await self.dismiss()  # another one reads the new configuration

    async def dismiss(self) -> None:
        """Stop the admin process. Another one takes its place, if there has to be one."""
        for admin in [child for child in self._list_children() if child.identity.role is Role.ADMIN]:
            admin.draining = True
            admin.leaving.set()
            with contextlib.suppress(ProcessError):
                await admin.request(Stop(), STOP_SECONDS)
                await asyncio.wait([admin.process.exited], timeout=EXIT_SECONDS)
            admin.kill()
            await asyncio.wait([admin.process.exited])

    def take_seen(self, _: Child, seen: Seen) -> None:
        """Pass on what a serving process has seen."""
        admin = self.admin
        if admin is not None and admin.link.idle:
            admin.link.notify(seen)

    def take_elsewhere(self, _: Child, seen: SeenElsewhere) -> None:
        """Pass on what another machine has seen."""
        admin = self.admin
        if admin is not None and admin.link.idle:
            admin.link.notify(seen)

    def take_here(self, _: Child, seen: SeenHere) -> None:
        """Send other machines what this one has seen."""
        ledger = self._get_ledger()
        if ledger is not None and ledger.link.idle:
            ledger.link.notify(seen)

    def note_lost(self, tunnels: Mapping[str, int]) -> None:
        """Note that a process has exited with these tunnels: their clients come back."""
        if tunnels and (admin := self.admin) is not None:
            admin.link.notify(Seen(sites={site: Observed(lost=number) for site, number in tunnels.items()}))

    def take_records(self, _: Child, recorded: Recorded) -> None:
        """Pass on what connections a serving process has recorded."""
        admin = self.admin
        if admin is not None and admin.link.idle:
            admin.link.notify(recorded)

    def take_throttles(self, _: Child, throttled: Throttled) -> None:
        """Pass on the throttles that hold now."""
        self._rules = throttled.rules
        self._run_in_background(self._send_throttles())

    async def ask(self, command: str, fields: Mapping[str, Any], who: str) -> Mapping[str, Any]:
        """Have a command of `tlstunnel.commands.usage` carried out for `who`; return its result.

        Raises ControlError.
        """
        admin = self.admin
        if admin is None:
            if not self.is_needed:
                raise ControlError("no site has a plan or a guideline, so there is nothing to say about any of them")
            raise ControlError("the admin process is being started; try again in a moment")
        tunnels = self._get_minute().tunnels
        try:
            reply = await admin.request(
                Ask(command=command, fields=dict(fields), who=who, tunnels=tunnels), ANSWER_SECONDS
            )
        except ProcessError as error:
            raise ControlError(*error.problems) from None
        return reply.fields

    async def run(self) -> None:
        """Tell the admin process when a minute is over, and of another socket, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_socket())
            group.create_task(self._send_minutes())

    async def _watch_socket(self) -> None:
        while True:
            await self.socket.changed.wait()
            self.socket.changed.clear()
            if self.socket.address is not None:
                self._log.info(Event.ADMIN_ADDRESS, address=self.url)
            if (admin := self.find()) is not None:
                with contextlib.suppress(ProcessError):
                    await self._send_socket(admin)

    @property
    def url(self) -> str:
        """The address for a browser, "" if nothing listens there."""
        admin, address = self._get_config().admin, self.socket.address
        if admin is None or address is None:
            return ""
        if address.path is not None:
            return str(address)
        return f"{'http' if admin.cert is None else 'https'}://{address}/"

    async def _send_socket(self, admin: Child) -> None:
        """Have it serve at the socket. Raises ProcessError."""
        descriptor = self.socket.descriptor
        await admin.request(ServeAdmin(), descriptors=[descriptor] if descriptor is not None else [])

    async def _send_minutes(self) -> None:
        while True:
            now = time.time()
            await asyncio.sleep(MINUTE - (now - SETTLE_SECONDS) % MINUTE)
            self.send_minute()

    def send_minute(self) -> None:
        """Tell it now."""
        admin = self.admin
        if admin is not None and admin.link.idle:
            admin.link.notify(self._get_minute())

    async def _send_throttles(self) -> None:
        request = Throttle(rules=self.rules)
        # Also those that are being started, which may have been told the previous ones.
        serving = [child for child in self._list_children() if child.identity.role is Role.SERVING]
        await asyncio.gather(*(child.try_request(request) for child in serving))

    def _list_serving(self) -> list[Child]:
        return [child for child in self._list_children() if child.identity.role is Role.SERVING and child.ready]

    @staticmethod
    async def _try(child: Child, request: Observe | Adopt) -> bool:
        try:
            await child.request(request)
        except ProcessError:
            return False
        return True


def _list_fixed_settings(config: Config) -> tuple[object, ...]:
    """Return what an admin process uses of the configuration and cannot change."""
    return config.state.dir, config.state.url, config.state.prefix
