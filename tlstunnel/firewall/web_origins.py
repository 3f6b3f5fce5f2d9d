"""The origin check: which web pages may connect.

A browser lets any page open a WebSocket to any host, sends the user's cookies along, and says in the Origin field whose
page it is (RFC 6455 section 10.2). Without a look at that field another site's page is as good as the user: cross-site
WebSocket hijacking. Nothing else keeps it off, as neither CORS nor a CSRF token applies to a handshake.
"""

import re
from collections.abc import Iterable, Sequence

from tlstunnel.addresses import canonical_name
from tlstunnel.config import WEB_PORTS
from tlstunnel.firewall.facts import Facts
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import UpgradeRequest
from tlstunnel.journal.events import Reason

# RFC 6454 section 7.1: one serialized origin, and nothing behind its port.
_ORIGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#@\\\s:]*|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")
_PORT_OF_HOST = re.compile(rb".*:([0-9]+)", re.DOTALL)


class WebOriginCheck:
    """The origins that a site lets in.

    `allowed` are entries of ``web_origins`` as the configuration gives them, `names` the site's own. `required`
    refuses requests without the field too, which are not a browser's.
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
        """Why a request with this Origin field is refused (403), or None."""
        values = facts.request.by_name.get(b"origin", ())
        if not values:
            # Browsers send none when they load a page.
            required = self._required and isinstance(facts.request, UpgradeRequest)
            if not required:
                return None
            return _refuse(Reason.WEB_ORIGIN_MISSING, "a request without an Origin field is refused here")
        if len(values) > 1:
            return _refuse(Reason.WEB_ORIGIN_NOT_ALLOWED, "there must be one Origin field", "several Origin fields")
        # Browsers send the canonical form, so this is all that it takes for most of those that may come.
        sent = values[0].decode("latin-1")
        if sent in self._exact:
            return None
        origin = normalise_web_origin(values[0])
        if origin and self._allows(origin, facts):
            return None
        return _refuse(Reason.WEB_ORIGIN_NOT_ALLOWED, "pages of this origin may not connect here", sent)

    def _allows(self, origin: str, facts: Facts) -> bool:
        if origin in self._exact:
            return True
        if any(origin.startswith(scheme) and origin.endswith(suffix) for scheme, suffix in self._subdomains):
            return True
        return self._same and self._is_own(origin, facts)

    def _is_own(self, origin: str, facts: Facts) -> bool:
        """Whether it is an https origin of a name of this site, on the scheme's port or the one in Host.

        A site of any name has no names of its own: there the page's host must be the one that the request is for.
        """
        scheme, _, authority = origin.partition("://")
        host, port = _split_authority(authority)
        asked = _PORT_OF_HOST.fullmatch(facts.request.authority)
        if scheme != "https" or port not in ("", asked[1].decode("ascii").lstrip("0") if asked else ""):
            return False
        parent = host.partition(".")[2]
        return host in self._names or f"*.{parent}" in self._names or ("*" in self._names and host == facts.host)


def normalise_web_origin(value: bytes) -> str:
    """Give an Origin field's value the form of the configuration, or "" if it is not one origin.

    Scheme and host in lower case, A-labels, no final dot, no port that is the scheme's; ``null`` is an origin. A host
    that is no name of the DNS is kept (an extension's id). Raises nothing.
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
            host = canonical_name(host)
        except ValueError:
            return ""
        if "*" in host:
            return ""
        host = f"[{host}]" if ":" in host else host
    port = f":{number}" if number not in (0, WEB_PORTS.get(scheme)) else ""
    return f"{scheme}://{host.lower()}{port}"


def _split_authority(authority: str) -> tuple[str, str]:
    """Give host, without brackets, and port of a canonical origin, "" where it has none."""
    if authority.startswith("["):
        host, _, port = authority[1:].partition("]")
        return host, port[1:]
    host, _, port = authority.partition(":")
    return host, port


def _refuse(reason: Reason, text: str, detail: str = "") -> Refusal:
    return Refusal(403, reason, text, detail=detail)
