"""The messages between the parent and its children.

A request has a reply, a notification has none. On the link, each message is a line with a JSON object, whose ``do`` is
the tag of its type (`tlstunnel.processes.link`). Unknown fields are ignored and new fields have a default, so that
different releases can talk to each other. Any other change, such as a new role of children, needs a new `FORMAT` and a
translation to and from the previous one (`tlstunnel.processes.previous`).

Tested by tests/unit/test_processes_link.py.
"""

from typing import Any, ClassVar, Generic, Literal, TypeVar

import msgspec

from tlstunnel.journal.style import AddressStyle
from tlstunnel.metrics.snapshot import Snapshot
from tlstunnel.plans.elsewhere import Sightings
from tlstunnel.plans.observer import Observed
from tlstunnel.state.ended_tags import EndedTag
from tlstunnel.state.throttles import ThrottleRule

FORMAT = 3
"""The version of these messages and of the handover."""


class LinkReply(msgspec.Struct, frozen=True):
    """The reply to a request."""


class Done(LinkReply, frozen=True):
    """The reply to a request that returns nothing."""


class Begun(LinkReply, frozen=True):
    """The process is ready to accept. `version` is its release."""

    version: str


class Prepared(LinkReply, frozen=True):
    """The new configuration is loaded. `changes` has a line for each change."""

    changes: list[str]


class Load(LinkReply, frozen=True):
    """The tunnels of a process, and its connections whose handshake is not complete.

    `metrics` are None from a release that sends `Measured` before. `counting` says where it counts what is counted
    together: "ledger", "local: REASON", or "" if it counts alone.
    """

    tunnels: int
    handshakes: int
    metrics: Snapshot | None = None
    counting: str = ""


class HistoryLoad(LinkReply, frozen=True):
    """The history that a ledger keeps in the file `path`, "" while it is not open, of so many `bytes`.

    `problem` is why nothing is written at the moment, or "". `last` is when its last minute began, in Unix time; None
    if it has none. `waiting` minutes are not written yet, and `lost` ones never will be.
    """

    path: str
    problem: str
    bytes: int = 0
    last: int | None = None
    waiting: int = 0
    lost: int = 0


class LedgerLoad(LinkReply, frozen=True):
    """What a ledger does. `answering` is what has the counts, such as "memory".

    `questions` were answered in the last second, `keys` and `leases` are what it holds now. `history` is None if it
    keeps none. It is `failing` if it does not reach the server that has the counts.
    """

    answering: str
    connections: int
    questions: float
    keys: int
    leases: int
    metrics: Snapshot
    history: HistoryLoad | None = None
    failing: bool = False


class TakenOver(LinkReply, frozen=True):
    """The ledger has taken over and answers. `processes` are those whose connections it has.

    `processes` is None if it counts elsewhere, and has taken nothing: the processes have to be connected to it.
    """

    processes: list[int] | None


ReplyT = TypeVar("ReplyT", bound=LinkReply)


class Request(msgspec.Struct, Generic[ReplyT], frozen=True, tag_field="do"):
    """A message that has a reply. `reply` is the type of the reply."""

    reply: ClassVar[type[LinkReply]] = Done


class Notification(msgspec.Struct, frozen=True, tag_field="do"):
    """A message without a reply. A receiver that does not know its type ignores it."""


# --- commands, to a child that carries them out, and from the admin process -------------------------------------------


class Told(LinkReply, frozen=True):
    """The result of a command: its fields."""

    fields: dict[str, Any]


class Ask(Request[Told], frozen=True, tag="ask"):
    """Carry out a command of `tlstunnel.commands`, for `who`.

    `tunnels` are open at the moment, by site; only the admin process is told.
    """

    command: str
    fields: dict[str, Any]
    who: str
    tunnels: dict[str, int] = {}

    reply: ClassVar[type[LinkReply]] = Told


# --- parent to child --------------------------------------------------------------------------------------------------


class Begin(Request[Begun], frozen=True, tag="begin"):
    """Load the configuration, without accepting yet.

    `name` is what ``ps`` shows, `invocation` comes from the command line, and `config` is the text of the configuration
    file. A `quiet` process logs no warnings, because another one with the same configuration does. `instance` is random
    and stands for this tunnel among all machines that count together. It stays the same through upgrades. So does
    `log_key`, with which addresses are hashed; `tlstunnel.journal.style` describes it, `log_fields` and `log_address`.
    `log_file` is the path of a file that the log is appended to, or "".
    """

    format: int
    name: str
    invocation: dict[str, Any] = msgspec.field(name="wanted")
    config: str | None
    log_format: Literal["text", "json"]
    opened: bool
    quiet: bool
    instance: str = ""
    log_file: str = ""
    log_fields: list[str] | None = None
    log_address: AddressStyle = "full"
    log_key: str = ""

    reply: ClassVar[type[LinkReply]] = Begun


class ReopenLog(Notification, frozen=True, tag="reopen log"):
    """Open the log's file again: the old one may have been renamed."""


class Respond(Request[Done], frozen=True, tag="respond"):
    """Respond to polls, as long as the event loop has run within the last `loop_seconds`.

    Two descriptors come with the message: the socket of the polls, and a memory file for the stacks of the threads
    (`tlstunnel.processes.pulse`). Earlier releases refuse the request.
    """

    loop_seconds: float


class Listeners(Request[Done], frozen=True, tag="listeners"):
    """Take these listening sockets. Their descriptors come with the message, in the same order."""

    numbers: list[int]
    written: list[str]


class Serve(Request[Done], frozen=True, tag="serve"):
    """Accept at the listeners with these `numbers`, and at no others; close those that are not `kept`."""

    kept: list[int]
    numbers: list[int]


class Prepare(Request[Prepared], frozen=True, tag="prepare"):
    """Load a new configuration, and continue to serve the old one."""

    config: str | None

    reply: ClassVar[type[LinkReply]] = Prepared


class Commit(Request[Done], frozen=True, tag="commit"):
    """Serve new connections with the configuration that was prepared."""


class Abandon(Request[Done], frozen=True, tag="abandon"):
    """Discard the configuration that was prepared."""


class Drain(Request[Done], frozen=True, tag="drain"):
    """Accept no more, and exit once no tunnel is open.

    Tunnels still open after `after` seconds (None: no limit) are ended one by one over `over` seconds (None: as
    configured).
    """

    after: float | None
    over: float | None


class AnnounceDrain(Request[Done], frozen=True, tag="announce drain"):
    """Fail health checks: a shutdown has begun. Go on accepting until `Drain`. Earlier releases refuse the request."""


class Stop(Request[Done], frozen=True, tag="stop"):
    """Close everything at once, and exit."""


class Status(Request[Load], frozen=True, tag="status"):
    """Report the load, after the newest metrics. If they are `scraped`, measure the lag of the loop for a while."""

    scraped: bool = False

    reply: ClassVar[type[LinkReply]] = Load


class Count(Request[Done], frozen=True, tag="count"):
    """Count at the ledger at the other end of the socket that comes with the message; alone, if there is none.

    `connection` is the connection's number.
    """

    connection: int = 0


class Observe(Request[Done], frozen=True, tag="observe"):
    """Report what connections of these sites look like, once a minute; none to report nothing.

    Addresses are counted with `key`, which is the same for all processes.
    """

    key: bytes = b""
    sites: list[str] = []


class Throttle(Request[Done], frozen=True, tag="throttle"):
    """Use these throttles, and no others, from now on."""

    rules: list[ThrottleRule]


# --- parent to ledger -------------------------------------------------------------------------------------------------


class Connect(Request[Done], frozen=True, tag="connect"):
    """Answer the questions of `process`, which has the other end of the socket that comes with the message."""

    process: int


class HandOver(Request[Done], frozen=True, tag="hand over"):
    """Pause, and send everything through the socket that comes with the message, to the next ledger."""


class TakeOver(Request[TakenOver], frozen=True, tag="take over"):
    """Receive what the previous ledger sends through the socket that comes with the message, and answer."""

    reply: ClassVar[type[LinkReply]] = TakenOver


class Resume(Request[Done], frozen=True, tag="resume"):
    """Answer again: the next ledger has failed to take over."""


class LedgerStatus(Request[LedgerLoad], frozen=True, tag="ledger status"):
    """Report what the ledger does."""

    reply: ClassVar[type[LinkReply]] = LedgerLoad


class Sampled(Notification, frozen=True, tag="sampled"):
    """What the sites of this tunnel have used, once a second.

    `time` is Unix time. `sites` has those that have changed since the last one: their open tunnels, and then the totals
    of all processes (`tlstunnel.state.history.samples.Counts`), which began at zero `age` seconds ago. They are all
    sites if it is `whole`; the others then exist no more.
    """

    time: float
    age: float
    sites: dict[str, list[int]]
    whole: bool


class TellEnded(Request[Done], frozen=True, tag="tell ended"):
    """Tell other machines which tag was ended. The reply comes once the server knows it."""

    ended: EndedTag


class TagsEnded(Notification, frozen=True, tag="tags ended"):
    """What other machines have ended. The ledger sends it to the parent, and the parent to the serving processes."""

    ended: list[EndedTag]


# --- parent to admin --------------------------------------------------------------------------------------------------


class Administer(Request[Done], frozen=True, tag="administer"):
    """Begin. Addresses are counted with `key`."""

    key: bytes


class Adopt(Request[Done], frozen=True, tag="adopt"):
    """Go on with this configuration, which serving processes have loaded already."""

    config: str | None


class ServeAdmin(Request[Done], frozen=True, tag="serve admin"):
    """Serve the admin address at the socket that comes with the message; nowhere, if there is none."""


class Recorded(Notification, frozen=True, tag="recorded"):
    """Records of connections that have ended, and how many were `left_out`; also from the parent to the admin process.

    Serving processes send them for a while after the command `WatchRecords`.
    """

    records: list[dict[str, Any]]
    left_out: int = 0


class MinuteOver(Notification, frozen=True, tag="minute over"):
    """A minute is over, and the history has it. `tunnels` are open now, by site.

    `descriptors` is how much of its descriptors the fullest process uses, `memory` that of the machine, both 0 to 1.
    """

    tunnels: dict[str, int]
    descriptors: float
    memory: float


class Elected(Notification, frozen=True, tag="elected"):
    """Until when this machine is elected to send notices, by `tlstunnel.state.clock`; 0 if it is not.

    The ledger sends it to the parent, and the parent to the admin process, at each renewal and change. `delivered` is
    what machines have delivered that was not told before (`tlstunnel.plans.duty`). `holder` is how the elected machine
    is shown, "" if there is none or it is not known.
    """

    until: float
    delivered: list[str] = []
    holder: str = ""


class Delivered(Notification, frozen=True, tag="delivered"):
    """What this machine has delivered. The admin process sends it to the parent, and the parent to the ledger."""

    deliveries: list[str]


# --- child to parent --------------------------------------------------------------------------------------------------


class LedgerLost(Notification, frozen=True, tag="ledger lost"):
    """The connection to the ledger with this number has ended; send another one."""

    connection: int = 0


class Leaving(Request[Done], frozen=True, tag="leaving"):
    """The process drains because of a signal; start another one in its place."""


class Measured(Notification, frozen=True, tag="measured", omit_defaults=True):
    """The metrics of the process: counters that have changed, and everything else.

    Sent at most once a second after a change, when they are read, and before the process exits.

    `sites` has what those that have changed have used (`tlstunnel.metrics.usage.FIELDS`), `cpu` the microseconds of CPU
    time since the process has begun to serve. `connections` are open, of at most `most_connections`.
    """

    metrics: Snapshot
    sites: dict[str, list[int]] = {}
    cpu: int = 0
    connections: int = 0
    most_connections: int = 0


class Seen(Notification, frozen=True, tag="seen"):
    """What a process has seen in the last minute, by site; also from the parent to the admin process."""

    sites: dict[str, Observed]


class SeenHere(Notification, frozen=True, tag="seen here"):
    """What this machine has seen in a minute, from the admin process to the parent, and from it to the ledger."""

    sites: Sightings


class SeenElsewhere(Notification, frozen=True, tag="seen elsewhere"):
    """What another machine has seen in a minute, from the ledger to the parent, and from it to the admin process."""

    sites: Sightings


class Throttled(Notification, frozen=True, tag="throttled"):
    """From the admin process: these throttles hold now, and no others."""

    rules: list[ThrottleRule]
