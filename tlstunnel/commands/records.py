"""The commands about connections that have ended: refusals with their reasons, and records as they are written.

Tested by tests/unit/test_commands.py.
"""

from typing import Any, ClassVar, Literal

import msgspec

from tlstunnel.commands.command import Command

Decision = Literal["passed", "not configured", "logged", "refused", "ended", "not reached"]


class StageStatus(msgspec.Struct, frozen=True):
    """What a stage decided about a connection: `stage` is a name such as "tls" or "firewall: rate limits".

    With "ended", the connection ended there, and the tunnel did not refuse it. With "not configured", the site has no
    such check now. `detail` is "" if there is no more to say.
    """

    stage: str
    decision: Decision
    detail: str = ""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that ended without a tunnel. `record` has the fields of its line in the log, and its `event`.

    `id` is that of the record. One that ended before its TLS handshake was complete has none there, and gets one here.
    `advice` says in a sentence or two how to change what refused it, and `document` names the page that explains it.
    """

    id: str = ""
    at: float
    process: int
    record: dict[str, Any]
    stages: list[StageStatus] = []
    advice: str = ""
    document: str = ""


class RefusalsResult(msgspec.Struct, frozen=True, kw_only=True):
    """The latest refusals of all processes, the latest first. Each process keeps a few hundred."""

    now: float
    refusals: list[Refusal] = []
    silent: list[int] = []


class Refusals(Command[RefusalsResult], frozen=True, kw_only=True):
    """Report the latest refusals: all, those of a site, or those with a `reason` or a `client`."""

    name: ClassVar[str] = "refusals"
    result: ClassVar[type[msgspec.Struct]] = RefusalsResult

    id: str = ""
    site: str = ""
    reason: str = ""
    client: str = ""
    limit: int = 100


class Watched(msgspec.Struct, frozen=True):
    """So many processes send records from now on."""

    processes: int


class WatchRecords(Command[Watched], frozen=True, kw_only=True):
    """Send records of connections that have ended to the admin process, for so many seconds.

    A process sends at most `limit` per second, and how many it has left out. Only the admin process can ask for it.
    """

    name: ClassVar[str] = "watch records"
    result: ClassVar[type[msgspec.Struct]] = Watched

    seconds: float = 10.0
    limit: int = 50
