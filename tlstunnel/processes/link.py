"""The link between the parent and a child: typed messages, each a JSON object on a line, with descriptors.

A stream socket pair. A request is ``{"ask": NUMBER, "do": TAG, ...}``, its reply ``{"answer": NUMBER, "ok": true,
...}`` or ``{"answer": NUMBER, "ok": false, "error": "..."}``; a notification is ``{"answer": 0, "do": TAG, ...}``, as
no request has the number 0. ``"fds"`` is how many descriptors came along (SCM_RIGHTS). Both sides see the other's end,
however it ends: the kernel closes the pair.
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
import structlog

from tlstunnel.errors import ProcessError, TlstunnelError
from tlstunnel.journal.events import Event
from tlstunnel.processes.messages import LinkReply, Notification, ReplyT, Request

MAX_FDS = 64
"""Descriptors in one message, below SCM_MAX_FD (253)."""

_READ = 1 << 16

RequestHandler = Callable[[Any, list[int]], Awaitable[LinkReply]]
"""Does what a request asks for, with the descriptors that came, and returns the reply. Raises TlstunnelError."""

Requests = Mapping[type[Request[Any]], RequestHandler]
"""What handles the requests of each type that a side takes."""

Notifications = Mapping[type[Notification], Callable[[Any], None]]
"""What takes the notifications of each type that a side knows."""


class Link:
    """One side. `on_end` is called once, when the other side has ended."""

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
        """Send a request and wait for its reply, without a time limit.

        Raises ProcessError: it was refused, or the other side has ended.
        """
        if self.closed:
            raise ProcessError("the process has ended")
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
            return msgspec.convert(received, request.reply)  # type: ignore[return-value]  # the type that ReplyT is
        except msgspec.ValidationError as error:
            raise ProcessError(f"the process sent a reply that cannot be read: {error}") from None

    def notify(self, notification: Notification) -> None:
        """Send a notification; nothing is sent where the other side has ended."""
        if not self.closed:
            self._send({"answer": 0}, notification)

    def close(self) -> None:
        """Send and receive no more; requests that wait for their reply fail."""
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
        for reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(ProcessError("the process has ended"))

    def read_rest(self) -> None:
        """Take what the other side sent before it ended, and close."""
        while not self.closed and self._read():
            pass
        self.close()

    @property
    def closed(self) -> bool:
        """Whether the other side has ended, or this one has closed it."""
        return self.sock.fileno() < 0

    @property
    def idle(self) -> bool:
        """Whether no message is half sent or half received: then another program can take the socket over."""
        return not self._unsent and not self._received

    def _send(
        self,
        envelope: Mapping[str, Any],
        message: Request[Any] | LinkReply | Notification | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        fields = msgspec.to_builtins(message) if message is not None else {}
        # Duplicates, since they may be closed here before they are sent.
        kept = [os.dup(fd) for fd in descriptors]
        # Not msgspec's encoder: paths may have lone surrogates, in place of bytes that are no UTF-8.
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
                return self._handle_end()
            for fd in descriptors:
                os.close(fd)
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = (data[sent:], [])
        self._loop.remove_writer(self.sock)

    def _read(self) -> bool:
        """Take what has arrived; return whether anything had."""
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
        # No one waits for what a parent before this one has asked for.
        elif (reply := self._waiting.get(message["answer"])) is not None and not reply.done():
            reply.set_result(message)

    async def _handle_request(self, message: dict[str, Any], descriptors: list[int]) -> None:
        number = message["ask"]
        try:
            reply = await self._requests.call(message, descriptors)
        except TlstunnelError as error:
            self._refuse(number, *error.problems)
        except msgspec.ValidationError as error:
            self._refuse(number, f"this request cannot be read: {error}")
        except Exception as error:
            structlog.get_logger().exception(Event.REQUEST_FAILED, request=message.get("do"))
            self._refuse(number, f"an internal error, which is in the log: {error!r}")
        else:
            if not self.closed:
                self._send({"answer": number, "ok": True}, reply)

    def _refuse(self, number: int, *problems: str) -> None:
        if not self.closed:
            # The release before this one reads `error` alone.
            several = {"problems": problems} if len(problems) > 1 else {}
            self._send({"answer": number, "ok": False, "error": "; ".join(problems), **several})

    def _handle_notification(self, message: dict[str, Any]) -> None:
        if not self._notifications.knows(message):
            return  # of a later release
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
    """The types of messages that one side knows, and what handles each."""

    def __init__(self, handlers: Mapping[Any, Callable[..., Any]]) -> None:
        self._handlers = dict(handlers)
        self._tags = {type_.__struct_config__.tag for type_ in handlers}
        self._union: Any = Union[tuple(handlers)] if handlers else None  # noqa: UP007 - made of a tuple

    def knows(self, message: Mapping[str, Any]) -> bool:
        """Whether one of the types has the tag of `message`."""
        return message.get("do") in self._tags

    def call(self, message: Mapping[str, Any], *arguments: Any) -> Any:
        """Call the handler of the message's type. Raises msgspec.ValidationError: it is of none of these."""
        if self._union is None:
            raise msgspec.ValidationError("none is taken here")
        typed = msgspec.convert(message, self._union)
        return self._handlers[type(typed)](typed, *arguments)
