"""The origin check: which web pages may connect.

A browser lets any page open a WebSocket to any host, sends the user's cookies with it, and names the page's web origin
in the Origin field (RFC 6455 section 10.2). A server that ignores the field lets pages of other sites act as the user:
cross-site WebSocket hijacking. Nothing else prevents it, since neither CORS nor CSRF tokens apply to a handshake.
"""

import re
from collections.abc import Iterable, Sequence

from tlstunnel.addresses import normalise_name
from tlstunnel.config import WEB_PORTS
from tlstunnel.firewall.facts import Facts
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import UpgradeRequest
from tlstunnel.journal.events import Reason

# RFC 6454 section 7.1: one serialized origin, and nothing after its port.
_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#@\\\s:]*|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")
_PORT_OF_HOST = re.compile(rb".*:([0-9]+)", re.DOTALL)


class WebOriginCheck:
    """The web origins that a site allows.

    `allowed` are the entries of ``web_origins`` as the configuration parsed them, and `names` are the site's names.
    With `required`, handshakes without an Origin field, which do not come from browsers, are refused too.
    """

    __slots__ = ("_exact", "_names", "_required", "_same", "_subdomains")

    def __init__(self, allowed: Sequence[str], names: Iterable[str], *, required: bool = False) -> None:
        self._same = "same" in allowed
        self._exact = frozenset(entry for entry in allowed if entry != "same" and "://*." not in entry)
        wildcards = [entry.partition("://*") for entry in allowed if "://*." in entry]
        self._subdomains = tuple((f"{scheme}://", suffix) for scheme, _, suffix in wildcards)
        self._names = frozenset(names)
        self._required = required

    def check(self, facts: Facts) -> Refusal | None:
        """Return the refusal (403) of a handshake with this Origin field, or None.

        Plain requests are not checked. A form has the Origin ``null`` if its page sends no referrer, and other sites'
        forms may be legitimate (single sign-on); browsers have cookies with SameSite and Sec-Fetch-Site for them.
        """
        if not isinstance(facts.request, UpgradeRequest):
            return None
        values = facts.request.by_name.get(b"origin", ())
        if not values:
            missing = _refuse(Reason.WEB_ORIGIN_MISSING, "requests without an Origin field are refused")
            return missing if self._required else None
        if len(values) > 1:
            return _refuse(
                Reason.WEB_ORIGIN_NOT_ALLOWED, "a request may have only one Origin field", "several Origin fields"
            )
        # Browsers send the canonical form, so this settles most allowed requests.
        sent = values[0].decode("latin-1")
        if sent in self._exact:
            return None
        origin = normalise_web_origin(values[0])
        if origin and self._allows(origin, facts):
            return None
        detail = origin or "not exactly one web origin"
        return _refuse(Reason.WEB_ORIGIN_NOT_ALLOWED, "pages of this web origin may not connect", detail)

    def _allows(self, origin: str, facts: Facts) -> bool:
        if origin in self._exact:
            return True
        if any(origin.startswith(scheme) and origin.endswith(suffix) for scheme, suffix in self._subdomains):
            return True
        return self._same and self._is_own(origin, facts)

    def _is_own(self, origin: str, facts: Facts) -> bool:
        """Whether it is an https origin of one of this site's names, on the scheme's port or the one in Host.

        The site "*" has no names of its own: there the page's host must equal the request's.
        """
        scheme, _, authority = origin.partition("://")
        host, port = _split_authority(authority)
        asked = _PORT_OF_HOST.fullmatch(facts.request.authority)
        if scheme != "https" or port not in ("", asked[1].decode("ascii").lstrip("0") if asked else ""):
            return False
        parent = host.partition(".")[2]
        return host in self._names or f"*.{parent}" in self._names or ("*" in self._names and host == facts.host)


def normalise_web_origin(value: bytes) -> str:
    """Return an Origin field's value in the form that the configuration uses, or "" if it is not exactly one origin.

    Scheme and host are in lower case, with A-labels, without a final dot and the scheme's default port. ``null`` is an
    origin. The host of an unknown scheme is kept even if it is not a DNS name (an extension's id). Never raises.
    """
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return ""
    if text == "null":
        return text
    match = _ORIGIN.fullmatch(text)
    if not match:
        return ""
    scheme, host, number = match[1].lower(), match[2], int(match[3] or 0)
    if scheme in WEB_PORTS:
        try:
            host = normalise_name(host)
        except ValueError:
            return ""
        if "*" in host:
            return ""
        host = f"[{host}]" if ":" in host else host
    port = f":{number}" if number not in (0, WEB_PORTS.get(scheme)) else ""
    return f"{scheme}://{host.lower()}{port}"


def _split_authority(authority: str) -> tuple[str, str]:
    """Return the host, without brackets, and the port of a canonical origin; "" if it has no port."""
    if authority.startswith("["):
        host, _, port = authority[1:].partition("]")
        return host, port[1:]
    host, _, port = authority.partition(":")
    return host, port


def _refuse(reason: Reason, text: str, detail: str = "") -> Refusal:
    return Refusal(403, reason, text, detail=detail)
