"""The bodies of requests and responses that are no commands or results: they are what is sent, and what is described.

Tested by tests/unit/test_admin_openapi.py and tests/promises/test_admin_api.py.
"""

import msgspec

from tlstunnel.config.admin import Access


class Problem(msgspec.Struct, frozen=True):
    """Why a request was refused, or failed. `error` has all problems in one line."""

    error: str
    problems: list[str]


class Alive(msgspec.Struct, frozen=True):
    """The admin process responds."""

    alive: bool = True


class Login(msgspec.Struct, frozen=True):
    """A token, as in a file of `admin.tokens`."""

    token: str


class LoggedIn(msgspec.Struct, frozen=True):
    """A session has begun, for so many seconds. `csrf` has to be sent with each action, in the field X-CSRF-Token."""

    name: str
    access: Access
    csrf: str
    seconds: float


class LoggedOut(msgspec.Struct, frozen=True):
    """The session is over."""


class SessionResult(msgspec.Struct, frozen=True):
    """Who sends this request, and what they may do: "read", or "full" for actions too."""

    who: str
    access: Access
    logged_in: bool


class Begun(msgspec.Struct, frozen=True):
    """It has begun, and goes on."""
