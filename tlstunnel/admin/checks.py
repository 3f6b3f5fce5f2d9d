"""What is checked of every request before anything else: Host, Origin, and that no secret is in the URL.

Host stops DNS rebinding: a page whose own name was pointed at this address sends that name. Origin stops requests that
other pages make a browser send (RFC 6454 section 7.3; https://www.w3.org/TR/fetch-metadata/).

Tested by tests/unit/test_admin_checks.py.
"""

import ipaddress
import re
from collections.abc import Collection, Mapping
from urllib.parse import parse_qsl

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

SECRET_PARAMETERS = frozenset(
    {
        "access_token",
        "apikey",
        "api_key",
        "auth",
        "authorization",
        "bearer",
        "credential",
        "credentials",
        "csrf",
        "key",
        "pass",
        "passwd",
        "password",
        "secret",
        "session",
        "session_id",
        "sessionid",
        "sid",
        "token",
        "x-csrf-token",
    }
)
"""Names of parameters in a query that are refused: URLs are kept in logs and histories."""

MOST_PARAMETERS = 32

_AUTHORITY = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")
_PROXY_FIELDS = frozenset({"forwarded", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip", "via"})


class Unacceptable(Exception):
    """A request is refused with this HTTP `status`; the text says why, and what to do."""

    def __init__(self, status: int, text: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


def parse_authority(text: str) -> str | None:
    """Return the host of ``HOST[:PORT]`` in lower case, None if it is something else."""
    found = _AUTHORITY.fullmatch(text)
    return found[1].lower().rstrip(".") if found is not None else None


def check_host(values: Collection[str], local: str, hosts: Collection[str], listen: str) -> None:
    """Check the field Host, of which there are these `values`. Raises Unacceptable.

    It has to be a name of loopback, the address that the client has connected to (`local`), that of the configuration
    (`listen`), or one of `hosts`. The port does not matter: it may be that of a tunnel or a container.
    """
    text = next(iter(values), "") if len(values) == 1 else ""
    host = parse_authority(text)
    if host is None:
        raise Unacceptable(400, "the request needs one Host field with a host name")
    if host in LOCAL_NAMES or host in hosts or host == listen:
        return
    if local and _to_address(host) == _to_address(local) is not None:
        return
    raise Unacceptable(421, "the Host field names another server; list the names of this one in admin.hosts")


def check_origin(origins: Collection[str], site: str, host: str, *, secure: bool) -> bool:
    """Check the field Origin, of which there are these values, against Host. Raises Unacceptable.

    `site` is the field Sec-Fetch-Site. Return whether a browser says that the request comes from a page of this server.
    Without TLS, a proxy in front may have it, so the scheme is not compared then.
    """
    if len(origins) > 1:
        raise Unacceptable(400, "the request has several Origin fields")
    if site not in {"", "same-origin", "none"}:
        raise Unacceptable(403, "the request comes from a page of another site")
    if not origins:
        return site == "same-origin"
    scheme, _, authority = next(iter(origins)).partition("://")
    if scheme not in ({"https"} if secure else {"http", "https"}) or authority.lower() != host.lower():
        raise Unacceptable(403, "the request comes from a page of another site")
    return True


def check_query(query: str) -> dict[str, str]:
    """Return the parameters of a query. Raises Unacceptable, without repeating any value."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=MOST_PARAMETERS)
    except ValueError:
        raise Unacceptable(
            400, f"the query should be NAME=VALUE&..., of at most {MOST_PARAMETERS} parameters"
        ) from None
    for name, _ in pairs:
        if name.lower() in SECRET_PARAMETERS:
            raise Unacceptable(
                400,
                "a secret does not belong into a URL, which is kept in logs and histories: use the field Authorization,"
                " and replace a token that was sent like this",
            )
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise Unacceptable(400, "a parameter is in the query twice")
    return parameters


def is_proxied(headers: Collection[str]) -> bool:
    """Return whether a proxy has passed the request on, so that it may come from another machine."""
    return any(name in _PROXY_FIELDS or name.startswith("x-forwarded") for name in headers)


def _to_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address
