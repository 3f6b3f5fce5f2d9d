"""A tunnel as it was started: what it serves, how that is replaced while it runs, and how it ends.

What is served is made whole and checked before anything is switched (`load`), off the loop that serves tunnels: ten
thousand sites take seconds. A reload that fails changes nothing.
"""

import asyncio
import contextlib
import errno
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from tlstunnel import __version__
from tlstunnel.addresses import ListenAddress
from tlstunnel.certificates import issue
from tlstunnel.certificates.watch import Watch
from tlstunnel.changes import changes
from tlstunnel.config import Config, SiteConfig
from tlstunnel.config import load as load_config
from tlstunnel.control import ControlSocket, default_path
from tlstunnel.errors import ConfigurationError, ControlError, ListenError, TlstunnelError
from tlstunnel.firewall.verdict import Firewall
from tlstunnel.listeners import Listener, listen
from tlstunnel.record import Journal
from tlstunnel.server import Server
from tlstunnel.sites import Sites, load_sites

if TYPE_CHECKING:
    from tlstunnel.firewall.counters import Counters

PORT = 8443
LOOPBACK = (ListenAddress("127.0.0.1", PORT), ListenAddress("::1", PORT))
EVERYWHERE = (ListenAddress("0.0.0.0", PORT), ListenAddress("::", PORT))  # noqa: S104 - with a certificate of its own
CERTIFICATES = Path("certs")

SIGINT_SECONDS = 5.0
"""Over how long SIGINT spreads the closings: someone waits at a terminal."""

UNVERIFIED = "whoever is on the way to them can read and change everything; give origin_ca instead of verify = off"

MOST_TOLD = 50
"""Changes of a reload that the log has, one by one."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asked for. `site` is None where the file has the sites; `listen` empty where it did not."""

    file: Path | None
    site: SiteConfig | None
    listen: tuple[ListenAddress, ...]
    control: Path | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """Everything that serving takes, whole and checked."""

    config: Config
    configured: tuple[SiteConfig, ...]
    sites: Sites
    firewall: Firewall
    listen: tuple[ListenAddress, ...]


def load(
    wanted: Wanted,
    config: Config,
    counted: Counter[str],
    counters: "Counters | None" = None,
    before: Sites | None = None,
) -> Loaded:
    """Make what `config` describes, going on with what there is of `before`.

    Raises ConfigurationError or CertificateError.
    """
    if config.sites and wanted.site is not None:
        raise ConfigurationError(
            f"{wanted.file} has [[sites]] now, and this tunnel was started with an origin of its own"
        )
    configured = config.sites or ((wanted.site,) if wanted.site is not None else ())
    if not configured:
        raise ConfigurationError(f"{wanted.file}: there are no [[sites]] any more")
    try:
        firewall = Firewall(config, configured, counted=counted, counters=counters)
    except ConfigurationError as error:
        raise ConfigurationError(f"{wanted.file}: {error}") from None
    test_pair = None
    if tested := any(not site.pairs for site in configured):
        test = issue.ensure(CERTIFICATES)
        test_pair = test.cert, test.key
    sites = load_sites(configured, test_pair, before, resolve_every=config.origin_resolve)
    return Loaded(
        config=config,
        configured=configured,
        sites=sites,
        firewall=firewall,
        listen=wanted.listen or config.listen or (LOOPBACK if tested else EVERYWHERE),
    )


class Listeners:
    """What is listened on, by the address as it was written."""

    def __init__(self) -> None:
        self._open: dict[ListenAddress, Listener] = {}

    def __iter__(self) -> Iterator[Listener]:
        return iter(self._open.values())

    def open(self, addresses: tuple[ListenAddress, ...]) -> dict[ListenAddress, Listener]:
        """Open those of `addresses` that are not open yet, all or none. Raises ListenError."""
        opened: dict[ListenAddress, Listener] = {}
        try:
            for address in addresses:
                if address in self._open:
                    continue
                try:
                    opened[address] = listen(address)
                except ListenError as error:
                    # Nobody asked for IPv6 by name: a machine without it is served without it.
                    if address not in (LOOPBACK[1], EVERYWHERE[1]) or not _no_such_family(error):
                        raise
                    structlog.get_logger().warning("no IPv6 here", reason=str(error))
        except ListenError:
            for listener in opened.values():
                listener.close()
            raise
        return opened

    def settle(self, opened: Mapping[ListenAddress, Listener], wanted: tuple[ListenAddress, ...]) -> None:
        """Keep these and those of before that are wanted; who closes the others is the server."""
        self._open = {address: one for address, one in {**self._open, **opened}.items() if address in wanted}

    def close(self) -> None:
        """Close them all."""
        for listener in self:
            listener.close()


def _no_such_family(error: ListenError) -> bool:
    cause = error.__context__
    return isinstance(cause, OSError) and cause.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class Service:
    """Serves what was `loaded` until a signal ends it."""

    def __init__(self, wanted: Wanted, loaded: Loaded, listeners: Listeners, journal: Journal) -> None:
        self._wanted = wanted
        self._loaded = loaded
        self._listeners = listeners
        self._journal = journal
        self._log = structlog.get_logger()
        self._reloading = asyncio.Lock()
        self._beside: set[asyncio.Task[Any]] = set()
        self._ending = ""

    async def run(self) -> None:
        """Serve until told to end by SIGTERM or SIGINT. Raises ControlError, ConfigurationError before it begins."""
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[signal.Signals] = asyncio.Queue()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, told.put_nowait, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload_for_signal()))
        async with self._reloading:  # SIGHUP may come before there is anything to switch
            await self._loaded.firewall.start()
            self._server = Server(
                self._loaded.config, self._loaded.sites, self._loaded.firewall, self._listeners, self._journal
            )
            control = self._control()
            if control is not None:
                await control.serve()
            self._loaded.sites.start()
            self._watch = Watch(self._loaded.sites.certificates)
            self._watch.start()
            self._warn()
            self._server.start()
        for listener in self._listeners:
            self._log.info("listening", address=str(listener.address))
        self._log.info("ready", version=__version__, **({"control": str(control.path)} if control else {}))
        await self._end(told)
        if control is not None:
            await control.close()
        self._log.info("stopped")

    async def reload(self) -> list[str]:
        """Read everything again and switch to it; give what has changed. Raises ControlError: then nothing has."""
        async with self._reloading:
            self._refuse_when_ending()
            before = self._loaded
            try:
                loaded = await self._load_beside()
                await loaded.firewall.start()
                try:
                    self._refuse_when_ending()
                    opened = self._listeners.open(loaded.listen)
                except TlstunnelError:
                    await loaded.firewall.close()
                    raise
            except ControlError:
                raise
            except TlstunnelError as error:
                self._log.warning("not reloaded", reason=str(error))
                raise ControlError(f"nothing was changed: {error}") from None
            self._listeners.settle(opened, loaded.listen)
            loaded.sites.adopt(before.sites)
            loaded.sites.start()
            self._watch.follow(loaded.sites.certificates)
            self._server.switch(loaded.config, loaded.sites, loaded.firewall, self._listeners)
            self._loaded = loaded
            self._warn()
            self._begin(self._retire(before))
            told = [*changes(before.config, loaded.config), *loaded.sites.certificates.complaints()]
            self._log.info("reloaded", changes=told[:MOST_TOLD], more=max(len(told) - MOST_TOLD, 0))
            for listener in opened.values():
                self._log.info("listening", address=str(listener.address))
            return told

    def _refuse_when_ending(self) -> None:
        if self._ending:
            raise ControlError(f"nothing was changed: the tunnel is ending ({self._ending})")

    async def _load_beside(self) -> Loaded:
        """Load in a thread. With Python's 5 ms for each turn of a thread, tunnels would get a tenth of theirs.

        10 000 sites: 658 round trips a second meanwhile, 9 426 with 0.5 ms, of 9 023 without a load (one run each).
        """
        interval = sys.getswitchinterval()
        sys.setswitchinterval(min(interval, 0.0005))
        try:
            return await asyncio.to_thread(self._load_again)
        finally:
            sys.setswitchinterval(interval)

    def _load_again(self) -> Loaded:
        config = load_config(self._wanted.file) if self._wanted.file else self._loaded.config
        return load(self._wanted, config, self._journal.counters, self._loaded.firewall.counters, self._loaded.sites)

    async def _reload_for_signal(self) -> None:
        with contextlib.suppress(ControlError):  # the log has it
            await self.reload()

    async def _reload_for_command(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"changes": await self.reload()}

    async def _retire(self, before: Loaded) -> None:
        """Close what was served with before once nobody asks it any more."""
        await self._server.handshakes_done()
        await before.firewall.close()
        await before.sites.close()

    def _warn(self) -> None:
        for site in self._loaded.configured:
            if site.verify == "off":
                self._log.warning("origins not verified", site=site.names[0], hint=UNVERIFIED)

    def _control(self) -> ControlSocket | None:
        """The control socket; one that nobody asked for by name is not worth ending for."""
        ports = [listener.address.port for listener in self._listeners]
        path = self._wanted.control or default_path(ports[0])
        try:
            return ControlSocket.bind(path, {"reload": self._reload_for_command})
        except ControlError as error:
            if self._wanted.control is not None:
                raise
            self._log.warning("no control socket", reason=str(error))
            return None

    async def _end(self, told: "asyncio.Queue[signal.Signals]") -> None:
        number = await told.get()
        self._ending = number.name
        self._log.info("ending", signal=number.name)
        release = self._loaded.config.release
        wait, over = (0.0, SIGINT_SECONDS) if number == signal.SIGINT else (release.drain_wait, release.drain_over)
        drain = asyncio.ensure_future(self._server.drain(wait, over))
        again = asyncio.ensure_future(told.get())
        await asyncio.wait((drain, again), return_when=asyncio.FIRST_COMPLETED)
        for task in (drain, again):
            task.cancel()
        await self._server.close()
        # A reload that has begun finds out that it is too late.
        async with self._reloading:
            await asyncio.gather(*self._beside, return_exceptions=True)
            await self._loaded.firewall.close()
            await self._loaded.sites.close()
        await self._watch.close()

    def _begin(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
