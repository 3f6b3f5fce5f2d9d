"""Complete a request that a person has typed: ``GET /chat?room=1`` and some fields.

Tested by tests/unit/test_handshake_request.py.
"""

from collections.abc import Iterable

FieldText = tuple[str, str]

# What a WebSocket library adds, unless the given fields have it.
_OWN = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def parse_field(text: str) -> FieldText:
    """Parse ``NAME: VALUE``. Raises ValueError."""
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"{text!r} is not a header field; write it like 'Origin: https://a.example'")
    return name.strip(), value.strip()


def build_head(text: str, fields: Iterable[FieldText], host: str, *, plain: bool = False) -> bytes:
    """Return the head of the request `text`, with these fields and those of every WebSocket handshake.

    `host` is the value of Host if the fields have none; for a wildcard, a name that it matches is used. A `plain`
    request is not a handshake. Raises ValueError if `text` is not a method and a target.
    """
    method, _, target = text.strip().partition(" ")
    if not method or not target:
        raise ValueError("expected a method and a target, such as 'GET /chat?room=1'")
    fields = list(fields)
    given = {name.lower() for name, _ in fields}
    host = host.replace("*.", "www.").replace("*", "localhost")
    own = {"Host": f"[{host}]" if ":" in host else host, **({} if plain else _OWN)}
    lines = [f"{method} {target} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in own.items() if name.lower() not in given]
    lines += [f"{name}: {value}" for name, value in fields]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("utf-8", "surrogateescape")
