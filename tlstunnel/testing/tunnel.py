"""The real tunnel with one site that has an edge worker.

Tested by tests/e2e/test_testing_fixtures.py.
"""

import contextlib
import os
import socket
import ssl
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tlstunnel.certificates import issue
from tlstunnel.commands.tunnels import EndTunnels
from tlstunnel.config.rendering import render_value
from tlstunnel.processes.reach import send_command
from tlstunnel.testing.client import HandshakeResult, Headers, converse, make_handshake
from tlstunnel.testing.origin import EdgeOrigin, OriginRequest
from tlstunnel.testing.program import TIMEOUT, Program, Record


class EdgeTunnel:
    """``tlstunnel start`` with one site that has a worker, for as long as the ``with`` lasts.

    `worker` is what a configuration has, ``FILE:FUNCTION`` or ``PACKAGE.MODULE:FUNCTION``. A file is looked for in the
    working directory. The tunnel runs there too, and can import what the test can. `config` is the site's
    ``worker_config``. `origins` are those of the site; without any it has one `EdgeOrigin`. `worker_origins` are
    others that the worker may choose. `names` are the site's, in addition to localhost. `site` and `top` are more
    of the configuration, as TOML: of the site, and of what precedes the sites.

    Raises AssertionError, with the log, if the tunnel does not start, and at the end if it does not exit with 0.
    """

    def __init__(  # noqa: PLR0913 - what a configuration may have
        self,
        worker: str,
        *,
        config: Mapping[str, Any] | None = None,
        origins: Sequence[EdgeOrigin | str] = (),
        worker_origins: Sequence[EdgeOrigin | str] = (),
        names: Sequence[str] = (),
        site: str = "",
        top: str = "",
    ) -> None:
        self._worker, self._config, self._site, self._top = worker, config or {}, site, top
        self._names = [*dict.fromkeys([*names, "localhost"])]
        self._origins, self._worker_origins = list(origins), list(worker_origins)
        self._stack = contextlib.ExitStack()
        self._one_handshake = threading.Lock()
        self._program = Program()
        self._ca = self._control = Path()
        self.port = 0
        """The port that it listens on, on 127.0.0.1."""

    def __enter__(self) -> Self:
        __tracebackhide__ = True
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-tunnel-")))
            if not self._origins:
                self._origins.append(stack.enter_context(EdgeOrigin()))
            command = [sys.executable, "-m", "tlstunnel", "start", "--log-format", "json"]
            self._control = folder / "control.sock"
            self._program.start(
                [*command, "--config", self._write_configuration(folder), "--control", self._control],
                environment={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            stack.callback(self._program.end)
            self._program.wait_until(lambda: self.log_of("ready"), "the tunnel did not start")
            self.port = int(self.log_of("listening")[0]["address"].rpartition(":")[2])
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        __tracebackhide__ = True
        with self._stack:
            try:
                status = self._program.stop()
            except AssertionError:
                if error is None:
                    raise
                return
        if error is None and status != 0:
            raise AssertionError(f"the tunnel exited with {status}; its log:\n{self.text}")

    @property
    def uri(self) -> str:
        """The address for a client to connect to."""
        return f"wss://localhost:{self.port}/"

    @property
    def ca(self) -> Path:
        """The certificate (PEM) of the authority that a client has to trust."""
        return self._ca

    @property
    def context(self) -> ssl.SSLContext:
        """A context for a client in Python that trusts this tunnel and no other server."""
        return ssl.create_default_context(cafile=self._ca)

    @property
    def origin(self) -> EdgeOrigin:
        """The first of the site's origins that is an `EdgeOrigin`."""
        return next(one for one in self._origins if isinstance(one, EdgeOrigin))

    @property
    def log(self) -> list[Record]:
        """The log records so far."""
        return self._program.records()

    @property
    def text(self) -> str:
        """Everything that the tunnel has written to standard error so far."""
        return self._program.text

    def log_of(self, event: str, **fields: object) -> list[Record]:
        """Return the records so far of that event, with these fields."""
        return self._program.records(event=event, **fields)

    def wait_for(self, event: str, **fields: object) -> Record:
        """Return the first record of that event with these fields, past or future.

        Raises AssertionError, with the log.
        """
        __tracebackhide__ = True
        missing = f"no record {event!r} with {fields}"
        return self._program.wait_until(lambda: self.log_of(event, **fields), missing)[0]

    def end_tunnels(self, **filters: str) -> int:
        """End open tunnels as ``tlstunnel tunnels end`` does, such as ``tag="user=42"``; return how many there were.

        The filters are `id`, `site`, `client`, `origin`, and `tag`; `why` is in the records. Raises ControlError.
        """
        request = {"do": EndTunnels.name, "confirm": True, **filters}
        number: int = send_command(self._control, request)["number"]
        return number

    def handshake(  # noqa: PLR0913 - what a handshake may have
        self,
        path: str = "/",
        *,
        headers: Headers = (),
        subprotocols: Sequence[str] = (),
        messages: Sequence[str | bytes] = (),
        host: str = "localhost",
        client_address: str = "127.0.0.1",
    ) -> HandshakeResult:
        """Do one real handshake. If a tunnel opens, send `messages`, wait for as many in return, and close it.

        `path` may have a query. `host` is one of the site's names. `client_address` is any address of 127.0.0.0/8; each
        is a different client. Raises AssertionError if there is no complete response.
        """
        __tracebackhide__ = True
        sent = make_handshake(path, headers, subprotocols, host)
        with self._one_handshake:
            before = len(self.log)
            with (
                socket.create_connection(("127.0.0.1", self.port), TIMEOUT, (client_address, 0)) as plain,
                self.context.wrap_socket(plain, server_hostname=host) as sock,
            ):
                received = converse(sock, sent, messages)
            # A refusal of the tunnel names its id; otherwise it is the one connection that ended meanwhile.
            request_id = received.headers.get("X-Request-Id")
            known = {"id": request_id} if request_id else {"path": path.partition("?")[0]}
            record = self._program.wait_until(
                lambda: self._program.records(before, event="connection", status=received.status, **known),
                "the connection has no log record",
            )[0]
        reached = next((one for one in self._requests() if one.headers.get("Sec-WebSocket-Key") == sent.key), None)
        body = received.body.decode("utf-8", "replace")
        return HandshakeResult(received.status, received.headers, body, reached, record, received.messages)

    def _requests(self) -> Iterator[OriginRequest]:
        for origin in (*self._origins, *self._worker_origins):
            if isinstance(origin, EdgeOrigin):
                yield from origin.requests

    def _write_configuration(self, folder: Path) -> Path:
        issued = issue.create([*self._names, "127.0.0.1"], folder)
        self._ca = issued.ca
        place, _, function = self._worker.rpartition(":")
        site = {
            "names": self._names,
            "cert": str(issued.cert),
            "key": str(issued.key),
            "origins": [_address(one) for one in self._origins],
            "worker": f"{Path(place).resolve()}:{function}" if place.endswith(".py") else self._worker,
            "worker_config": self._config,
        }
        if self._worker_origins:
            hosts = [_address(one) for one in self._worker_origins]
            site["worker_origins"] = [host.partition(":")[0] if host.count(":") == 1 else host for host in hosts]
        text = "\n".join(f"{name} = {render_value(value)}" for name, value in site.items())
        file = folder / "tlstunnel.toml"
        file.write_text(f'listen = ["127.0.0.1:0"]\n{self._top}\n[[sites]]\n{text}\n{self._site}\n')
        return file


def _address(origin: EdgeOrigin | str) -> str:
    return origin.address if isinstance(origin, EdgeOrigin) else origin
