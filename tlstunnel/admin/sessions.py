"""The sessions of browsers, after a login with a token. They are in memory, so they end with the admin process.

A browser sends its cookies to every port of a host. So a server at another port, such as an origin behind this tunnel,
may see the cookie. Therefore a session has a second secret, `csrf`, which the page keeps in its own storage and sends
in a field with every action: that storage belongs to one port.

Tested by tests/unit/test_admin_access.py.
"""

import hmac
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tlstunnel.serving.admin_files import LoadedToken, make_digest

LASTS_SECONDS = 12 * 3600.0
"""How long a login lasts: a working day."""

MOST = 100
"""Sessions at once. When there are more, the oldest ends of the token that has the most, so no other loses one."""

LONGEST_COOKIE = 100


@dataclass(frozen=True, slots=True)
class Session:
    """A login. `until` is by the clock of `Sessions`."""

    id: bytes
    token: LoadedToken
    csrf: str
    until: float


class Sessions:
    """All sessions, by the digest of what is in their cookie."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(self, token: LoadedToken) -> tuple[str, Session]:
        """Begin a session; return the value of its cookie, which is new each time, and the session."""
        cookie = secrets.token_urlsafe(32)
        session = Session(make_digest(cookie), token, secrets.token_urlsafe(32), self._clock() + LASTS_SECONDS)
        self._sessions[session.id] = session
        self._expire()
        if len(self._sessions) > MOST:
            (most, _), *_ = Counter(one.token for one in self._sessions.values()).most_common(1)
            self.end(next(one for one in self._sessions.values() if one.token == most))
        return cookie, session

    def find(self, cookie: str) -> Session | None:
        """Return the session with this cookie, None if there is none or it is over."""
        if not cookie or len(cookie) > LONGEST_COOKIE:
            return None
        session = self._sessions.get(make_digest(cookie))
        return session if session is not None and self.is_open(session) else None

    def is_open(self, session: Session) -> bool:
        """Return whether a session still holds."""
        return self._sessions.get(session.id) is session and self._clock() < session.until

    def end(self, session: Session) -> None:
        """End a session."""
        self._sessions.pop(session.id, None)

    def keep_those_of(self, tokens: Iterable[LoadedToken]) -> None:
        """End the sessions whose token is gone, or has changed."""
        known = set(tokens)
        for session in [one for one in self._sessions.values() if one.token not in known]:
            self.end(session)

    def _expire(self) -> None:
        now = self._clock()
        for session in [one for one in self._sessions.values() if one.until <= now]:
            self.end(session)


def is_csrf_of(session: Session, text: str) -> bool:
    """Return whether this is the second secret of a session, in constant time."""
    return hmac.compare_digest(session.csrf.encode(), text.encode("utf-8", "surrogateescape"))
