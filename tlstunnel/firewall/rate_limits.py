"""Rate limits: how often someone may ask for a tunnel, and how many they may hold.

A limit counts by a key, made of what is known of the request. What a client is told when it is over is in the fields of
draft-ietf-httpapi-ratelimit-headers-11.

A key of which a part is missing (no such cookie, no client certificate) is not counted by that limit: one counter for
all who leave it out would let one of them refuse the others, and whoever leaves a cookie out to escape could as well
send another one each time. So a key that clients choose limits those alone who want to be known, and a limit by `ip`
belongs beside it.
"""

import difflib
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv6Address, ip_address
from typing import Self
from urllib.parse import quote

from limits import RateLimitItem, parse_many

from tlstunnel.addresses import quoted
from tlstunnel.config import RateLimitConfig
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.counters import Counters, Exceeded, LimitCheck, LimitResult, Strategy
from tlstunnel.firewall.facts import Facts
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Reason
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry

MAX_MOVING = 1_000
"""The largest number of a moving window: it keeps the time of each request, 8 bytes, as long as the window."""

MAX_LIMIT = 10**15 - 1
"""The largest number of any limit, since it stands in a field: RFC 9651 section 3.3.1."""

MAX_WINDOW = 366 * 86_400
"""Seconds. What is counted in memory does not live longer than the process anyway."""

_EXAMPLES = '"30/minute", "1000/hour" or "10 per 10 seconds"'
_SHORT_UNITS = {
    **dict.fromkeys(("s", "sec", "secs"), "second"),
    **dict.fromkeys(("m", "min", "mins"), "minute"),
    **dict.fromkeys(("h", "hr", "hrs"), "hour"),
    "d": "day",
    "w": "7 days",
}
_UNITS = ("second", "minute", "hour", "day", "month", "year")
_PARTS = re.compile(r"\s*([0-9]+)\s*(?:/|per\b)\s*([0-9]*)\s*([A-Za-z]+)\s*")
_KEYS = ("ip", "header:NAME", "cookie:NAME", "path", "host", "ja4", "client_subject")
# RFC 9110 section 5.6.2: names of fields, and of cookies by RFC 6265 section 4.1.1.
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}")

REPORT_SECONDS = 60.0
"""How often the failures of the same limit's `when` are reported: whoever makes it fail must not fill the log."""

CompileWhen = Callable[[str, Callable[[str], None]], Callable[[Facts], bool]]
"""Makes a condition of an expression: `Expressions.condition`.

Raises ConfigurationError for what is none. The condition raises nothing; where it has no result, it tells the function
why.
"""

_OUTCOMES: dict[Exceeded, str] = {
    "": "passed",
    "limit": "over",
    "tunnels": "too many tunnels",
    "blocked": "blocked",
}
"""What came of a limit, in metrics and in words."""

_Reader = Callable[[Facts], str | None]


class Lease:
    """The tunnels that one request was counted for; whoever holds it calls `release` when the tunnel has ended."""

    __slots__ = ("_counters", "_keys")

    def __init__(self, counters: Counters, keys: Sequence[str] = ()) -> None:
        self._counters = counters
        self._keys = tuple(keys)

    def close(self) -> None:
        """Give them back, once, however often it is called. Never waits."""
        keys, self._keys = self._keys, ()
        if keys:
            self._counters.return_tunnels(keys)


@dataclass(frozen=True, slots=True)
class LimitsOutcome:
    """What the limits say of a request.

    `refusal` is None where it may pass, and `limit` is then empty, else the name of the first limit that was exceeded.
    `lease` holds what was taken: nothing where the request is refused. `logged` names what only logs and was exceeded.
    """

    refusal: Refusal | None
    limit: str
    lease: Lease
    logged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LimitTrace:
    """What one limit outcome, for `tlstunnel firewall explain`.

    `key` has the parts of its key with their values, as far as they are there; `outcome` says how it came out.
    """

    limit: str
    mode: str
    key: tuple[tuple[str, str], ...]
    result: str


class RateLimits:
    """All limits that a request meets, checked at once.

    A request is counted by all of them or by none (`Counters.check`): one that is refused uses up no other limit.
    Limits of `scope`, a site's name or "" for those of all sites, share counters with no other scope; ``+`` joins those
    of two. `metrics` count the outcome of each limit; `report` is called with the name of a limit whose `when` could
    not be evaluated, and why, once a minute for each. Raises ConfigurationError, which names the limit.
    """

    def __init__(  # noqa: PLR0913 - what it is made of, and whom to tell
        self,
        configs: Iterable[RateLimitConfig],
        counters: Counters,
        compile_when: CompileWhen,
        *,
        scope: str = "",
        metrics: Registry | None = None,
        report: Callable[[str, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = counters
        self._counts = (Registry() if metrics is None else metrics)[families.RATE_LIMITS]
        self._report = report
        self._clock = clock
        self._limits = tuple(_Limit(config, scope, compile_when, self._failed) for config in configs)
        names = [limit.name for limit in self._limits]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"rate limit {quoted(name)}: there are two of this name; they would be one")

    def __add__(self, other: Self) -> Self:
        """These limits and then those, of the same counters: one check for both."""
        joined = copy(self)
        joined._limits = self._limits + other._limits
        return joined

    def __len__(self) -> int:
        return len(self._limits)

    async def judge(self, facts: Facts, trace: list[LimitTrace] | None = None) -> LimitsOutcome:
        """Count the request, or say why it is refused. `trace` gets a `LimitTrace` for each limit."""
        applying: list[tuple[_Limit, LimitCheck]] = []
        for limit in self._limits:
            check = limit.make_check(facts)
            if check is not None:
                applying.append((limit, check))
        results = await self._counters.check([check for _, check in applying]) if applying else []
        if trace is not None:
            found = {limit: result for (limit, _), result in zip(applying, results, strict=True)}
            trace += (limit.trace(facts, found.get(limit)) for limit in self._limits)
        over: list[tuple[_Limit, LimitResult]] = []
        logged: list[str] = []
        taken: list[str] = []
        for (limit, check), result in zip(applying, results, strict=True):
            self._counts.add(facts.site, limit.name, _OUTCOMES[result.over], limit.mode)
            if result.over:
                if limit.enforced:
                    over.append((limit, result))
                else:
                    logged.append(limit.name)
            elif check.max_tunnels:
                taken.append(check.key)
        if over:
            return LimitsOutcome(_refuse(over), over[0][0].name, Lease(self._counters), tuple(logged))
        return LimitsOutcome(None, "", Lease(self._counters, taken), tuple(logged))

    def _failed(self, limit: "_Limit", site: str, why: str) -> None:
        self._counts.add(site, limit.name, "condition failed", limit.mode)
        now = self._clock()
        if self._report and now >= limit.report_from:
            limit.report_from = now + REPORT_SECONDS
            self._report(limit.name, why)


class _Limit:
    """One limit, made ready. `report_from` is when a failure of its `when` is reported again."""

    def __init__(
        self,
        config: RateLimitConfig,
        scope: str,
        compile_when: CompileWhen,
        failed: Callable[["_Limit", str, str], None],
    ) -> None:
        self.report_from = -math.inf
        self._failed = failed
        self._condition_error = ""
        self.name = config.name
        self.mode = config.mode
        self.enforced = config.mode == "block"
        self._strategy: Strategy = config.strategy
        self._block_for = float(config.block_for or 0)
        self._max_tunnels = config.max_tunnels or 0
        try:
            if config.limit is None and not config.max_tunnels:
                raise ConfigurationError(f"it limits nothing; write limit = {_EXAMPLES}, or max_tunnels = 50")
            self._item = None if config.limit is None else _parse_limit(config.limit, config.strategy)
            if not config.key:
                raise ConfigurationError(f"key names nothing to count by; it may hold {', '.join(_KEYS)}")
            self._readers = tuple((kind, _parse_key(kind, config.ipv6_prefix)) for kind in config.key)
        except ConfigurationError as error:
            raise ConfigurationError(f"rate limit {quoted(config.name)}: {error}") from None
        try:
            self._when = None if config.when is None else compile_when(config.when, self._on_condition_failed)
        except ConfigurationError as error:
            raise ConfigurationError(f"rate limit {quoted(config.name)}: when: {error}") from None
        # What a key stands for in a storage that several limits, sites and processes share.
        self._prefix = blake2b(_frame((scope, config.name, *config.key)), digest_size=16)

    def applies(self, facts: Facts) -> bool:
        """Whether `when` holds, or gives no result: leaving out a header that it reads must not switch a limit off."""
        if self._when is None:
            return True
        self._condition_error = ""
        if self._when(facts):
            return True
        if self._condition_error:
            self._failed(self, facts.site, self._condition_error)
        return bool(self._condition_error)

    def _on_condition_failed(self, why: str) -> None:
        self._condition_error = why

    def describe(self, over: Exceeded) -> str:
        """Return what was exceeded, for the log and `firewall explain`."""
        word = _OUTCOMES[over]
        return word if self.enforced else f"{word}, let through"

    def make_check(self, facts: Facts) -> LimitCheck | None:
        """What to ask about the request; None where the limit does not apply.

        Where `when` is false but `block_for` is set, that is still checked: who is blocked stays blocked.
        """
        applies = self.applies(facts)
        if not applies and not self._block_for:
            return None
        values = [reader(facts) for _, reader in self._readers]
        if None in values:
            return None
        key = self._prefix.copy()
        key.update(_frame([value for value in values if value is not None]))
        item, max_tunnels = (self._item, self._max_tunnels) if applies else (None, 0)
        return LimitCheck(key.hexdigest(), item, self._strategy, max_tunnels, self._block_for, self.enforced)

    def header_items(self, result: LimitResult, seconds: int) -> tuple[str, str]:
        """The limit's items of RateLimit (section 4.1 of the draft) and of RateLimit-Policy (section 3.1)."""
        name = _render_string(self.name)
        if self._item is None or result.over == "tunnels":
            return f"{name};r=0", f'{name};q={self._max_tunnels};qu="concurrent-requests"'
        return f"{name};r=0;t={seconds}", f"{name};q={self._item.amount};w={self._item.get_expiry()}"

    def trace(self, facts: Facts, result: LimitResult | None) -> LimitTrace:
        """What the limit found; `result` is None where nothing was checked."""
        values = [(kind, reader(facts)) for kind, reader in self._readers]
        missing = [kind for kind, value in values if value is None]
        if result is not None and result.over:
            outcome = f"{self.describe(result.over)}, for {_round_up(result.wait)} s"
        elif missing:
            outcome = f"does not apply: the request has no {' and no '.join(missing)}"
        elif not self.applies(facts):
            outcome = "does not apply: its when is false"
        else:
            outcome = "within"
        key = tuple((kind, value) for kind, value in values if value is not None)
        return LimitTrace(self.name, "block" if self.enforced else "log", key, outcome)


def _refuse(over: list[tuple[_Limit, LimitResult]]) -> Refusal:
    """The 429 of what was exceeded: RFC 6585 section 4, with the longest wait of them."""
    wait = max(_round_up(result.wait) for _, result in over)
    items = [limit.header_items(result, _round_up(result.wait)) for limit, result in over]
    limit, result = over[0]
    tunnels = result.over == "tunnels"
    what = "too many tunnels are open" if tunnels else "too many handshakes"
    return Refusal(
        429,
        f"{Reason.RATE_LIMIT}: {limit.name}",
        f"{what}; try again in {wait} s",
        (
            (b"Retry-After", b"%d" % wait),
            (b"RateLimit", ", ".join(item for item, _ in items).encode("ascii")),
            (b"RateLimit-Policy", ", ".join(policy for _, policy in items).encode("ascii")),
        ),
        limit.describe(result.over),
    )


def _round_up(wait: float) -> int:
    """Whole seconds of which a client may wait: not before the end, and one at least."""
    return max(math.ceil(wait), 1)


def _render_string(text: str) -> str:
    """A text as a String of RFC 9651 section 3.3.3, which is ASCII: what is not, percent-encoded."""
    ascii_only = "".join(char if " " <= char <= "~" else quote(char, safe="", errors="replace") for char in text)
    return '"' + ascii_only.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _frame(values: Iterable[str]) -> bytes:
    """The values so that no others give the same bytes: each behind its length."""
    encoded = [value.encode("utf-8", "surrogatepass") for value in values]
    return b"".join(b"%d:%b" % (len(value), value) for value in encoded)


def _parse_limit(text: str, strategy: Strategy) -> RateLimitItem:
    """Read the notation of `limits`. Raises ConfigurationError."""
    try:
        if len(text) > 100:
            raise ValueError
        items = parse_many(text)
    except ValueError:
        raise ConfigurationError(f"{quoted(text)} is not a limit; write {_suggest(text)}") from None
    if len(items) > 1:
        raise ConfigurationError(f"{quoted(text)} is more than one limit; write a rate limit for each")
    (item,) = items
    multiples = re.search(r"(?:/|per)\s*([0-9]+)", text, re.IGNORECASE)
    if not item.amount or (multiples and not int(multiples[1])):
        raise ConfigurationError(
            f'{quoted(text)} lets nothing through; write {_EXAMPLES}, or a rule with action = "block" to refuse all'
        )
    if item.amount > MAX_LIMIT or item.get_expiry() > MAX_WINDOW:
        raise ConfigurationError(f"{quoted(text)} is out of reach; a limit is less than 10^15 in at most 366 days")
    if strategy == "moving" and item.amount > MAX_MOVING:
        raise ConfigurationError(
            f"{quoted(text)}: a moving window keeps the time of each request, of {MAX_MOVING} at most;"
            ' write strategy = "sliding", which keeps two numbers'
        )
    return type(item)(item.amount, item.multiples, namespace=strategy)


def _suggest(text: str) -> str:
    """What `text` may have meant: ``10/10s`` is the notation of others."""
    parts = _PARTS.fullmatch(text[:100])
    if not parts:
        return _EXAMPLES
    amount, multiples, unit = parts[1], parts[2], parts[3].lower()
    near = difflib.get_close_matches(unit, _UNITS, n=1)
    word = _SHORT_UNITS.get(unit) or (near[0] if near else "")
    if word == "7 days" and not multiples:
        return f'"{amount} per 7 days"'
    if not word or word == "7 days":
        return f"{_EXAMPLES}; a time is in {', '.join(_UNITS)}"
    return f'"{amount} per {multiples} {word}s"' if multiples else f'"{amount}/{word}"'


def _parse_key(kind: str, ipv6_prefix: int) -> _Reader:
    """What reads one part of a key from the facts, None where it is missing. Raises ConfigurationError."""
    source, colon, name = kind.partition(":")
    if kind == "ip":
        return lambda facts: _client_network(facts.ip, ipv6_prefix)
    if colon and source == "header" and _TOKEN.fullmatch(name):
        lower = name.lower()
        return lambda facts: facts.headers.get(lower)
    if colon and source == "cookie" and _TOKEN.fullmatch(name):
        return lambda facts: facts.cookies.get(name)
    if kind in _READERS:
        return _READERS[kind]
    raise ConfigurationError(_describe_unknown(kind))


_READERS: dict[str, _Reader] = {
    "path": lambda facts: facts.path,
    "host": lambda facts: facts.host,
    "ja4": lambda facts: facts.tls_ja4 or None,
    "client_subject": lambda facts: facts.client_subject or None,
}


def _describe_unknown(kind: str) -> str:
    source, colon, name = kind[:300].partition(":")
    near = difflib.get_close_matches(
        source.lower(), ("header", "cookie", *(key for key in _KEYS if ":" not in key)), n=1
    )
    if not near:
        return f"unknown key {quoted(kind)}; it may be {', '.join(_KEYS)}"
    if near[0] not in ("header", "cookie"):
        return f'unknown key {quoted(kind)}; did you mean "{near[0]}"?'
    if colon and near[0] != source and _TOKEN.fullmatch(name):
        return f'unknown key {quoted(kind)}; did you mean "{near[0]}:{name}"?'
    return f'key {quoted(kind)} names no {near[0]}; write "{near[0]}:NAME", such as "{near[0]}:X-User"'


# Several limits ask about the same address; parsing one takes 3 us.
@lru_cache(maxsize=1024)
def _client_network(text: str, ipv6_prefix: int) -> str:
    """The address that counts: of IPv6 the network, since a client has all of it; as it is, what is no address.

    A client on a Unix socket has no address: all of those count as one.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return text
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    host_bits = 128 - ipv6_prefix
    return f"{IPv6Address(int(address) >> host_bits << host_bits)}/{ipv6_prefix}"
