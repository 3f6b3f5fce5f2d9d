"""The edge stage: call a site's worker with an upgrade request, and interpret what it returns.

Tested by tests/promises/test_edge_workers.py.
"""

import time
from dataclasses import dataclass
from typing import Literal

from tlstunnel.addresses import OriginAddress
from tlstunnel.edge.destinations import Destinations, refuse_destination
from tlstunnel.edge.limits import LogFields
from tlstunnel.edge.values import to_worker_request
from tlstunnel.edge.worker import MAX_LATE, Call, Worker
from tlstunnel.handshake import request as handshake
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.forwarding import NO_EDITS, Edits
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Event, Reason, WorkerOutcome
from tlstunnel.journal.logger import structlog
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry
from tlstunnel.origins.pool import Pool
from tlstunnel.sockets.channel import Channel, ClientGone

RETRY_AFTER = ((b"Retry-After", b"1"),)

_EVENTS = {
    WorkerOutcome.FAILED: Event.WORKER_FAILED,
    WorkerOutcome.TIMED_OUT: Event.WORKER_TIMED_OUT,
    WorkerOutcome.BUSY: Event.WORKER_BUSY,
}
"""The event for each outcome in which the worker returned nothing."""


@dataclass(frozen=True, slots=True)
class Directions:
    """Where to send a request, and in which form.

    `request` is the request as the worker changed it, `edits` are the changes of its head, and `outcome` is for the
    record. `pool` has the origin at `address`; both are None if the worker chose no origin. `until` is the Unix time at
    which the tunnel ends, None for no limit. `tags` are each "name=value". `log` is for the record.
    """

    request: handshake.UpgradeRequest
    edits: Edits
    outcome: WorkerOutcome
    pool: Pool | None = None
    address: OriginAddress | None = None
    until: float | None = None
    tags: tuple[str, ...] = ()
    log: LogFields = ()

    def refuse(self, reason: str) -> Refusal:
        """Return the refusal if the origin's name resolves to an address that the worker may not choose."""
        return refuse_destination(reason)


class Edge:
    """A site's `worker`, which may take `timeout` seconds, and the `destinations` that it may choose.

    With `on_error` "forward", a request is forwarded unchanged if the worker fails or takes too long. `metrics` count
    the outcomes.
    """

    def __init__(
        self,
        worker: Worker,
        destinations: Destinations,
        *,
        timeout: float,
        on_error: Literal["refuse", "forward"],
        metrics: Registry,
    ) -> None:
        self.worker = worker
        self.destinations = destinations
        self.timeout = timeout
        self._forwards = on_error == "forward"
        self._counts = metrics[families.EDGE_REQUESTS]

    async def call(self, request: handshake.UpgradeRequest, connection: Connection, client: Channel) -> Directions:
        """Call the worker, and wait for its result until the deadline of the `client`.

        Raises Refusal, and ClientGone if the client disconnects meanwhile.
        """
        request_id, wakeup = connection.request_id, client.wakeup
        if self.worker.late >= MAX_LATE:
            busy = Refusal(503, Reason.WORKER_BUSY, "the edge worker is busy", RETRY_AFTER)
            return self._handle_failure(request, request_id, busy, WorkerOutcome.BUSY, late=self.worker.late)
        call = self.worker.call(to_worker_request(request, connection, time.time()), wakeup.fire)
        try:
            while not call.finished:
                if client.check_gone():
                    raise ClientGone
                await wakeup.wait()
        except TimeoutError:
            text = f"the edge worker did not respond within {self.timeout:g} s"
            late = Refusal(504, Reason.WORKER_TIMED_OUT, text)
            return self._handle_failure(request, request_id, late, WorkerOutcome.TIMED_OUT, seconds=float(self.timeout))
        finally:
            call.close()
        return self._to_directions(request, call, request_id)

    async def close(self) -> None:
        """Stop resolving the names that the worker has chosen."""
        await self.destinations.close()

    def _count(self, outcome: WorkerOutcome) -> None:
        self._counts.add(self.worker.reference, outcome)

    def _to_directions(self, request: handshake.UpgradeRequest, call: Call, request_id: str) -> Directions:
        result = call.outcome
        if result is None:
            failure = Refusal(500, Reason.WORKER_FAILED, "the edge worker failed")
            forwards = self._forwards and not call.invalid
            return self._handle_failure(
                request, request_id, failure, WorkerOutcome.FAILED, forwards=forwards, exception=call.failure
            )
        if isinstance(result, Refusal):
            self._count(WorkerOutcome.REPLIED)
            raise result
        pool = None if result.address is None else self.destinations.pool(result.address)
        self._count(WorkerOutcome.FORWARDED)
        if result.until is not None and result.until <= time.time():
            expired = Refusal(403, Reason.WORKER_EXPIRED, "the time until which the tunnel may be open is over")
            expired.log = result.log
            raise expired
        return Directions(
            result.request,
            result.edits,
            WorkerOutcome.FORWARDED,
            pool,
            result.address,
            result.until,
            result.tags,
            result.log,
        )

    def _handle_failure(
        self,
        request: handshake.UpgradeRequest,
        request_id: str,
        refusal: Refusal,
        outcome: WorkerOutcome,
        *,
        forwards: bool | None = None,
        **facts: object,
    ) -> Directions:
        """Log and count a failure; raise `refusal`, or return directions that forward the request unchanged."""
        forwards = self._forwards if forwards is None else forwards
        going = {"forwarded": True} if forwards else {}
        structlog.get_logger().warning(_EVENTS[outcome], id=request_id, worker=self.worker.reference, **facts, **going)
        self._count(outcome)
        if not forwards:
            raise refusal
        return Directions(request, NO_EDITS, outcome)
