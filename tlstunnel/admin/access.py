"""Finds out who sends a request, and what they may do: by token, client certificate, session, or without a name.

Tested by tests/unit/test_admin_access.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tlstunnel.admin.checks import Unacceptable
from tlstunnel.admin.failures import Failures
from tlstunnel.admin.sessions import Session, Sessions, is_csrf_of
from tlstunnel.config.admin import Access
from tlstunnel.escaping import printable, shorten
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.serving.admin_files import HOW, LoadedToken, find_token

LONGEST_SUBJECT = 200

_COOKIE = "tlstunnel-session"


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection.

    `client` is what is shown of it in the log: an address, or "uid N" at a Unix socket. `local` is the address that it
    has connected to, "" for a Unix socket. `certificate` is the subject of a verified client certificate, or "".
    """

    client: str
    local: str
    uid: int | None = None
    secure: bool = False
    certificate: str = ""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sends a request: `who` is for the log. `session` is None unless it is that of a browser.

    It is `anonymous` if anybody on this machine can do the same.
    """

    who: str
    access: Access
    anonymous: bool = False
    session: Session | None = None
    token: LoadedToken | None = None


class AccessControl:
    """Knows the tokens, the sessions, and what failed.

    With `is_local`, only this machine reaches the address, so everybody there may read.
    """

    def __init__(
        self,
        tokens: Sequence[LoadedToken] = (),
        *,
        is_local: bool = True,
        client_access: Access = "read",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokens = tuple(tokens)
        self._is_local = is_local
        self._client_access: Access = client_access
        self._sessions = Sessions(clock)
        self._failures = Failures(clock)
        self._log = structlog.get_logger()

    def configure(self, tokens: Sequence[LoadedToken], *, is_local: bool, client_access: Access) -> None:
        """Go on with other settings. Sessions of tokens that are gone or have changed end."""
        self._tokens = tuple(tokens)
        self._is_local, self._client_access = is_local, client_access
        self._sessions.keep_those_of(self._tokens)

    def identify(self, peer: Peer, authorization: str | None, cookies: str, *, proxied: bool) -> Identity | None:
        """Return who sends a request, None if that is not known. Raises Unacceptable for a wrong token."""
        if authorization is not None:
            return self._identify_bearer(peer, authorization)
        found = []
        if peer.certificate:
            subject = shorten(printable(peer.certificate), LONGEST_SUBJECT)
            found.append(Identity(f"certificate {subject}", self._client_access))
        session = self._sessions.find(read_cookie(cookies, secure=peer.secure))
        if session is not None:
            found.append(Identity(_describe(session.token, peer), session.token.access, session=session))
        if found:
            return next((one for one in found if one.access == "full"), found[0])
        if not self._is_local or proxied:
            return None
        return Identity(f"anybody ({peer.client})", "read", anonymous=True)

    def require(self, identity: Identity | None, access: Access, csrf: str | None) -> Identity:
        """Check that they may read, or act (`full`). Raises Unacceptable.

        `csrf` is the field that the dashboard sends with actions.
        """
        how = ""
        if not self._tokens:
            how = f": there is no token yet. To make one: {HOW}; then list the file in [[admin.tokens]], and reload"
        headers = {"WWW-Authenticate": 'Bearer realm="tlstunnel"'}
        if identity is None:
            raise Unacceptable(401, f"this needs a token or a client certificate{how}", headers=headers)
        if access == "read" or identity.access == "full":
            session = identity.session
            if access == "full" and session is not None and not (csrf and is_csrf_of(session, csrf)):
                raise Unacceptable(403, "the field X-CSRF-Token of this session is missing or wrong; log in again")
            return identity
        if identity.anonymous:
            raise Unacceptable(401, f"actions need a token with full access, on this machine too{how}", headers=headers)
        raise Unacceptable(403, f"{identity.who} may only read; actions need a token with full access")

    def log_in(self, peer: Peer, text: str) -> tuple[str, Session]:
        """Begin a session with a token; return the value of its cookie, and the session. Raises Unacceptable."""
        token = find_token(self._tokens, text)
        if token is None:
            raise self._refuse(peer)
        cookie, session = self._sessions.begin(token)
        self._log.info(Event.LOGIN, who=_describe(token, peer), client=peer.client)
        return cookie, session

    def log_out(self, peer: Peer, session: Session) -> None:
        """End a session."""
        self._sessions.end(session)
        self._log.info(Event.LOGOUT, who=_describe(session.token, peer), client=peer.client)

    def still_holds(self, identity: Identity) -> bool:
        """Return whether they may still read what they watch: their session or token may have ended."""
        if identity.session is not None:
            return self._sessions.is_open(identity.session)
        if identity.anonymous:
            return self._is_local
        return identity.token is None or identity.token in self._tokens

    def _identify_bearer(self, peer: Peer, authorization: str) -> Identity:
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            headers = {"WWW-Authenticate": 'Bearer realm="tlstunnel"'}
            raise Unacceptable(401, "the field Authorization should be: Bearer TOKEN", headers=headers)
        token = find_token(self._tokens, text.strip())
        if token is None:
            raise self._refuse(peer)
        return Identity(_describe(token, peer), token.access, token=token)

    def _refuse(self, peer: Peer) -> Unacceptable:
        wait = self._failures.add(peer.client)
        if wait:
            return Unacceptable(429, "too many wrong tokens", headers={"Retry-After": str(round(wait))})
        self._log.warning(Event.TOKEN_REFUSED, client=peer.client)
        headers = {"WWW-Authenticate": 'Bearer realm="tlstunnel", error="invalid_token"'}
        return Unacceptable(401, "this token is not known", headers=headers)


def name_cookie(*, secure: bool) -> str:
    """Return the name of the cookie. Browsers take one that begins with __Host- only from the host itself, with TLS."""
    return f"__Host-{_COOKIE}" if secure else _COOKIE


def render_cookie(value: str, *, secure: bool, seconds: float) -> str:
    """Return the field Set-Cookie; with 0 `seconds`, the browser forgets the cookie."""
    flags = "; Secure" if secure else ""
    return f"{name_cookie(secure=secure)}={value}; Max-Age={seconds:.0f}; Path=/; HttpOnly; SameSite=Strict{flags}"


def read_cookie(cookies: str, *, secure: bool) -> str:
    """Return the value of the cookie in the field Cookie, "" if there is none."""
    # Not http.cookies, which stops at the first cookie of another server that it does not like.
    found = dict(reversed([part.strip().partition("=")[::2] for part in cookies.split(";")]))
    names = (name_cookie(secure=True),) if secure else (name_cookie(secure=False), name_cookie(secure=True))
    return next((found[name] for name in names if name in found), "")


def _describe(token: LoadedToken, peer: Peer) -> str:
    return f"token {token.name}" if peer.uid is None else f"token {token.name} (uid {peer.uid})"
