"""The commands about usage. The process with the role ADMIN carries them out (`tlstunnel.processes.admin`).

Tested by tests/unit/test_commands_usage.py.
"""

from typing import ClassVar

import msgspec

from tlstunnel.commands.command import Command
from tlstunnel.plans.values import Assessment, Notice


class Throttled(msgspec.Struct, frozen=True, kw_only=True):
    """A throttle: new handshakes of a site, or of `addresses` at this site, above `rate` get a 429 until it ends.

    `who` asked for it, and `why`. `notice` is the id of the notice that the site got before, "" for one against abuse.
    """

    site: str
    addresses: tuple[str, ...] = ()
    rate: str
    since: float
    until: float
    why: str
    who: str
    notice: str = ""
    abuse: bool = False


class Muted(msgspec.Struct, frozen=True):
    """A site that no notices are sent about until then. `who` has asked for it."""

    site: str
    until: float
    since: float
    who: str


class MachineUse(msgspec.Struct, frozen=True):
    """How much of each the machine uses, 0 to 1: its CPUs, the descriptors of the fullest process, memory."""

    cpu: float
    descriptors: float
    memory: float


class UsageResult(msgspec.Struct, frozen=True, kw_only=True):
    """Where the sites stand, by name. `now` is when this was asked.

    `assessed` is when they were assessed last, None if that has not happened since the start; then `assessments` are
    those from before. `machine` is None until it was measured. `warnings` are sentences for the operator, such as that
    descriptors run out. `problem` is why nothing is known at the moment, or "".

    `folder` is the state folder. `tunnels` has the number of open tunnels of every configured site, with and without a
    plan, as far as that is known.
    """

    now: float
    assessed: float | None = None
    assessments: tuple[Assessment, ...] = ()
    throttles: tuple[Throttled, ...] = ()
    mutes: tuple[Muted, ...] = ()
    machine: MachineUse | None = None
    warnings: tuple[str, ...] = ()
    problem: str = ""
    folder: str = ""
    tunnels: dict[str, int] = {}


class DeliveryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a delivery: `channel` is "log", "webhook" or "mail", `address` is "" for those of the operator.

    `state` is "pending", "accepted" or "given up". `next_at` is when it is tried again, None if it is not.
    """

    channel: str
    address: str
    state: str
    attempts: int
    attempted: float | None = None
    next_at: float | None = None
    reason: str = ""


class NoticeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A notice and what became of it. `accepted`: a webhook or a mail server has it, and not only the log."""

    notice: Notice
    accepted: bool
    acknowledged: float | None = None
    acknowledged_by: str = ""
    deliveries: tuple[DeliveryStatus, ...] = ()


class NoticesResult(msgspec.Struct, frozen=True, kw_only=True):
    """The notices, the latest first."""

    now: float
    notices: tuple[NoticeStatus, ...] = ()


class Acknowledged(msgspec.Struct, frozen=True):
    """The notice was acknowledged."""

    id: str


class Released(msgspec.Struct, frozen=True):
    """So many throttles of the site were lifted."""

    site: str
    throttles: int


class Usage(Command[UsageResult], frozen=True):
    """Report where sites stand: all of them, or the one that has the name `site`."""

    name: ClassVar[str] = "usage"
    result: ClassVar[type[msgspec.Struct]] = UsageResult

    site: str = ""


class Notices(Command[NoticesResult], frozen=True):
    """List the latest notices, at most `most` of them: all, or those about one site."""

    name: ClassVar[str] = "notices"
    result: ClassVar[type[msgspec.Struct]] = NoticesResult

    site: str = ""
    most: int = 100


class AckNotice(Command[Acknowledged], frozen=True):
    """Note that a notice was read: no further one is sent about its standing while it lasts."""

    name: ClassVar[str] = "ack"
    result: ClassVar[type[msgspec.Struct]] = Acknowledged
    acts: ClassVar[bool] = True

    id: str


class MuteSite(Command[Muted], frozen=True):
    """Send no notices about a site for so many seconds; 0 ends that."""

    name: ClassVar[str] = "mute"
    result: ClassVar[type[msgspec.Struct]] = Muted
    acts: ClassVar[bool] = True

    site: str
    seconds: float


class ThrottleSite(Command[Throttled], frozen=True, kw_only=True):
    """Answer new handshakes of a site, or of `addresses` at this site, above `rate` with 429 for so many seconds.

    `rate` is written as in rate limits, such as "10/second". It is refused unless a notice to the site's contact was
    delivered, or it is against `abuse`.
    """

    name: ClassVar[str] = "throttle"
    result: ClassVar[type[msgspec.Struct]] = Throttled
    acts: ClassVar[bool] = True

    site: str
    rate: str
    seconds: float
    why: str
    abuse: bool = False
    addresses: tuple[str, ...] = ()


class ReleaseSite(Command[Released], frozen=True):
    """Lift all throttles of a site."""

    name: ClassVar[str] = "release"
    result: ClassVar[type[msgspec.Struct]] = Released
    acts: ClassVar[bool] = True

    site: str
