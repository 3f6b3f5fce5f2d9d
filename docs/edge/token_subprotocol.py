"""A browser's token: a script cannot set fields of a WebSocket's handshake, so it sends the token as a subprotocol.

In the page::

    new WebSocket("wss://chat.example.com/", ["chat", "bearer." + token])

This makes ``Authorization: Bearer TOKEN`` of it for the origin, and takes it out of the subprotocols, which servers
log and might choose::

    [[sites]]
    names = ["chat.example.com"]
    origins = ["10.0.0.5:3000"]
    worker = "edge/token_subprotocol.py:fetch"

Nothing is verified here: that is the origin's, which gets ``Authorization`` as it gets it from programs. A browser
fails a connection whose server chooses none of the subprotocols that it asked for: there has to be another one beside
the token, and the origin has to choose it.
"""

import re

from tlstunnel.edge import Reply, UpgradeRequest

PREFIX = "bearer."
# RFC 6750 section 2.1, without what no subprotocol can hold ("/", "="): every JSON Web Token, and all base64url.
TOKEN = re.compile(r"[A-Za-z0-9._~+-]+")


async def fetch(request: UpgradeRequest, env: None) -> UpgradeRequest | Reply:
    """Move a token from the subprotocols into a field."""
    others = [protocol for protocol in request.subprotocols if not protocol.startswith(PREFIX)]
    tokens = [protocol for protocol in request.subprotocols if protocol.startswith(PREFIX)]
    if not tokens:
        return request  # a program, which can set the field itself; or nobody, whom the origin refuses
    if len(tokens) > 1:
        return Reply(400, "send one token\n")
    token = tokens[0].removeprefix(PREFIX)
    if not TOKEN.fullmatch(token):
        return Reply(400, "this is no token\n")
    if not others:
        return Reply(400, "ask for another subprotocol beside the token\n")
    return request.forward(headers={"Authorization": f"Bearer {token}"}, subprotocols=others)
