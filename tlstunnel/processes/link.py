"""The link between the parent and a child: typed messages with descriptors, over a stream socket pair.

Each message is a line with a JSON object. A request is ``{"ask": NUMBER, "do": TAG, ...}``, and its reply
``{"answer": NUMBER, "ok": true, ...}`` or ``{"answer": NUMBER, "ok": false, "error": "..."}``. A notification is
``{"answer": 0, "do": TAG, ...}``, as no request has the number 0. ``"fds"`` is the number of descriptors that come with
the message (SCM_RIGHTS). Each side notices when the other process exits, for whatever reason, because the kernel closes
its socket.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Union

import msgspec

from tlstunnel.errors import ProcessError, TlstunnelError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.processes.messages import LinkReply, Notification, ReplyT, Request

MAX_FDS = 64
"""The most descriptors in a message; the limit of Linux, SCM_MAX_FD, is 253."""

_READ = 1 << 16

RequestHandler = Callable[[Any, list[int]], Awaitable[LinkReply]]
"""Carries out a request, with the descriptors that came with it, and returns the reply. Raises TlstunnelError."""

Requests = Mapping[type[Request[Any]], RequestHandler]
"""The handlers of one side's requests, by type."""

Notifications = Mapping[type[Notification], Callable[[Any], None]]
"""The handlers of one side's notifications, by type."""


class Link:
    """One side of a link. `on_end` is called once, when the other side has closed it."""

    def __init__(
        self,
        sock: socket.socket,
        requests: Requests,
        on_end: Callable[[], None],
        notifications: Notifications | None = None,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._on_end = on_end
        self._requests = _Handlers(requests)
        self._notifications = _Handlers(notifications or {})
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._handling: set[asyncio.Task[None]] = set()
        self._loop.add_reader(sock, self._read)

    async def request(self, request: Request[ReplyT], descriptors: Sequence[int] = ()) -> ReplyT:
        """Send a request and return its reply, without a time limit.

        Raises ProcessError if the request is refused, or the other side closes the link.
        """
        if self.closed:
            raise ProcessError("the process has exited")
        self._number = number = self._number + 1
        reply = self._waiting[number] = self._loop.create_future()
        self._send({"ask": number}, request, descriptors)
        try:
            received = await reply
        finally:
            self._waiting.pop(number, None)
        if not received["ok"]:
            raise ProcessError(*(received.get("problems") or [received["error"]]))
        try:
            return msgspec.convert(received, request.reply)  # type: ignore[return-value]  # it is ReplyT
        except msgspec.ValidationError as error:
            raise ProcessError(f"the process sent an invalid reply: {error}") from None

    def notify(self, notification: Notification) -> None:
        """Send a notification, unless the link is closed. It must not contain lone surrogates."""
        if not self.closed:
            # Ten times faster than `_send`, which matters for metrics.
            self._unsent.append((b'{"answer":0,"fds":0,%b\n' % msgspec.json.encode(notification)[1:], []))
            self._write()

    def fail_requests(self, error: ProcessError) -> None:
        """Have the requests that wait for their reply raise `error`."""
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(error)

    def close(self) -> None:
        """Close this side. Requests that wait for their reply fail."""
        if self.closed:
            return
        self._loop.remove_reader(self.sock)
        self._loop.remove_writer(self.sock)
        self.sock.close()
        for fd in self._descriptors:
            os.close(fd)
        for _, descriptors in self._unsent:
            for fd in descriptors:
                os.close(fd)
        self._unsent.clear()
        self.fail_requests(ProcessError("the process has exited"))

    def read_rest(self) -> None:
        """Handle what the other side sent before it exited, then close."""
        while not self.closed and self._read():
            pass
        self.close()

    @property
    def closed(self) -> bool:
        """Whether either side has closed the link."""
        return self.sock.fileno() < 0

    @property
    def idle(self) -> bool:
        """Whether no message is half sent or half received, so that another program can take over the socket."""
        return not self._unsent and not self._received

    def _send(
        self,
        envelope: Mapping[str, Any],
        message: Request[Any] | LinkReply | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        fields = msgspec.to_builtins(message) if message is not None else {}
        # Duplicated, because the caller may close them before they are sent.
        kept = [os.dup(fd) for fd in descriptors]
        # Not msgspec's encoder: paths with bytes that are not UTF-8 contain lone surrogates.
        self._unsent.append((json.dumps({**envelope, **fields, "fds": len(kept)}).encode() + b"\n", kept))
        self._write()

    def _write(self) -> None:
        while self._unsent:
            data, descriptors = self._unsent[0]
            try:
                sent = socket.send_fds(self.sock, [data], descriptors) if descriptors else self.sock.send(data)
            except BlockingIOError:
                self._loop.add_writer(self.sock, self._write)
                return
            except OSError:
                # The other side has closed its end. What it sent before that, such as its last metrics, still counts.
                while not self.closed and self._read():
                    pass
                return self._handle_end()
            for fd in descriptors:
                os.close(fd)
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = (data[sent:], [])
        self._loop.remove_writer(self.sock)

    def _read(self) -> bool:
        """Handle what has arrived; return whether anything had."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.sock, _READ, MAX_FDS)
        except BlockingIOError:
            return False
        except OSError:
            self._handle_end()
            return False
        for fd in descriptors:
            os.set_inheritable(fd, False)
        self._descriptors.extend(descriptors)
        if not data:
            self._handle_end()
            return False
        self._received += data
        while (end := self._received.find(b"\n")) >= 0:
            message = json.loads(self._received[:end])
            del self._received[: end + 1]
            self._receive(message)
        return True

    def _receive(self, message: dict[str, Any]) -> None:
        descriptors = [self._descriptors.popleft() for _ in range(message["fds"])]
        if "ask" in message:
            task = self._loop.create_task(self._handle_request(message, descriptors))
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)
        elif message["answer"] == 0:
            self._handle_notification(message)
        # A reply to a request of the previous program is ignored.
        elif (reply := self._waiting.get(message["answer"])) is not None and not reply.done():
            reply.set_result(message)

    async def _handle_request(self, message: dict[str, Any], descriptors: list[int]) -> None:
        number = message["ask"]
        try:
            reply = await self._requests.call(message, descriptors)
        except TlstunnelError as error:
            self._refuse(number, *error.problems)
        except msgspec.ValidationError as error:
            self._refuse(number, f"invalid request: {error}")
        except Exception as error:
            structlog.get_logger().exception(Event.REQUEST_FAILED, request=message.get("do"))
            self._refuse(number, f"internal error, see the log: {error!r}")
        else:
            if not self.closed:
                self._send({"answer": number, "ok": True}, reply)

    def _refuse(self, number: int, *problems: str) -> None:
        if not self.closed:
            # Releases of format 1 read `error` only.
            several = {"problems": problems} if len(problems) > 1 else {}
            self._send({"answer": number, "ok": False, "error": "; ".join(problems), **several})

    def _handle_notification(self, message: dict[str, Any]) -> None:
        if not self._notifications.knows(message):
            return  # from a later release
        try:
            self._notifications.call(message)
        except Exception:
            structlog.get_logger().exception(Event.NOTIFICATION_FAILED, notification=message["do"])

    def _handle_end(self) -> None:
        if not self.closed:
            self.close()
            with contextlib.suppress(asyncio.CancelledError):
                self._on_end()


class _Handlers:
    """The types of messages that one side knows, with their handlers."""

    def __init__(self, handlers: Mapping[Any, Callable[..., Any]]) -> None:
        self._handlers = dict(handlers)
        self._tags = {type_.__struct_config__.tag for type_ in handlers}
        self._union: Any = Union[tuple(handlers)] if handlers else None  # noqa: UP007 - built from a tuple

    def knows(self, message: Mapping[str, Any]) -> bool:
        """Return whether one of the types has the tag of `message`."""
        return message.get("do") in self._tags

    def call(self, message: Mapping[str, Any], *arguments: Any) -> Any:
        """Call the handler for the message's type. Raises msgspec.ValidationError if it is invalid."""
        if self._union is None:
            raise msgspec.ValidationError("this side takes no requests")
        typed = msgspec.convert(message, self._union)
        return self._handlers[type(typed)](typed, *arguments)
