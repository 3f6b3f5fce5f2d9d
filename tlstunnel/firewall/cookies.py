"""Cookies as servers read them: every value of a name, since servers disagree on which one counts.

A browser sends several cookies of one name if they differ in Path or Domain (RFC 6265 section 5.4). Servers in Python
use the last one, most others the first. So rules and limits see all of them.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import product

from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Reason

MAX_COOKIES = 200
"""Cookies of a request. Chromium and Firefox keep 180 per site; RFC 6265 section 6.1 requires 50."""

MAX_VALUES = 4
"""Different values of one cookie that a rule or a limit reads. A browser rarely sends more than two."""

MAX_COMBINATIONS = 16
"""How often one rule or limit is evaluated for a request: two cookies with four values, four cookies with two."""

Values = Mapping[str, tuple[str, ...]]

_QUOTED = r'"(?:[^\\"]|\\.)*+"'
# How Python's http.cookies finds pairs: white space separates them too, and a quoted value may contain anything.
# They may overlap: 'a= b="c"' has an empty a and b. Possessive, so that the time is proportional to the length.
_PAIR = re.compile(rf"(?:^|(?<=[;\s]))(?=([^\s=;]++)\s*+=(\s*+)({_QUOTED}|[^;\s]*+))")
_UNUSUAL = re.compile(r'["\t\x85\xa0]|[^; ] +[^; ]')
"""Where the pairs of http.cookies may not be those between semicolons."""

_BACKSLASH = re.compile(r"\\(?:[0-3][0-7][0-7]|.)", re.DOTALL)
_OCTALS = {f"\\{code:03o}": chr(code) for code in range(256)}
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")  # RFC 3986 section 2.3
_ESCAPES = {f"%{a}{b}": chr(int(a + b, 16)) for a in "0123456789abcdefABCDEF" for b in "0123456789abcdefABCDEF"}
_UNNEEDED_ESCAPES = {e: char if char in _UNRESERVED else e.upper() for e, char in _ESCAPES.items()}


def parse_cookies(text: str) -> dict[str, tuple[str, ...]]:
    """Return the different values of each name in a Cookie field, in order. Takes a time proportional to its length.

    A quoted value loses its quotes and backslashes, as in Python's http.cookies. Escapes of characters that need none
    are decoded (``%61`` to ``a``): Express, PHP and Rack decode all, and no server sends such ones.
    """
    pairs = _split_at_semicolons(text)
    if is_unusual(text):
        for name, space, value in _PAIR.findall(text):
            pairs += [(name, value), (name, "")] if space else [(name, value)]
    found: dict[str, dict[str, None]] = {}
    for name, value in dict.fromkeys(pairs):
        found.setdefault(name, {})[_normalise(value)] = None
    return {name: tuple(values) for name, values in found.items()}


def is_unusual(text: str) -> bool:
    """Return whether servers may find other cookies in this field than those between semicolons."""
    return _UNUSUAL.search(text) is not None


def _split_at_semicolons(text: str) -> list[tuple[str, str]]:
    """Return the pairs as Starlette, Django, Tornado and Express split them. A part without ``=`` is no cookie."""
    pairs = (part.partition("=") for part in text.split(";"))
    # Without an argument, strip removes what Python's servers remove, such as a no-break space.
    return [(name.strip(), value.strip()) for name, equals, value in pairs if equals]


def _normalise(value: str) -> str:
    if value[:1] == '"' and len(value) > 1 and value[-1] == '"':
        value = value[1:-1]
        if "\\" in value:
            value = _BACKSLASH.sub(lambda match: _OCTALS.get(match[0], match[0][1:]), value)
    return _ESCAPE.sub(lambda match: _UNNEEDED_ESCAPES[match[0]], value) if "%" in value else value


def combine(values: Values, names: Iterable[str] | None) -> list[dict[str, str]]:
    """Return every combination of the values of `names`, with the first value of each other name.

    The first combination has the first value of each. With None all names are combined. Raises `Refusal` (400) for more
    values or combinations than rules are evaluated with, since leaving some out would hide them from the rules.
    """
    first = {name: found[0] for name, found in values.items()}
    repeated = [name for name in (values if names is None else names) if len(values.get(name, ())) > 1]
    if not repeated:
        return [first]
    choices = [limit_values(name, values[name]) for name in repeated]
    refuse_many_combinations(choices)
    return [first | dict(zip(repeated, chosen, strict=True)) for chosen in product(*choices)]


def find_identities(values: Values, name: str) -> tuple[str, ...]:
    """Return the values of a cookie in a form that is the same for all spellings of a value, for counting.

    Raises `Refusal` (400) for more than `MAX_VALUES`.
    """
    found = limit_values(name, values.get(name, ()))
    return tuple(dict.fromkeys(_decode(value) for value in found))


def limit_values(name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the values. Raises `Refusal` (400) for more than `MAX_VALUES`."""
    if len(values) > MAX_VALUES:
        raise Refusal(
            400, Reason.TOO_MANY_COOKIES, f"the request has more than {MAX_VALUES} values of one cookie", detail=name
        )
    return values


def refuse_many_combinations(choices: Iterable[tuple[str, ...]]) -> None:
    """Raise `Refusal` (400) if there are more than `MAX_COMBINATIONS` combinations of one value of each."""
    combinations = 1
    for values in choices:
        combinations *= len(values)
    if combinations > MAX_COMBINATIONS:
        raise Refusal(400, Reason.TOO_MANY_COOKIES, "the request has several values of too many cookies")


def _decode(value: str) -> str:
    """Decode all escapes, and ``+`` as a space: servers that decode cookies treat these spellings alike."""
    return _ESCAPE.sub(lambda match: _ESCAPES[match[0]], value.replace("+", " ")) if "%" in value else value
