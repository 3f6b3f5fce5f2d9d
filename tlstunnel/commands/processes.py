"""The commands about the processes of a tunnel.

Tested by tests/unit/test_commands.py.
"""

from typing import Any, ClassVar, Literal

import msgspec

from tlstunnel.commands.command import Command


class ReloadResult(msgspec.Struct, frozen=True):
    """What has changed, a line for each change."""

    changes: list[str]


class ProcessStatus(msgspec.Struct, frozen=True):
    """A serving process. `seconds` is its age; `pss_kib` is its proportional set size, if that can be read.

    `tunnels` and `handshakes` are None if it does not respond. `counting` says where it counts what is counted
    together: "ledger", "local: REASON", or "" if it counts alone.
    """

    process: int
    place: int
    generation: int
    version: str
    seconds: float
    state: Literal["serving", "draining", "not responding"]
    tunnels: int | None
    handshakes: int | None
    pss_kib: int | None
    counting: str = ""


class HistoryStatus(msgspec.Struct, frozen=True):
    """The history, in a file of so many `bytes`. `problem` is why nothing is written at the moment, or "".

    `last` is when its last minute began, in Unix time; None if it has none. `waiting` minutes are not written yet, and
    `lost` ones, since the ledger began, never will be.
    """

    path: str
    problem: str
    bytes: int
    last: int | None
    waiting: int
    lost: int


class LedgerStatus(msgspec.Struct, frozen=True):
    """The ledger, which counts for the serving processes. `seconds` is its age.

    `answering` is what has the counts, such as "memory". The last six are None if it does not respond, and `history` is
    None too if it keeps none.
    """

    process: int
    generation: int
    version: str
    seconds: float
    state: Literal["counting", "not responding"]
    pss_kib: int | None
    answering: str | None
    connections: int | None
    questions_per_second: float | None
    keys: int | None
    leases: int | None
    history: HistoryStatus | None = None


class AdminStatus(msgspec.Struct, frozen=True):
    """The admin process, which assesses sites. `seconds` is its age."""

    process: int
    generation: int
    version: str
    seconds: float
    state: Literal["assessing", "not responding"]
    pss_kib: int | None


class ThrottleStatus(msgspec.Struct, frozen=True):
    """A throttle: at most `amount` new handshakes per `window` seconds, until a Unix time.

    They are those of a site, or of so many `addresses` at it if that is not 0.
    """

    site: str
    amount: int
    window: int
    until: float
    addresses: int


class ElectionStatus(msgspec.Struct, frozen=True):
    """Which of several machines sends notices: this one, or the one shown as `holder`.

    `holder` is "" if no machine is elected at the moment, or it is not known which one is. Notices wait then.
    """

    here: bool
    holder: str


class StatusResult(msgspec.Struct, frozen=True):
    """The parent, the serving processes, and the ledger if there is one.

    `ending` is the signal that started a shutdown, empty without one.

    `metrics` are the sums over all processes (docs/metrics.md). `shortages` say in a sentence each what runs short.
    `throttles` are those that hold. `election` is None if no other machine may send notices. `dashboard` is
    the address of the dashboard, "" if there is none, and `dashboard_problem` is why nothing listens there, or "".
    """

    version: str
    generation: int
    process: int
    ending: str
    listening: list[str]
    processes: list[ProcessStatus]
    pss_kib: int | None
    metrics: dict[str, Any]
    ledger: LedgerStatus | None = None
    shortages: list[str] = []
    admin: AdminStatus | None = None
    throttles: list[ThrottleStatus] = []
    election: ElectionStatus | None = None
    dashboard: str = ""
    dashboard_problem: str = ""


class ReadyResult(msgspec.Struct, frozen=True):
    """Whether new connections are accepted. `reason` is why not, or ""."""

    ready: bool
    reason: str = ""


class Ended(msgspec.Struct, frozen=True):
    """All tunnels have ended; the program exits."""


class Upgraded(msgspec.Struct, frozen=True):
    """The next release has taken over. It is the one that reports it."""

    version: str = ""
    before: str = ""
    generation: int = 0


class Reload(Command[ReloadResult], frozen=True):
    """Read the configuration, the certificates and the lists again."""

    name: ClassVar[str] = "reload"
    result: ClassVar[type[msgspec.Struct]] = ReloadResult
    acts: ClassVar[bool] = True


class Upgrade(Command[Upgraded], frozen=True):
    """Continue with the release that is installed now. That release reports success."""

    name: ClassVar[str] = "upgrade"
    result: ClassVar[type[msgspec.Struct]] = Upgraded
    acts: ClassVar[bool] = True


class Status(Command[StatusResult], frozen=True):
    """Report the processes.

    `metrics` are those of all sites, which the parent needs half a second for if they are ten thousand, those that the
    metrics show (`admin.metric_sites`), or none.
    """

    name: ClassVar[str] = "status"
    result: ClassVar[type[msgspec.Struct]] = StatusResult

    metrics: Literal["all", "shown", "none"] = "all"


class Ready(Command[ReadyResult], frozen=True):
    """Report whether new connections are accepted: that ends when a drain begins, although some still are then."""

    name: ClassVar[str] = "ready"
    result: ClassVar[type[msgspec.Struct]] = ReadyResult


class Drain(Command[Ended], frozen=True):
    """Drain all tunnels as configured in ``[release]``, and exit."""

    name: ClassVar[str] = "drain"
    result: ClassVar[type[msgspec.Struct]] = Ended
    acts: ClassVar[bool] = True


class Stop(Command[Ended], frozen=True):
    """Drain all tunnels within seconds, and exit."""

    name: ClassVar[str] = "stop"
    result: ClassVar[type[msgspec.Struct]] = Ended
    acts: ClassVar[bool] = True
