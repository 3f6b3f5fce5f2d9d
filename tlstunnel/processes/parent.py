"""The parent: holds the sockets, starts children, answers the control socket, and serves nothing itself.

It is replaced by new code in place (`tlstunnel.processes.handover`): same process, same sockets, same children.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog

from tlstunnel import __version__
from tlstunnel.config import Config, read
from tlstunnel.config.invocation import EVERYWHERE, LOOPBACK, addresses_to_listen_on
from tlstunnel.errors import ControlError, ProcessError, TlstunnelError
from tlstunnel.origins.embedded import EchoOrigin
from tlstunnel.processes import cores, handover
from tlstunnel.processes.children import TOLD_SECONDS, Beginning, Child, described, pss
from tlstunnel.processes.control import CLIENT, ControlSocket, Handler, default_path
from tlstunnel.processes.handover import Handover
from tlstunnel.processes.notify import Notify
from tlstunnel.processes.slots import Slots
from tlstunnel.processes.spawn import spawned

SIGINT_SECONDS = 5.0
"""Over how long SIGINT and `stop` spread the closings: someone waits at a terminal."""

MOST_TOLD = 50
"""Changes of a reload that the log has, one by one."""

QUICK = 10.0
"""Seconds. A child that ends sooner than this after its start is started again with a pause that grows."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between such starts; the first is at once."""

PREPARE_SECONDS = 120.0
"""What a child has to load a new configuration: ten thousand sites take 2 s."""

KILL_SECONDS = 10.0
"""What a child has beyond all that it was given to end, before it is killed."""

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beside what is served: None where it says nothing."""

    control: Path | None = None
    processes: int | Literal["auto"] | None = None

    def count(self, config: Config) -> int:
        """How many processes serve: as the command line says, else the file."""
        wanted = config.processes if self.processes is None else self.processes
        return cores.usable() if wanted == "auto" else wanted


class Parent:
    """Keeps `wanted` served by children until it is told to end."""

    def __init__(
        self,
        beginning: Beginning,
        slots: Slots,
        options: Options,
        echo: EchoOrigin | None = None,
        before: Handover | None = None,
    ) -> None:
        self._beginning = beginning
        self._slots = slots
        self._options = options
        self._echo = echo
        self._before = before
        self._generation = before.generation + 1 if before else 1
        self._configuration = 0
        self._children: dict[int, Child] = {}
        self._keepers: dict[int, asyncio.Task[None]] = {}
        self._told: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self._may_start = asyncio.Event()
        self._may_start.set()
        self._begun = before is not None
        self._ending = ""
        self._over: asyncio.Event = asyncio.Event()
        self._notify = Notify()
        self._log = structlog.get_logger()

    @property
    def _config(self) -> Config:
        return self._beginning.config

    @property
    def _count(self) -> int:
        return self._options.count(self._config)

    async def run(self) -> None:
        """Serve until told to end. Raises TlstunnelError before it begins."""
        loop = asyncio.get_running_loop()
        signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, signals.put_nowait, number)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._beside(self._reload_for_signal()))
        loop.add_signal_handler(signal.SIGUSR2, lambda: self._beside(self._upgrade_for_signal()))
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        if self._before is not None:
            for kept in self._before.children:
                child = Child.restored(kept)
                self._children[child.pid] = child
            # The watchdog goes on counting; the start of many sites takes seconds.
            self._beside(self._stay_alive())
        # Blocked while the program was replaced, when nobody would have handled them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        ending = asyncio.ensure_future(self._end_when_told(signals))
        self._control = self._control_socket()
        try:
            begin = asyncio.ensure_future(self._begin())
            await asyncio.wait((begin, ending), return_when=asyncio.FIRST_COMPLETED)
            if begin.done() and not self._ending:
                begin.result()
            await ending
            begin.cancel()
        finally:
            ending.cancel()
            self._over.set()
            await self._kill_all()
            await self._leave_beside()
            if self._control is not None:
                await self._control.close()
            self._slots.close()
            # The loop gives its handlers back: one more signal would end what has ended well with a failure.
            signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        self._log.info("stopped")

    async def _begin(self) -> None:
        old = list(self._children.values())
        async with self._changing:  # a reload may be asked for before there is anything to switch
            if self._control is not None:
                await self._control.serve()
            starts = [self._start(place) for place in range(1, self._count + 1)]
            try:
                await asyncio.gather(*starts)
            except TlstunnelError as error:
                if self._before is None:
                    raise
                # The old children go on; each of the new is tried again.
                self._log.error("upgrade: the new processes do not start", reason=str(error))
                self._answer_upgrade(error=f"the new processes do not start, the old ones serve: {error}")
                for start in starts:
                    await asyncio.wait([start])
                self._beside(self._finish_when_ready(old))
            else:
                await self._serve_instead_of(old)
        self._begun = True
        for address in dict.fromkeys(str(slot.listener.address) for slot in self._slots):
            self._log.info("listening", address=address)
        where = {"control": str(self._control.path)} if self._control else {}
        self._log.info("ready", version=__version__, processes=self._count, generation=self._generation, **where)
        if os.geteuid() == 0 and self._before is None:
            self._log.warning("running as root", hint="it needs none of root's rights: docs/operations.md")
        self._ready()
        if self._before is None:
            self._beside(self._stay_alive())

    async def _serve_instead_of(self, old: Iterable[Child]) -> None:
        await self._assign()
        release = self._config.release
        for child in old:
            if not child.finishing:
                child.finishing = True
                await child.tell("finish", linger=release.drain_after, over=release.drain_over)
        if self._before is not None:
            self._log.info("upgraded", version=__version__, before=self._before.version, generation=self._generation)
            self._answer_upgrade(version=__version__, before=self._before.version, generation=self._generation)

    async def _finish_when_ready(self, old: Iterable[Child]) -> None:
        while not self._serving():  # noqa: ASYNC110
            await asyncio.sleep(FIRST_PAUSE)
        await self._serve_instead_of(old)

    def _ready(self) -> None:
        count = f"{self._count} process{'es' if self._count > 1 else ''}"
        self._notify.ready(f"{__version__}, generation {self._generation}, {count}")

    # --- children -----------------------------------------------------------------------------------------------------

    def _start(self, place: int) -> "asyncio.Future[None]":
        """Keep a child at `place` from now on; what is given is done once the first is ready, or could not start."""
        first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keepers[place] = asyncio.ensure_future(self._keep(place, first))
        return first

    async def _keep(self, place: int, first: "asyncio.Future[None]") -> None:
        pause = 0.0
        while not self._ending and place <= self._count:
            begun = time.monotonic()
            reason = ""
            await self._may_start.wait()
            configuration = self._configuration
            try:
                child = self._spawned(place)
            except OSError as error:  # out of processes, memory or descriptors
                if not first.done():
                    first.set_exception(ProcessError(f"no process can be started: {error.strerror}"))
                pause = min(max(2 * pause, FIRST_PAUSE), LONGEST_PAUSE)
                self._log.error("no process can be started", place=place, why=error.strerror, again_in=pause)
                await asyncio.sleep(pause)
                continue
            try:
                await self._ready_one(child)
            except TlstunnelError as error:
                reason = "" if child.link.closed else str(error)
                child.kill()
            else:
                if not first.done():
                    first.set_result(None)  # who waits for all of them assigns
                elif configuration != self._configuration:
                    child.kill()  # has never accepted; a reload has come between
                    await child.wait()
                    continue
                else:
                    await self._assign()
            await child.wait_until_missing()
            if child.leaving.is_set() and not self._ending:
                await self._assign()
                continue
            status = await child.wait()
            if not first.done():
                first.set_exception(ProcessError(reason or f"a process ended at its start: {described(status)}"))
            if self._ending or child.finishing or not (self._begun or child.ready):
                return  # where none has begun, the start has failed as a whole
            lived = time.monotonic() - begun
            pause = 0.0 if lived >= QUICK else pause * 2 or (FIRST_PAUSE if pause or reason else 0.0)
            pause = min(pause, LONGEST_PAUSE)
            self._log.error(
                "process ended",
                process=child.pid,
                place=place,
                why=reason or described(status),
                seconds=round(lived, 1),
                again_in=pause,
            )
            await self._assign()
            await asyncio.sleep(pause)
            pause = pause or FIRST_PAUSE / 2

    def _spawned(self, place: int) -> Child:
        # In a group of its own, so that what a terminal sends reaches the parent alone.
        pid, link = spawned(group=True)
        child = self._children[pid] = Child(pid, place, self._generation, link)
        return child

    async def _ready_one(self, child: Child) -> None:
        await child.begin(self._beginning)
        if child.version != __version__:
            hint = "it was replaced on the disk: tlstunnel upgrade"
            self._log.warning("another version", process=child.pid, version=child.version, hint=hint)
        await child.hand(list(self._slots))
        child.ready = True

    def _serving(self) -> list[Child]:
        """The children that accept, by place."""
        current = [child for child in self._children.values() if child.ready and not child.finishing]
        return sorted(
            (child for child in current if child.generation == self._generation and not child.ended.done()),
            key=lambda child: child.place,
        )

    async def _assign(self) -> None:
        """Say which child serves which slot. What one takes over it has before another leaves it."""
        children = self._serving()
        of = self._slots.assigned([child.pid for child in children])
        kept = [slot.number for slot in self._slots]
        await asyncio.gather(*(child.tell("serve", kept=kept, numbers=sorted(of[child.pid])) for child in children))

    def _reap(self) -> None:
        for child in list(self._children.values()):
            status: int | None
            try:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = child.pid, None
            if pid:
                del self._children[child.pid]
                child.link.close()
                child.ended.set_result(status)
                if child.generation < self._generation or child.finishing:
                    self._log.info("process finished", process=child.pid, generation=child.generation)

    # --- commands -----------------------------------------------------------------------------------------------------

    def _control_socket(self) -> ControlSocket | None:
        """The control socket; one that nobody asked for by name is not worth ending for."""
        handlers: Mapping[str, Handler] = {
            "reload": self._reload_for_command,
            "upgrade": self._upgrade_for_command,
            "status": self._status,
            "drain": self._drain_for_command,
            "stop": self._stop_for_command,
        }
        if self._before is not None:
            return self._before.control(handlers)
        path = self._options.control or default_path(next(iter(self._slots)).listener.address.port)
        try:
            return ControlSocket.bind(path, handlers)
        except ControlError as error:
            if self._options.control is not None:
                raise
            self._log.warning("no control socket", reason=str(error))
            return None

    async def reload(self) -> list[str]:
        """Read everything again, in every child, and switch to it; give what has changed. Raises ControlError."""
        async with self._changing:
            self._refuse_when_ending()
            self._notify.reloading()
            try:
                return await self._reload()
            except ControlError:
                raise
            except TlstunnelError as error:
                self._log.warning("not reloaded", reason=str(error))
                raise ControlError(f"nothing was changed: {error}") from None
            finally:
                self._ready()

    async def _reload(self) -> list[str]:
        text = self._read()
        config = await asyncio.to_thread(self._beginning.wanted.configuration, text)
        addresses = addresses_to_listen_on(self._beginning.wanted, config, self._slots.passed)
        children = self._serving()
        prepared = await asyncio.gather(
            *(child.ask("prepare", PREPARE_SECONDS, config=text) for child in children), return_exceptions=True
        )
        try:
            # One that has ended meanwhile is started with the new.
            for child, answer in zip(children, prepared, strict=True):
                if isinstance(answer, BaseException) and not child.ended.done() and not child.link.closed:
                    raise answer
            self._refuse_when_ending()
            opened = self._slots.open(addresses, 1, (LOOPBACK[1], EVERYWHERE[1]))
        except TlstunnelError:
            await asyncio.gather(*(child.tell("abandon") for child in children))
            raise
        gone = self._slots.settle(opened, addresses)
        added = [slot for slots in opened.values() for slot in slots]
        self._beginning = dataclasses.replace(self._beginning, text=text, config=config)
        self._configuration += 1
        for slot in gone:
            slot.listener.remove()
        for child in children:
            with contextlib.suppress(ProcessError):
                await child.hand(added)
                await child.tell("commit")
        await self._resize()
        await self._assign()
        changes: list[str] = next((answer["changes"] for answer in prepared if isinstance(answer, dict)), [])
        self._log.info("reloaded", changes=changes[:MOST_TOLD], more=max(len(changes) - MOST_TOLD, 0))
        for slot in added:
            self._log.info("listening", address=str(slot.listener.address))
        return changes

    def _read(self) -> str | None:
        file = self._beginning.wanted.file
        return read(file) if file is not None else None

    async def _resize(self) -> None:
        """Start what is missing, and let those finish that are too many: their slots go to the others."""
        count = self._count
        starts = [
            self._start(place)
            for place in range(1, count + 1)
            if place not in self._keepers or self._keepers[place].done()
        ]
        for start in starts:
            with contextlib.suppress(TlstunnelError):  # tried again, with a pause
                await start
        release = self._config.release
        for child in self._serving():
            if child.place > count:
                child.finishing = True
                await self._assign()
                await child.tell("finish", linger=release.drain_after, over=release.drain_over)

    def _refuse_when_ending(self) -> None:
        if self._ending:
            raise ControlError(f"nothing was changed: the tunnel is ending ({self._ending})")

    async def _reload_for_signal(self) -> None:
        with contextlib.suppress(ControlError):  # the log has it
            await self.reload()

    async def _reload_for_command(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"changes": await self.reload()}

    async def _status(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        children = [child for child in self._children.values() if child.ready]
        answers = await asyncio.gather(
            *(child.ask("status", TOLD_SECONDS) for child in children), return_exceptions=True
        )
        now = time.time()
        return {
            "version": __version__,
            "generation": self._generation,
            "process": os.getpid(),
            "ending": self._ending,
            "listening": list(dict.fromkeys(str(slot.listener.address) for slot in self._slots)),
            "processes": [
                {
                    "process": child.pid,
                    "place": child.place,
                    "generation": child.generation,
                    "version": child.version,
                    "seconds": round(now - child.started, 1),
                    "state": "finishing" if child.finishing or self._ending else "serving",
                    "tunnels": answer["tunnels"],
                    "handshakes": answer["handshakes"],
                    "pss_kib": pss(child.pid),
                }
                for child, answer in zip(children, answers, strict=True)
                if isinstance(answer, dict)
            ],
            "pss_kib": pss(os.getpid()),
        }

    async def _drain_for_command(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        await self._over.wait()
        return {}

    async def _stop_for_command(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        await self._over.wait()
        return {}

    # --- upgrade ------------------------------------------------------------------------------------------------------

    async def upgrade(self, client: int | None) -> None:
        """Execute the new code in this process's place, and do not come back; `client` is told there.

        Raises ControlError: nothing was changed.
        """
        if self._changing.locked():
            raise ControlError("nothing was changed: a reload or an upgrade is under way; try again when it is done")
        async with self._changing:
            self._refuse_when_ending()
            self._notify.reloading()
            try:
                text = self._read()
                await handover.probe(self._kept(client, text), float(self._config.release.upgrade_timeout))
                self._refuse_when_ending()
                # Those that have ended meanwhile are not handed over, and an answer half read would be lost.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TOLD_SECONDS):
                        while not all(child.link.idle for child in self._children.values()):  # noqa: ASYNC110
                            await asyncio.sleep(0.01)
                for child in self._children.values():
                    if not child.link.idle:
                        raise ControlError(f"nothing was changed: process {child.pid} does not listen")
                self._may_start.clear()
                for child in [child for child in self._children.values() if not child.ready]:
                    child.kill()  # has never accepted: the new code starts its own
                    await child.wait()
                handover.execute(self._kept(client, text), HANDLED)
            except TlstunnelError as error:
                reason = str(error) if isinstance(error, ControlError) else f"nothing was changed: {error}"
                self._log.warning("not upgraded", reason=reason)
                raise ControlError(reason) from None
            finally:
                self._may_start.set()
                self._ready()

    def _kept(self, client: int | None, text: str | None) -> Handover:
        return Handover(
            version=__version__,
            generation=self._generation,
            slots=self._slots.kept(),
            children=[child.kept() for child in self._children.values() if child.ready],
            control_socket=self._control.kept() if self._control else None,
            echo=self._echo.kept() if self._echo else None,
            client=client,
            config=text,
        )

    async def _upgrade_for_signal(self) -> None:
        with contextlib.suppress(ControlError):  # the log has it
            await self.upgrade(None)

    async def _upgrade_for_command(self, _: Mapping[str, Any]) -> Mapping[str, Any]:
        client = CLIENT.get()
        await self.upgrade(client.fileno() if client is not None else None)
        return {}

    def _answer_upgrade(self, *, error: str = "", **facts: object) -> None:
        if self._before is not None:
            self._before.answer({"ok": False, "error": error} if error else {"ok": True, **facts})

    # --- the end ------------------------------------------------------------------------------------------------------

    async def _end_when_told(self, signals: "asyncio.Queue[signal.Signals]") -> None:
        number = await signals.get()
        self._ending = number.name
        self._log.info("ending", signal=number.name)
        self._notify.stopping()
        again = asyncio.ensure_future(signals.get())
        drained = asyncio.ensure_future(self._drained(number))
        await asyncio.wait((again, drained), return_when=asyncio.FIRST_COMPLETED)
        for task in (again, drained):
            task.cancel()

    async def _drained(self, number: signal.Signals) -> None:
        release = self._config.release
        wait, over = (0.0, SIGINT_SECONDS) if number == signal.SIGINT else (release.drain_wait, release.drain_over)
        await asyncio.sleep(wait)
        # Before the children's: who closes last has accepted what waits there.
        self._slots.close()
        children = list(self._children.values())
        for child in children:
            if not child.ready:
                child.kill()  # has never accepted
            else:
                child.finishing = True
                self._beside(child.tell("finish", linger=0.0, over=float(over)))
        if children:
            longest = over + self._config.timeouts.close + KILL_SECONDS
            await asyncio.wait([child.ended for child in children], timeout=longest)

    async def _kill_all(self) -> None:
        """End what is left: at once, but with a record of each connection where that is possible."""
        self._ending = self._ending or "start failed"
        for keeper in self._keepers.values():
            keeper.cancel()
        children = list(self._children.values())
        for child in children:
            if child.ready:
                self._beside(child.tell("stop"))
            else:
                child.kill()
        if children:
            _, late = await asyncio.wait([child.ended for child in children], timeout=KILL_SECONDS)
            for child in children:
                child.kill()
            if late:
                await asyncio.wait(late)

    async def _stay_alive(self) -> None:
        while every := self._notify.watchdog:
            self._notify.alive()
            await asyncio.sleep(every)

    async def _leave_beside(self) -> None:
        """End what is under way: a probe goes with the upgrade that has started it."""
        for task in self._told:
            task.cancel()
        await asyncio.gather(*self._told, return_exceptions=True)

    def _beside(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._told.add(task)
        task.add_done_callback(self._told.discard)
