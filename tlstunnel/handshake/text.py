"""A request as a person types it, ``GET /chat?room=1`` and some fields, made whole."""

from collections.abc import Iterable

FieldText = tuple[str, str]

# What a client's library adds by itself, unless the fields say otherwise.
_OWN = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def parse_field(text: str) -> FieldText:
    """Read ``NAME: VALUE``. Raises ValueError."""
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"{text!r} is not a field, such as 'Origin: https://a.example'")
    return name.strip(), value.strip()


def build_head(text: str, fields: Iterable[FieldText], host: str, *, plain: bool = False) -> bytes:
    """The head of the request that `text` is, with these fields and what every WebSocket handshake has.

    `host` is for Host where the fields have none; of a site's wildcard, some name that it covers. A `plain` request is
    no handshake. Raises ValueError: the text is no method and target.
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
