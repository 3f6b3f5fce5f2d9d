"""The application: checks every request, finds out who sends it, and carries it out.

Tested by tests/promises/test_admin_security.py, test_admin_api.py and test_admin_actions.py.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from tlstunnel.admin.access import AccessControl, Identity, Peer, name_cookie, render_cookie
from tlstunnel.admin.bodies import Alive, Begun, LoggedIn, LoggedOut, Login, SessionResult
from tlstunnel.admin.checks import (
    Unacceptable,
    check_host,
    check_origin,
    check_query,
    is_proxied,
)
from tlstunnel.admin.exposition import render
from tlstunnel.admin.history import Histories, HistoryQuery
from tlstunnel.admin.live import Ask, Live
from tlstunnel.admin.openapi import describe
from tlstunnel.admin.responses import add_fields, make_error, make_file, make_json, make_refusal
from tlstunnel.admin.routes import PREFIX, ROUTES, ApiRoute
from tlstunnel.admin.sessions import LASTS_SECONDS
from tlstunnel.admin.static import load_files
from tlstunnel.admin.turns import Recent, Turns
from tlstunnel.commands.metrics import Metrics, MetricsResult
from tlstunnel.commands.processes import Ready
from tlstunnel.config.admin import Access
from tlstunnel.errors import ControlError, TlstunnelError
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog

MOST_HEAD = 16_384
"""Bytes of a request's head."""

MOST_BODY = 65_536
"""Bytes of a request's body."""

RECENT_SECONDS = 0.1
"""How long readiness and metrics are used again, for those who ask more often."""

READY_TIMEOUT = 2.0
"""How long the parent may take to say whether it is ready; it takes a millisecond."""

ANSWER_SECONDS = 30.0
"""How long it may take to answer what is asked."""

BEGUN_SECONDS = 0.3
"""How long to wait for a command that goes on after the response, in case it fails at once."""

_HEALTH = ("/healthz", "/readyz")
LIVE = f"{PREFIX}/live"

Handler = Callable[[Request, Identity | None], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Something that is served. `access` is what it needs, None if nothing.

    What `acts` cannot be asked for by the pages of other servers.
    """

    route: Route
    handle: Handler
    access: Access | None
    acts: bool


class AdminApp:
    """An ASGI application. `hosts` are the names that it has besides those of loopback, `listen` its configured host.

    `ask` has commands carried out. `histories` is None if no history is kept.
    """

    def __init__(self, access: AccessControl, ask: Ask, live: Live, histories: Histories | None) -> None:
        self.hosts: Collection[str] = ()
        self.listen = ""
        self._access = access
        self._ask = ask
        self._live = live
        self._turns = Turns()
        self.histories = histories
        self._ready = Recent(lambda: ask(Ready(), "a health check"), RECENT_SECONDS)
        self._metrics = Recent(lambda: ask(Metrics(), "a scrape"), RECENT_SECONDS)
        self._begun: set[asyncio.Future[Any]] = set()
        self._log = structlog.get_logger()
        self._endpoints = [*self._list_pages(), *self._list_api()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request or a WebSocket."""
        if scope["type"] not in {"http", "websocket"}:
            return
        send = add_fields(send)
        try:
            if scope["type"] == "http":
                response = await self._respond(scope, receive)
                await response(scope, receive, send)
            else:
                await self._serve_socket(scope, receive, send)
        except (ClientDisconnect, WebSocketDisconnect):
            scope["state"]["abort"]()
        except Exception as error:
            self._log.error(Event.ADMIN_REQUEST_FAILED, exc_info=error)
            scope["state"]["abort"]()

    # --- every request ------------------------------------------------------------------------------------------------

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        request = Request(scope, receive)
        try:
            _check_size(scope)
            if request.url.path in _HEALTH and request.method in {"GET", "HEAD"}:
                return await self._report_health(request.url.path)
            endpoint = self._check(request)
            identity = self._identify(request) if endpoint.access is not None else None
            if endpoint.access is not None:
                needed = endpoint.access
                identity = self._access.require(identity, needed, request.headers.get("x-csrf-token"))
            return await endpoint.handle(request, identity)
        except Unacceptable as refusal:
            return make_refusal(refusal)
        except TimeoutError:
            return make_error(503, "the parent process does not respond")
        except TlstunnelError as error:
            return make_error(409 if isinstance(error, ControlError) else 503, *error.problems)

    def _check(self, request: Request) -> Endpoint:
        """Check a request, and return what it is for. Raises Unacceptable."""
        self._check_host(request)
        check_query(request.scope["query_string"].decode("latin-1"))
        endpoint = self._find(request)
        if endpoint.acts or request.url.path.startswith("/api/"):
            self._check_origin(request, reads=not endpoint.acts)
        return endpoint

    def _check_host(self, connection: HTTPConnection) -> None:
        check_host(connection.headers.getlist("host"), _peer_of(connection).local, self.hosts, self.listen)

    def _check_origin(self, connection: HTTPConnection, *, reads: bool = False) -> None:
        """Check which page a request comes from. Raises Unacceptable.

        What a browser sends with its cookie has to come from this page, and browsers say so, unless it only `reads`.
        """
        headers = connection.headers
        secure = _peer_of(connection).secure
        own = check_origin(
            headers.getlist("origin"), headers.get("sec-fetch-site", ""), headers.get("host", ""), secure=secure
        )
        if not reads and not own and _has_cookie(connection) and "authorization" not in headers:
            raise Unacceptable(403, "a request with the cookie of a session needs the field Origin")

    def _find(self, request: Request) -> Endpoint:
        allowed: list[str] = []
        for endpoint in self._endpoints:
            match, inside = endpoint.route.matches(request.scope)
            if match is Match.FULL:
                request.scope.update(inside)
                return endpoint
            if match is Match.PARTIAL:
                allowed += sorted(endpoint.route.methods or ())
        if allowed:
            raise Unacceptable(405, f"allowed here: {', '.join(allowed)}", headers={"Allow": ", ".join(allowed)})
        raise Unacceptable(404, "there is nothing at this path; /openapi.json describes the API")

    def _identify(self, connection: HTTPConnection) -> Identity | None:
        headers = connection.headers
        values = headers.getlist("authorization")
        if len(values) > 1:
            raise Unacceptable(400, "the request has several Authorization fields")
        return self._access.identify(
            _peer_of(connection),
            values[0] if values else None,
            "; ".join(headers.getlist("cookie")),
            proxied=is_proxied(headers.keys()),
        )

    # --- health -------------------------------------------------------------------------------------------------------

    async def _report_health(self, path: str) -> Response:
        if path == "/healthz":
            return make_json(Alive())
        try:
            async with asyncio.timeout(READY_TIMEOUT):
                fields = await self._ready.get()
        except (TlstunnelError, TimeoutError):
            fields = {"ready": False, "reason": "the parent process does not respond"}
        return make_json(fields, 200 if fields.get("ready") else 503)

    # --- pages --------------------------------------------------------------------------------------------------------

    def _list_pages(self) -> list[Endpoint]:
        files = load_files()

        async def serve_file(request: Request, _: Identity | None) -> Response:
            return make_file(
                files[request.url.path],
                accept_encoding=request.headers.get("accept-encoding", ""),
                if_none_match=request.headers.get("if-none-match", ""),
            )

        # The page is code and has no data, so it needs nothing: it is also where one logs in.
        found = [_make("GET", path, serve_file, None, acts=False) for path in files]
        return [
            *found,
            _make("GET", "/metrics", self._render_metrics, "read", acts=False),
            _make("GET", "/openapi.json", self._describe_api, "read", acts=False),
            _make("POST", "/login", self._log_in, None, acts=True),
            _make("POST", "/logout", self._log_out, "read", acts=True),
        ]

    async def _log_in(self, request: Request, _: Identity | None) -> Response:
        try:
            login = msgspec.json.decode(await _read_body(request), type=Login)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise Unacceptable(400, 'the body should be {"token": "..."}') from None
        peer = _peer_of(request)
        cookie, session = self._access.log_in(peer, login.token)
        secure = peer.secure or request.headers.get("origin", "").startswith("https:")
        token = session.token
        return make_json(
            LoggedIn(token.name, token.access, session.csrf, LASTS_SECONDS),
            headers={"set-cookie": render_cookie(cookie, secure=secure, seconds=LASTS_SECONDS)},
        )

    async def _log_out(self, request: Request, identity: Identity | None) -> Response:
        peer = _peer_of(request)
        if identity is not None and identity.session is not None:
            self._access.log_out(peer, identity.session)
        response = make_json(LoggedOut())
        for secure in (False, True):
            response.headers.append("set-cookie", render_cookie("", secure=secure, seconds=0))
        return response

    async def _render_metrics(self, request: Request, _: Identity | None) -> Response:
        _refuse_parameters(request)
        result = msgspec.convert(await self._metrics.get(), MetricsResult)
        text, media_type = render(result.snapshot, ",".join(request.headers.getlist("accept")))
        return Response(text, 200, {"content-type": media_type, "vary": "Accept"})

    async def _describe_api(self, request: Request, _: Identity | None) -> Response:
        _refuse_parameters(request)
        return make_json(describe())

    # --- the API ------------------------------------------------------------------------------------------------------

    def _list_api(self) -> list[Endpoint]:
        return [
            *(self._make_api(route) for route in ROUTES),
            _make("GET", f"{PREFIX}/overview", self._report_overview, "read", acts=False),
            _make("GET", f"{PREFIX}/history", self._report_history, "read", acts=False),
            _make("GET", f"{PREFIX}/session", self._report_session, "read", acts=False),
        ]

    def _make_api(self, route: ApiRoute) -> Endpoint:
        async def handle(request: Request, identity: Identity | None) -> Response:
            return await self._carry_out(route, request, identity)

        return _make(route.method, PREFIX + route.path, handle, route.access, acts=route.type.acts)

    async def _carry_out(self, route: ApiRoute, request: Request, identity: Identity | None) -> Response:
        who = _who(identity)
        inside = request.path_params
        parameters = check_query(request.scope["query_string"].decode("latin-1"))
        if route.method == "POST":
            if parameters:
                raise Unacceptable(400, "the parameters of this request are the fields of a JSON body")
            command = route.parse_body(await _read_body(request), inside)
        else:
            command = route.parse_query(parameters, inside)
        if not route.type.acts:
            async with asyncio.timeout(ANSWER_SECONDS), self._take_turn(request, identity):
                fields = await self._ask(command, who)
        else:
            work = asyncio.ensure_future(self._ask(command, who))
            if route.accepted:
                return await self._begin(work)
            # Carried out to its end, also if the client does not wait for it: half an action is worse than none.
            fields = await asyncio.shield(work)
        if route.one and not fields.get(route.one):
            raise Unacceptable(404, "there is none with this name or id")
        return make_json(fields)

    def _take_turn(self, request: Request, identity: Identity | None) -> AbstractAsyncContextManager[None]:
        """Wait until something may be read. Raises Unacceptable."""
        return self._turns.take(_find_reader(request, identity), request.scope["state"]["is_gone"])

    async def _begin(self, work: "asyncio.Future[Mapping[str, Any]]") -> Response:
        self._begun.add(work)
        work.add_done_callback(self._finish)
        done, _ = await asyncio.wait((work,), timeout=BEGUN_SECONDS)
        return make_json(work.result() if done else Begun(), 200 if done else 202)

    def _finish(self, work: "asyncio.Future[Mapping[str, Any]]") -> None:
        self._begun.discard(work)
        if not work.cancelled():
            work.exception()  # it was told, or the program has ended

    async def _report_overview(self, request: Request, _: Identity | None) -> Response:
        _refuse_parameters(request)
        async with asyncio.timeout(ANSWER_SECONDS):
            return make_json(await self._live.make_overview())

    async def _report_history(self, request: Request, identity: Identity | None) -> Response:
        parameters = check_query(request.scope["query_string"].decode("latin-1"))
        known = HistoryQuery.__struct_fields__
        if not parameters.keys() <= set(known):
            raise Unacceptable(400, f"unknown parameter; known are {', '.join(known)}")
        try:
            query = msgspec.convert(parameters, HistoryQuery, strict=False)
        except msgspec.ValidationError as error:
            raise Unacceptable(400, f"invalid parameter: {error}") from None
        if self.histories is None:
            raise Unacceptable(503, "no history can be kept; the log says why")
        async with self._take_turn(request, identity):
            return make_json(await self.histories.read(query))

    async def _report_session(self, request: Request, identity: Identity | None) -> Response:
        """Report who one is, for the dashboard."""
        _refuse_parameters(request)
        assert identity is not None
        return make_json(SessionResult(identity.who, identity.access, identity.session is not None))

    # --- live ---------------------------------------------------------------------------------------------------------

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        try:
            _check_size(scope)
            self._check_host(socket)
            if check_query(scope["query_string"].decode("latin-1")):
                raise Unacceptable(400, "there are no parameters here")
            if scope["path"] != LIVE:
                raise Unacceptable(404, f"the WebSocket is at {LIVE}")
            self._check_origin(socket)
            identity = self._access.require(self._identify(socket), "read", None)
        except Unacceptable as refusal:
            await receive()  # websocket.connect
            return await socket.send_denial_response(make_refusal(refusal))
        await self._live.serve(socket, _find_reader(socket, identity), lambda: self._access.still_holds(identity))


def _make(method: str, path: str, handle: Handler, access: Access | None, *, acts: bool) -> Endpoint:
    async def unused(_: Request) -> Response:
        raise NotImplementedError

    return Endpoint(Route(path, unused, methods=[method]), handle, access, acts)


def _check_size(scope: Scope) -> None:
    """Check the size of the head; the server only limits what has not arrived completely. Raises Unacceptable."""
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    if size > MOST_HEAD:
        raise Unacceptable(431, f"the head is longer than {MOST_HEAD} bytes")


def _peer_of(connection: HTTPConnection) -> Peer:
    peer = connection.scope["state"]["peer"]
    assert isinstance(peer, Peer)
    return peer


def _who(identity: Identity | None) -> str:
    return identity.who if identity is not None else "anybody"


def _find_reader(connection: HTTPConnection, identity: Identity | None) -> str:
    """Return who has a share of what there is: anybody at any address has one, as loopback has many addresses."""
    is_anybody = identity is not None and identity.anonymous and _peer_of(connection).uid is None
    return "anybody" if is_anybody else _who(identity)


def _has_cookie(connection: HTTPConnection) -> bool:
    cookies = "; ".join(connection.headers.getlist("cookie"))
    return any(name_cookie(secure=secure) in cookies for secure in (False, True))


def _refuse_parameters(request: Request) -> None:
    if request.scope["query_string"]:
        raise Unacceptable(400, "there are no parameters here")


async def _read_body(request: Request) -> bytes:
    """Return the body of an action. Raises Unacceptable."""
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MOST_BODY:
        raise Unacceptable(413, f"the body is longer than {MOST_BODY} bytes")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise Unacceptable(413, f"the body is longer than {MOST_BODY} bytes")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and media_type != "application/json":
        raise Unacceptable(415, "the body should be JSON, with Content-Type: application/json")
    return bytes(body)
