"""Tokens from browsers: a page cannot set fields of a WebSocket handshake, so it sends the token as a subprotocol.

In the page::

    new WebSocket("wss://chat.example.com/", ["chat", "bearer." + token])

The worker turns it into ``Authorization: Bearer TOKEN`` for the origin, and removes it from the subprotocols, which
servers log and might choose::

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/token_subprotocol.py:fetch"

It verifies nothing: that is up to the origin, which gets ``Authorization`` as it does from programs. Browsers close a
connection whose server chooses none of the subprotocols that they offered: there has to be another one besides the
token, and the origin has to choose it.
"""

import re

from tlstunnel.edge import Reply, WorkerRequest

PREFIX = "bearer."
# RFC 6750 section 2.1, without "/" and "=", which subprotocols cannot contain: all JSON Web Tokens and base64url.
TOKEN = re.compile(r"[A-Za-z0-9._~+-]+")


async def fetch(request: WorkerRequest, env: None) -> WorkerRequest | Reply:
    """Move a token from the subprotocols into a field."""
    others = [protocol for protocol in request.subprotocols if not protocol.startswith(PREFIX)]
    tokens = [protocol for protocol in request.subprotocols if protocol.startswith(PREFIX)]
    if not tokens:  # a program, which sets the field itself, or a client that the origin refuses
        return request
    if len(tokens) > 1:
        return Reply(400, "send one token\n")
    token = tokens[0].removeprefix(PREFIX)
    if not TOKEN.fullmatch(token):
        return Reply(400, "this is not a valid token\n")
    if not others:
        return Reply(400, "offer another subprotocol besides the token\n")
    return request.forward(headers={"Authorization": f"Bearer {token}"}, subprotocols=others)
