"""The commands about single tunnels.

Tested by tests/unit/test_commands.py.
"""

from typing import Annotated, ClassVar, Generic, Literal

import msgspec

from tlstunnel.commands.command import Command, ResultT

MOST_LISTED = 1_000
"""Tunnels in one result."""

Order = Literal["age", "rate", "up", "down", "site", "client", "origin"]
"""What tunnels are sorted by: the oldest, the busiest or the largest first; texts in alphabetical order."""


class TunnelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An open tunnel.

    `id` is that of its record in the log, `process` is the process that has it. `up` and `down` are bytes from the
    client to the origin, and back; `rate` is bytes per second both ways since the tunnel was last looked at, or since
    it began. `until` is when it will be ended, None if that is not planned. `tags` come from the edge worker.
    """

    id: str
    process: int
    site: str
    client: str
    origin: str
    path: str
    opened: float
    seconds: float
    up: int
    down: int
    rate: float
    sni: str = ""
    tls_version: str = ""
    cipher: str = ""
    ja4: str = ""
    peer: str = ""
    user_agent: str = ""
    web_origin: str = ""
    client_subject: str = ""
    edge: str = ""
    until: float | None = None
    draining: bool = False
    tags: dict[str, str] = {}


class TunnelsResult(msgspec.Struct, frozen=True, kw_only=True):
    """Open tunnels in the order that was asked for. `total` match the filter.

    `next` continues the list as `after`, "" at its end. `silent` processes have not responded, so theirs are missing.
    """

    now: float
    total: int
    tunnels: list[TunnelStatus] = []
    next: str = ""
    silent: list[int] = []


class TunnelsCommand(Command[ResultT], Generic[ResultT], frozen=True, kw_only=True):
    """A command about the open tunnels that match all filters which are not empty.

    `client` is an address or a network. `tag` is "name=value", or "name" for any value. `older` is the least age in
    seconds.
    """

    id: str = ""
    site: str = ""
    client: str = ""
    origin: str = ""
    tag: str = ""
    older: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Tunnels(TunnelsCommand[TunnelsResult], frozen=True, kw_only=True):
    """List the open tunnels that match all filters which are not empty.

    With a `limit` of 0 they are only counted. Where a list that is sorted by what changes, such as the rate, goes on
    with `after`, a tunnel may be there twice or not at all.
    """

    name: ClassVar[str] = "tunnels"
    result: ClassVar[type[msgspec.Struct]] = TunnelsResult

    sort: Order = "age"
    limit: Annotated[int, msgspec.Meta(ge=0, le=MOST_LISTED)] = 100
    after: str = ""


class TunnelsEnded(msgspec.Struct, frozen=True, kw_only=True):
    """So many tunnels of this machine are being ended. `announced` means that other machines have been told.

    `problem` is why they have not been told yet, or "".
    """

    number: int
    announced: bool = False
    silent: list[int] = []
    problem: str = ""


class EndTunnels(TunnelsCommand[TunnelsEnded], frozen=True, kw_only=True):
    """End the tunnels that match all filters which are not empty. At least one filter must be given.

    `why` is in the record of each. With a tag, tunnels on other machines that share a server end too. Without an id, a
    client or a tag with its value, whoever asks has to `confirm` that all of a site, or whatever matches, are meant.
    """

    name: ClassVar[str] = "end tunnels"
    result: ClassVar[type[msgspec.Struct]] = TunnelsEnded
    acts: ClassVar[bool] = True

    why: str = ""
    confirm: bool = False
