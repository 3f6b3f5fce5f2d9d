"""The program of the embedded echo origin: `embedded` runs ``python -m tlstunnel.origins.echo DESCRIPTOR``.

Tested by tests/e2e/test_demo.py.
"""

import asyncio
import contextlib
import signal
import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect


async def _echo(websocket: WebSocket) -> None:
    offered = websocket.scope["subprotocols"]
    await websocket.accept(subprotocol=offered[0] if offered else None)
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                break
            if (text := message.get("text")) is not None:
                await websocket.send_text(text)
            else:
                await websocket.send_bytes(message["bytes"])


async def _serve(descriptor: int) -> None:
    app = Starlette(routes=[WebSocketRoute("/{path:path}", _echo)])
    config = uvicorn.Config(
        app, ws="wsproto", ws_per_message_deflate=True, lifespan="off", log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), setattr, server, "should_exit", True)
    await server.serve(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    # The tunnel's process stops this one by closing its standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_serve(int(sys.argv[1])))
