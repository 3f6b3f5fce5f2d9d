"""What the parent and its children say to each other.

A request has a reply; a notification has none. On the link each is a JSON object on a line, whose ``do`` is the tag of
its type (`tlstunnel.processes.link`). Fields that are not known are ignored, and a new field has a default, so that
releases can talk to each other. What cannot be said that way, and a new role of children, needs a new `FORMAT` and a
translation to and from the one before (`tlstunnel.processes.previous`).
"""

from typing import Any, ClassVar, Generic, Literal, TypeVar

import msgspec

from tlstunnel.metrics.snapshot import Snapshot

FORMAT = 2
"""Of these messages and of the handover."""


class LinkReply(msgspec.Struct, frozen=True):
    """What a request is replied to with."""


class Done(LinkReply, frozen=True):
    """It is done, and there is nothing to say about it."""


class Begun(LinkReply, frozen=True):
    """The process could serve. `version` is its release."""

    version: str


class Prepared(LinkReply, frozen=True):
    """The new configuration is loaded; `changes` are one line each."""

    changes: list[str]


class Load(LinkReply, frozen=True):
    """What a process has: its tunnels, and the connections whose handshake is not done.

    `metrics` are None from a release without them.
    """

    tunnels: int
    handshakes: int
    metrics: Snapshot | None = None


ReplyT = TypeVar("ReplyT", bound=LinkReply)


class Request(msgspec.Struct, Generic[ReplyT], frozen=True, tag_field="do"):
    """Asks the other side to do something; `reply` is the type of what comes back."""

    reply: ClassVar[type[LinkReply]] = Done


class Notification(msgspec.Struct, frozen=True, tag_field="do"):
    """Tells the other side something; it is ignored where the receiver does not know its type."""


# --- parent to child --------------------------------------------------------------------------------------------------


class Begin(Request[Begun], frozen=True, tag="begin"):
    """Load what is to be served, without accepting yet.

    `name` is shown by ``ps``; `wanted` is what the command line asked for, `config` the text of the configuration file.
    A `quiet` process leaves warnings to another that has the same.
    """

    format: int
    name: str
    invocation: dict[str, Any] = msgspec.field(name="wanted")
    config: str | None
    log_format: Literal["text", "json"]
    opened: bool
    quiet: bool

    reply: ClassVar[type[LinkReply]] = Begun


class Listeners(Request[Done], frozen=True, tag="listeners"):
    """Hold these listening sockets, whose descriptors come along in the same order."""

    numbers: list[int]
    written: list[str]


class Serve(Request[Done], frozen=True, tag="serve"):
    """Accept at the listeners with these `numbers` and at no others; close those that are not `kept`."""

    kept: list[int]
    numbers: list[int]


class Prepare(Request[Prepared], frozen=True, tag="prepare"):
    """Load a new configuration and go on serving the old one."""

    config: str | None

    reply: ClassVar[type[LinkReply]] = Prepared


class Commit(Request[Done], frozen=True, tag="commit"):
    """Serve new connections with what was prepared."""


class Abandon(Request[Done], frozen=True, tag="abandon"):
    """Forget what was prepared."""


class Drain(Request[Done], frozen=True, tag="drain"):
    """Accept no more, and exit once no tunnel is left.

    Those that are left `after` seconds (None: never) are ended one after another, spread `over` so many seconds (None:
    as configured).
    """

    after: float | None
    over: float | None


class Stop(Request[Done], frozen=True, tag="stop"):
    """End everything at once, and exit."""


class Status(Request[Load], frozen=True, tag="status"):
    """Report the load."""

    reply: ClassVar[type[LinkReply]] = Load


# --- child to parent --------------------------------------------------------------------------------------------------


class Leaving(Request[Done], frozen=True, tag="leaving"):
    """Someone else told the process to end: another has to take its place."""


class Measured(Notification, frozen=True, tag="measured"):
    """What the process has counted: once in a while when something has changed, and before it exits."""

    metrics: Snapshot
