"""The link between the parent and a child: requests and answers, each a JSON object on a line, with descriptors.

A stream socket pair. A request is ``{"ask": NUMBER, "do": WORD, ...}``, its answer ``{"answer": NUMBER, "ok": true,
...}`` or ``{"answer": NUMBER, "ok": false, "error": "..."}``; ``"fds"`` is how many descriptors came with it
(SCM_RIGHTS). Both sides see the other's end, however it ends: the kernel closes the pair.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog

from tlstunnel.errors import ProcessError, TlstunnelError

FORMAT = 1
"""Of what parent and child say to each other. A child of another one is refused."""

MOST_FDS = 64
"""Descriptors in one message, below SCM_MAX_FD (253)."""

_READ = 1 << 16

Handler = Callable[[Mapping[str, Any], list[int]], Awaitable[Mapping[str, Any]]]
"""Does what is asked, with the descriptors that came, and gives the answer. Raises TlstunnelError."""


class Link:
    """One side. `handlers` answer what the other asks; `gone` is called once, when the other side has ended."""

    def __init__(self, sock: socket.socket, handlers: Mapping[str, Handler], gone: Callable[[], None]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._handlers = handlers
        self._gone = gone
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._beside: set[asyncio.Task[None]] = set()
        self._loop.add_reader(sock, self._read)

    async def ask(self, do: str, descriptors: Sequence[int] = (), **more: Any) -> dict[str, Any]:
        """Ask and wait for the answer, without a time limit. Raises ProcessError: refused, or the other side ended."""
        if self.closed:
            raise ProcessError("the process has ended")
        self._number = number = self._number + 1
        answer = self._asked[number] = self._loop.create_future()
        self._send({"ask": number, "do": do, **more}, descriptors)
        try:
            said: dict[str, Any] = await answer
        finally:
            self._asked.pop(number, None)
        if not said["ok"]:
            raise ProcessError(said["error"])
        return said

    def close(self) -> None:
        """Say and hear no more."""
        if self.closed:
            return
        self._loop.remove_reader(self.sock)
        self._loop.remove_writer(self.sock)
        self.sock.close()
        for fd in self._descriptors:
            os.close(fd)
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(ProcessError("the process has ended"))

    def release(self) -> None:
        """Leave the socket as it is to whoever takes it over."""
        self._loop.remove_reader(self.sock)
        self._loop.remove_writer(self.sock)

    @property
    def closed(self) -> bool:
        """Whether the other side has ended, or this one has closed it."""
        return self.sock.fileno() < 0

    @property
    def idle(self) -> bool:
        """Whether nothing is half sent: then another program can take the socket over."""
        return not self._unsent and not self._received

    def _send(self, message: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        # Duplicates, since they may be closed here before they are sent.
        kept = [os.dup(fd) for fd in descriptors]
        self._unsent.append((json.dumps({**message, "fds": len(kept)}).encode() + b"\n", kept))
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
                return self._end()
            for fd in descriptors:
                os.close(fd)
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = (data[sent:], [])
        self._loop.remove_writer(self.sock)

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self.sock, _READ, MOST_FDS)
        except BlockingIOError:
            return
        except OSError:
            return self._end()
        for fd in descriptors:
            os.set_inheritable(fd, False)
        self._descriptors.extend(descriptors)
        if not data:
            return self._end()
        self._received += data
        while (end := self._received.find(b"\n")) >= 0:
            message = json.loads(self._received[:end])
            del self._received[: end + 1]
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        descriptors = [self._descriptors.popleft() for _ in range(message["fds"])]
        if "answer" in message:
            # One that a parent before this one has asked for is nobody's.
            answer = self._asked.get(message["answer"])
            if answer is not None and not answer.done():
                answer.set_result(message)
            return
        task = self._loop.create_task(self._do(message, descriptors))
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    async def _do(self, message: dict[str, Any], descriptors: list[int]) -> None:
        answer: dict[str, Any]
        try:
            answer = {"ok": True, **await self._handlers[message["do"]](message, descriptors)}
        except TlstunnelError as error:
            answer = {"ok": False, "error": str(error)}
        except Exception as error:
            structlog.get_logger().exception("request failed", request=message["do"])
            answer = {"ok": False, "error": f"a fault, which the log tells of: {error!r}"}
        if not self.closed:
            self._send({"answer": message["ask"], **answer}, ())

    def _end(self) -> None:
        if not self.closed:
            self.close()
            with contextlib.suppress(asyncio.CancelledError):
                self._gone()
