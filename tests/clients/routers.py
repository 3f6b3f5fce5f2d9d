"""Three servers with a route for /admin and all below. Each responds with "admin" or, mostly as a 404, something else.

Prints their ports as JSON. Ends with its standard input.
"""

import asyncio
import json
import socket
import sys

import aiohttp.web
import tornado.httpserver
import tornado.web
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route


def listen() -> socket.socket:
    """Return a listening socket."""
    return socket.create_server(("127.0.0.1", 0))


def starlette_application() -> Starlette:
    """Return the application of Starlette."""

    async def admin(_: Request) -> PlainTextResponse:
        return PlainTextResponse("admin")

    return Starlette(routes=[Route("/admin", admin), Route("/admin/{rest:path}", admin)])


def aiohttp_application() -> aiohttp.web.Application:
    """Return the application of aiohttp."""

    async def admin(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(text="admin")

    application = aiohttp.web.Application()
    application.router.add_get("/admin", admin)
    application.router.add_get("/admin/{rest:.*}", admin)
    return application


def tornado_application() -> tornado.web.Application:
    """Return the application of Tornado."""

    def get(self: tornado.web.RequestHandler, *_: str) -> None:
        self.write("admin")

    handler = type("Admin", (tornado.web.RequestHandler,), {"get": get})
    return tornado.web.Application([(r"/admin", handler), (r"/admin/(.*)", handler)], log_function=lambda _: None)


async def main() -> None:
    """Serve until the standard input ends."""
    sockets = {name: listen() for name in ("starlette", "aiohttp", "tornado")}
    server = uvicorn.Server(uvicorn.Config(starlette_application(), log_level="critical", lifespan="off"))
    serving = asyncio.ensure_future(server.serve([sockets["starlette"]]))
    runner = aiohttp.web.AppRunner(aiohttp_application(), access_log=None)
    await runner.setup()
    await aiohttp.web.SockSite(runner, sockets["aiohttp"]).start()
    sockets["tornado"].setblocking(False)
    tornado.httpserver.HTTPServer(tornado_application()).add_socket(sockets["tornado"])
    print(json.dumps({name: sock.getsockname()[1] for name, sock in sockets.items()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving


asyncio.run(main())
