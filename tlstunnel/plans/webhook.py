"""Deliver a notice to a URL, as Standard Webhooks says.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md

The client is h11 over asyncio's streams. h11 is a dependency already, and is used by httpx and uvicorn. It is enough,
since the status and `Retry-After` are all that counts: the body of the response is never read, so its size does not
matter. One deadline holds for everything, because a coroutine can be cancelled anywhere. The standard library's client
in a thread cannot: a server that sends one byte in a while keeps the thread for as long as it likes. Redirects are not
followed, and proxies of the environment are not used.
"""

import asyncio
import base64
import hashlib
import hmac
import ssl
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import SplitResult, urlsplit

import h11
import msgspec

import tlstunnel
from tlstunnel.escaping import printable
from tlstunnel.plans.connection import connect, describe_failure, make_context
from tlstunnel.plans.credentials import derive_secret
from tlstunnel.plans.notices import Outcome, Result
from tlstunnel.plans.templates import Text
from tlstunnel.plans.values import Figures, Notice

TIMEOUT = 20.0
"""Seconds for a delivery, from the look-up of the name to the response. Standard Webhooks suggests 15 to 30."""

MAX_HEAD_BYTES = 16_384
MAX_RECEIVED_BYTES = 65_536
"""Of all heads together, since a server can send any number of informational responses."""


class Payload(msgspec.Struct, frozen=True):
    """The body of the request, in JSON. `type` is "notice." and the standing, such as "notice.suspected_abuse"."""

    type: str
    timestamp: str
    data: "Data"


class Data(msgspec.Struct, frozen=True):
    """The notice. `contact` is where it goes; `subject` and `text` are what a mail would say, `plot` its attachment.

    That is a PNG in base64. Without one there is no such key.
    """

    id: str
    site: str
    plan: str
    next_plan: str
    standing: str
    since: str
    sentence: str
    figures: Figures
    recipient: str
    contact: str
    language: str
    subject: str
    text: str
    plot: str | msgspec.UnsetType = msgspec.UNSET


def make_body(notice: Notice, text: Text, plot: bytes | None = None) -> bytes:
    """Return the body of the request about a notice. It is the same for each attempt. `plot` is a PNG."""
    assessment = notice.assessment
    data = Data(
        id=notice.id,
        site=notice.site,
        plan=assessment.plan,
        next_plan=assessment.next_plan,
        standing=notice.standing.value,
        since=_format_time(assessment.since),
        sentence=assessment.sentence,
        figures=assessment.figures,
        recipient=notice.recipient,
        contact=notice.address,
        language=notice.language,
        subject=text.subject,
        text=text.body,
        plot=base64.b64encode(plot).decode() if plot is not None else msgspec.UNSET,
    )
    kind = notice.standing.replace(" ", "_")
    return msgspec.json.encode(Payload(f"notice.{kind}", _format_time(notice.created), data))


def sign(secrets: Sequence[bytes], identifier: str, timestamp: int, body: bytes) -> str:
    """Return the value of `webhook-signature`: a signature by each secret."""
    content = f"{identifier}.{timestamp}.".encode() + body
    digests = [hmac.digest(secret, content, hashlib.sha256) for secret in secrets]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


class Webhook:
    """Delivers notices to URLs. `secrets` are those of `credentials.load_secrets`."""

    def __init__(
        self,
        secrets: Sequence[bytes],
        *,
        context: ssl.SSLContext | None = None,
        timeout: float = TIMEOUT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._secrets = secrets
        self._context = context
        self._timeout = timeout
        self._clock = clock

    async def deliver(
        self, url: str, notice: Notice, text: Text, plot: bytes | None = None, *, contact: bool = False
    ) -> Result:
        """Make one attempt. `contact` is whether the URL is a contact's, which has a secret of its own."""
        secrets = [derive_secret(secret, url) for secret in self._secrets] if contact else self._secrets
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._request(urlsplit(url), secrets, notice.id, make_body(notice, text, plot))
        except TimeoutError:
            return Result(Outcome.FAILED, f"no response within {self._timeout:g} s")
        except (OSError, h11.ProtocolError, ValueError) as error:
            return Result(Outcome.FAILED, printable(describe_failure(error)))
        return _judge(response, self._clock())

    async def _request(self, url: SplitResult, secrets: Sequence[bytes], identifier: str, body: bytes) -> h11.Response:
        timestamp = int(self._clock())
        host = url.hostname or ""
        tls = url.scheme == "https"
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        fields = {
            "Host": url.netloc,
            "User-Agent": f"tlstunnel/{tlstunnel.__version__}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            "webhook-id": identifier,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(secrets, identifier, timestamp, body),
        }
        target = f"{url.path or '/'}{'?' if url.query else ''}{url.query}"
        request = h11.Request(method="POST", target=target, headers=list(fields.items()))
        content = b"".join(
            connection.send(event) or b"" for event in (request, h11.Data(data=body), h11.EndOfMessage())
        )
        sock = await connect(host, url.port or (443 if tls else 80))
        if tls and self._context is None:
            self._context = make_context()
        reader, writer = await asyncio.open_connection(
            sock=sock, ssl=self._context if tls else None, server_hostname=host if tls else None
        )
        try:
            writer.write(content)
            return await _read_head(connection, reader)
        finally:
            writer.transport.abort()  # the rest of the response does not matter


async def _read_head(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Response:
    received = 0
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return event
        if event is h11.NEED_DATA:
            data = await reader.read(4096)
            received += len(data)
            if received > MAX_RECEIVED_BYTES:
                raise ValueError("its response has too many heads")
            if not data:
                raise ConnectionError("closed without a response")
            connection.receive_data(data)


def _judge(response: h11.Response, now: float) -> Result:
    status = response.status_code
    wait = next((_parse_wait(value, now) for name, value in response.headers if name == b"retry-after"), 0.0)
    if 200 <= status < 300:
        return Result(Outcome.ACCEPTED, str(status))
    if status == 410:
        return Result(Outcome.GONE, "410: it wants no more notices")
    if 300 <= status < 400:
        return Result(Outcome.FAILED, f"{status}: redirects are not followed; configure the URL it leads to", wait)
    return Result(Outcome.FAILED, str(status), wait)


def _parse_wait(value: bytes, now: float) -> float:
    """Return the seconds of a Retry-After (RFC 9110 section 10.2.3), 0 if it cannot be read."""
    text = value.decode("ascii", "replace").strip()
    if text.isdecimal():
        return float(text[:12])
    try:
        moment = parsedate_to_datetime(text)
        return max(0.0, moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - now)
    except (ValueError, OverflowError, OSError):
        return 0.0


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
