"""Rate limits: how often a client may open a tunnel, and how many tunnels it may have open.

A limit counts requests by a key, which is made of the request's facts. A client that exceeds a limit gets the fields of
draft-ietf-httpapi-ratelimit-headers-11.

A request that lacks a part of the key (no such cookie, no client certificate) is not counted by that limit. With one
counter for all such requests, one client could get the others refused, and a client that leaves out a cookie to escape
the limit could as well send a new one each time. So a key that clients choose limits only cooperative clients, and
needs a limit by `ip` next to it.
"""

import difflib
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from ipaddress import IPv6Address, ip_address
from itertools import product
from typing import Self
from urllib.parse import quote

from limits import parse_many

from tlstunnel.addresses import quoted
from tlstunnel.config import RateLimitConfig
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.cookies import find_identities, refuse_many_combinations
from tlstunnel.firewall.facts import Facts
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Reason
from tlstunnel.metrics import families
from tlstunnel.metrics.registry import Registry
from tlstunnel.state.counters import (
    MAX_AMOUNT,
    MAX_MOVING,
    MAX_SECONDS,
    Counters,
    CountersUnavailable,
    Exceeded,
    LimitCheck,
    LimitResult,
    Strategy,
)
from tlstunnel.state.uncounted import refuse_uncounted

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
"""The shortest time between two reports that the same limit's `when` failed, so that a client cannot fill the log."""

CompileWhen = Callable[[str, Callable[[str], None]], Callable[[Facts], bool]]
"""Compiles an expression into a condition, as `Expressions.condition` does. Raises ConfigurationError.

The condition never raises. If it cannot be evaluated, it calls the function with the reason and returns False.
"""

_OUTCOMES: dict[Exceeded, str] = {
    "": "passed",
    "limit": "exceeded",
    "tunnels": "too many tunnels",
    "blocked": "blocked",
}
"""The outcomes of a limit, in metrics and in text."""

_Reader = Callable[[Facts], tuple[str, ...]]
"""Returns the values of one part of a key, none if it is missing. Only a cookie has several."""


class Lease:
    """The tunnels that one request was counted under. Its holder calls `close` when the tunnel has ended."""

    __slots__ = ("_counters", "_keys")

    def __init__(self, counters: Counters, keys: Sequence[str] = ()) -> None:
        self._counters = counters
        self._keys = tuple(keys)

    def close(self) -> None:
        """Return the tunnels to the counters. Closing twice is harmless. Never waits."""
        keys, self._keys = self._keys, ()
        if keys:
            self._counters.return_tunnels(keys)


@dataclass(frozen=True, slots=True)
class LimitsOutcome:
    """The decision of the rate limits about a request.

    `refusal` is None if the request may pass. Otherwise `limit` is the name of the first exceeded limit, and `lease`
    holds nothing. `logged` names the exceeded limits in mode "log".
    """

    refusal: Refusal | None
    limit: str
    lease: Lease
    logged: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LimitTrace:
    """The result of one limit, for `tlstunnel firewall explain`.

    `key` holds the parts of the key that the request has, with their values; a cookie may have several.
    """

    limit: str
    mode: str
    key: tuple[tuple[str, str], ...]
    result: str


class RateLimits:
    """All limits of a site, checked at once.

    A request is counted by all of them or by none (`Counters.check`), so a refused request uses up no limit. `scope` is
    a site's name, or "" for the limits of all sites; different scopes never share a counter, and ``+`` joins the limits
    of two. `metrics` counts the outcome of each limit. `report` is called with the name of a limit whose `when` could
    not be evaluated and the reason, at most once a minute for each limit. Raises ConfigurationError, which names the
    limit.
    """

    def __init__(  # noqa: PLR0913 - the dependencies
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
        self._limits = tuple(_Limit(config, scope, compile_when, self._report_failure) for config in configs)
        names = [limit.name for limit in self._limits]
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(
                    f"rate limit {quoted(name)}: two limits have this name and would share a counter"
                )

    def __add__(self, other: Self) -> Self:
        """Return these limits followed by `other`, which must use the same counters."""
        joined = copy(self)
        joined._limits = self._limits + other._limits
        return joined

    def __len__(self) -> int:
        return len(self._limits)

    @property
    def depend_on_path(self) -> bool:
        """Whether the path may decide what is counted."""
        return any(limit.depends_on_path for limit in self._limits)

    async def check(self, facts: Facts, trace: list[LimitTrace] | None = None) -> LimitsOutcome:
        """Count the request, or return its refusal. `trace` receives a `LimitTrace` for each limit.

        A limit by a cookie counts each of its values. Raises `Refusal` (400) for more of them than are counted, and
        for a repeated field that is a key.
        """
        applying = [(limit, check) for limit in self._limits for check in limit.make_checks(facts)]
        try:
            results = await self._counters.check([check for _, check in applying]) if applying else []
        except CountersUnavailable as error:
            return self._refuse_uncounted([limit for limit, _ in applying], error)
        found: dict[_Limit, LimitResult] = {}
        taken: list[str] = []
        for (limit, check), result in zip(applying, results, strict=True):
            found[limit] = max(found.get(limit, result), result, key=_weigh)
            if check.max_tunnels and not result.exceeded:
                taken.append(check.key)
        if trace is not None:
            trace += (limit.trace(facts, found.get(limit)) for limit in self._limits)
        exceeded: list[tuple[_Limit, LimitResult]] = []
        logged: list[str] = []
        for limit, result in found.items():
            self._counts.add(facts.site, limit.name, _OUTCOMES[result.exceeded], limit.mode)
            if result.exceeded and limit.enforced:
                exceeded.append((limit, result))
            elif result.exceeded:
                logged.append(limit.name)
        if exceeded:
            return LimitsOutcome(_refuse(exceeded), exceeded[0][0].name, Lease(self._counters), tuple(logged))
        return LimitsOutcome(None, "", Lease(self._counters, taken), tuple(logged))

    def _refuse_uncounted(self, applying: "Sequence[_Limit]", error: CountersUnavailable) -> LimitsOutcome:
        """Refuse a request that could not be counted, if one of its limits is enforced."""
        lease = Lease(self._counters)
        enforced = [limit.name for limit in applying if limit.enforced]
        if not enforced:
            return LimitsOutcome(None, "", lease, ())
        return LimitsOutcome(refuse_uncounted(error), enforced[0], lease, ())

    def _report_failure(self, limit: "_Limit", site: str, why: str) -> None:
        self._counts.add(site, limit.name, "condition failed", limit.mode)
        now = self._clock()
        if self._report and now >= limit.report_from:
            limit.report_from = now + REPORT_SECONDS
            self._report(limit.name, why)


class _Limit:
    """One limit, compiled. A failure of its `when` is reported from the time `report_from` on."""

    def __init__(
        self,
        config: RateLimitConfig,
        scope: str,
        compile_when: CompileWhen,
        failed: Callable[["_Limit", str, str], None],
    ) -> None:
        self.report_from = -math.inf
        self._report_failure_to = failed
        self._condition_error = ""
        self.name = config.name
        self.mode = config.mode
        self.enforced = config.mode == "block"
        self._strategy: Strategy = config.strategy
        self._block_for = float(config.block_for or 0)
        self._max_tunnels = config.max_tunnels or 0
        try:
            if config.limit is None and not config.max_tunnels:
                raise ConfigurationError(
                    f"it has neither limit nor max_tunnels; write limit = {_EXAMPLES}, or max_tunnels = 50"
                )
            self._amount, self._window = (0, 0) if config.limit is None else _parse_limit(config.limit, config.strategy)
            if not config.key:
                raise ConfigurationError(f"key is empty; it may contain {', '.join(_KEYS)}")
            self._readers = tuple((kind, _parse_key(kind, config.ipv6_prefix)) for kind in config.key)
        except ConfigurationError as error:
            raise ConfigurationError(f"rate limit {quoted(config.name)}: {error}") from None
        try:
            self._when = None if config.when is None else compile_when(config.when, self._on_condition_failed)
        except ConfigurationError as error:
            raise ConfigurationError(f"rate limit {quoted(config.name)}: when: {error}") from None
        self.depends_on_path = "path" in config.key or config.when is not None
        # Makes keys unique in a storage that limits, sites and processes may share.
        self._prefix = blake2b(_frame((scope, config.name, *config.key)), digest_size=16)

    def applies(self, facts: Facts) -> bool:
        """Return whether `when` is true or fails: leaving out a header that it reads must not disable the limit."""
        if self._when is None:
            return True
        self._condition_error = ""
        if self._when(facts):
            return True
        if self._condition_error:
            self._report_failure_to(self, facts.site, self._condition_error)
        return bool(self._condition_error)

    def _on_condition_failed(self, why: str) -> None:
        self._condition_error = why

    def describe(self, exceeded: Exceeded) -> str:
        """Return what was exceeded, for the log and `firewall explain`."""
        outcome = _OUTCOMES[exceeded]
        return outcome if self.enforced else f"{outcome}, only logged"

    def make_checks(self, facts: Facts) -> list[LimitCheck]:
        """Return the checks of the request, none if the limit does not apply: one for each combination of values.

        If `when` is false but `block_for` is set, only the block is checked: it covers all requests of the key.
        """
        applies = self.applies(facts)
        if not applies and not self._block_for:
            return []
        values = [reader(facts) for _, reader in self._readers]
        refuse_many_combinations(values)
        amount, max_tunnels = (self._amount, self._max_tunnels) if applies else (0, 0)
        of_all = (amount, self._window, self._strategy, max_tunnels, self._block_for, self.enforced)
        return [LimitCheck(self._make_key(combination), *of_all) for combination in product(*values)]

    def _make_key(self, values: Iterable[str]) -> str:
        key = self._prefix.copy()
        key.update(_frame(values))
        return key.hexdigest()

    def header_items(self, result: LimitResult, seconds: int) -> tuple[str, str]:
        """Return the limit's items of RateLimit (section 4.1 of the draft) and RateLimit-Policy (section 3.1)."""
        name = _render_string(self.name)
        if not self._amount or result.exceeded == "tunnels":
            return f"{name};r=0", f'{name};q={self._max_tunnels};qu="concurrent-requests"'
        return f"{name};r=0;t={seconds}", f"{name};q={self._amount};w={self._window}"

    def trace(self, facts: Facts, result: LimitResult | None) -> LimitTrace:
        """Return what the limit found. `result` is None if it was not checked."""
        values = [(kind, reader(facts)) for kind, reader in self._readers]
        missing = [kind for kind, found in values if not found]
        if result is not None and result.exceeded:
            text = f"{self.describe(result.exceeded)}, for {_round_up(result.wait)} s"
        elif missing:
            text = f"does not apply: the request has no {' and no '.join(missing)}"
        elif not self.applies(facts):
            text = "does not apply: when is false"
        else:
            text = "within the limit"
        key = tuple((kind, value) for kind, found in values for value in found)
        return LimitTrace(self.name, "block" if self.enforced else "log", key, text)


def _weigh(result: LimitResult) -> tuple[bool, float]:
    """Order the results of one limit: one that is exceeded, for the longest time, is the limit's."""
    return bool(result.exceeded), result.wait


def _refuse(exceeded: list[tuple[_Limit, LimitResult]]) -> Refusal:
    """Return the 429 (RFC 6585 section 4) for the exceeded limits, with the longest wait of them."""
    wait = max(_round_up(result.wait) for _, result in exceeded)
    items = [limit.header_items(result, _round_up(result.wait)) for limit, result in exceeded]
    limit, result = exceeded[0]
    tunnels = result.exceeded == "tunnels"
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
        limit.describe(result.exceeded),
    )


def _round_up(wait: float) -> int:
    """Round a wait up to whole seconds, at least one, so that a client does not come back too early."""
    return max(math.ceil(wait), 1)


def _render_string(text: str) -> str:
    """Render a text as a String of RFC 9651 section 3.3.3, with percent-encoding for what is not ASCII."""
    ascii_only = "".join(char if " " <= char <= "~" else quote(char, safe="", errors="replace") for char in text)
    return '"' + ascii_only.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _frame(values: Iterable[str]) -> bytes:
    """Encode values so that no other values result in the same bytes: each after its length."""
    encoded = [value.encode("utf-8", "surrogatepass") for value in values]
    return b"".join(b"%d:%b" % (len(value), value) for value in encoded)


def _parse_limit(text: str, strategy: Strategy) -> tuple[int, int]:
    """Parse the notation of the library `limits` into an amount and a window in seconds. Raises ConfigurationError."""
    try:
        if len(text) > 100:
            raise ValueError
        items = parse_many(text)
    except ValueError:
        raise ConfigurationError(f"{quoted(text)} is not a limit; write {_suggest(text)}") from None
    if len(items) > 1:
        raise ConfigurationError(f"{quoted(text)} contains several limits; write a rate limit for each")
    (item,) = items
    multiples = re.search(r"(?:/|per)\s*([0-9]+)", text, re.IGNORECASE)
    if not item.amount or (multiples and not int(multiples[1])):
        raise ConfigurationError(
            f'{quoted(text)} allows no request; write {_EXAMPLES}, or a rule with action = "block" to refuse all'
        )
    if item.amount > MAX_AMOUNT or item.get_expiry() > MAX_SECONDS:
        raise ConfigurationError(
            f"{quoted(text)} is too large; a limit is below 10^15, and its window at most 366 days"
        )
    if strategy == "moving" and item.amount > MAX_MOVING:
        raise ConfigurationError(
            f"{quoted(text)}: a moving window keeps the time of each request, at most {MAX_MOVING};"
            ' write strategy = "sliding", which keeps two numbers'
        )
    return item.amount, item.get_expiry()


def _suggest(text: str) -> str:
    """Suggest what `text` may mean: other tools write ``10/10s``, for example."""
    parts = _PARTS.fullmatch(text[:100])
    if not parts:
        return _EXAMPLES
    amount, multiples, unit = parts[1], parts[2], parts[3].lower()
    near = difflib.get_close_matches(unit, _UNITS, n=1)
    word = _SHORT_UNITS.get(unit) or (near[0] if near else "")
    if word == "7 days" and not multiples:
        return f'"{amount} per 7 days"'
    if not word or word == "7 days":
        return f"{_EXAMPLES}; units are {', '.join(_UNITS)}"
    return f'"{amount} per {multiples} {word}s"' if multiples else f'"{amount}/{word}"'


def _parse_key(kind: str, ipv6_prefix: int) -> _Reader:
    """Return a function that reads one part of a key. Raises ConfigurationError."""
    source, colon, name = kind.partition(":")
    if kind == "ip":
        return lambda facts: (_client_network(facts.ip, ipv6_prefix),)
    if colon and source == "header" and _TOKEN.fullmatch(name):
        lower = name.lower()
        return partial(_read_field, name=lower)
    if colon and source == "cookie" and _TOKEN.fullmatch(name):
        return lambda facts: find_identities(facts.cookie_values, name)
    if kind in _READERS:
        return _READERS[kind]
    raise ConfigurationError(_describe_unknown(kind))


def _read_field(facts: Facts, name: str) -> tuple[str, ...]:
    facts.refuse_repeated((name,))
    return (facts.headers[name],) if name in facts.headers else ()


_READERS: dict[str, _Reader] = {
    "path": lambda facts: (facts.path,),
    "host": lambda facts: (facts.host,),
    "ja4": lambda facts: (facts.tls_ja4,) if facts.tls_ja4 else (),
    "client_subject": lambda facts: (facts.client_subject,) if facts.client_subject else (),
}


def _describe_unknown(kind: str) -> str:
    source, colon, name = kind[:300].partition(":")
    near = difflib.get_close_matches(
        source.lower(), ("header", "cookie", *(key for key in _KEYS if ":" not in key)), n=1
    )
    if not near:
        return f"unknown key {quoted(kind)}; keys are {', '.join(_KEYS)}"
    if near[0] not in ("header", "cookie"):
        return f'unknown key {quoted(kind)}; did you mean "{near[0]}"?'
    if colon and near[0] != source and _TOKEN.fullmatch(name):
        return f'unknown key {quoted(kind)}; did you mean "{near[0]}:{name}"?'
    return f'key {quoted(kind)} does not name a {near[0]}; write "{near[0]}:NAME", such as "{near[0]}:X-User"'


# Several limits use the same address, and parsing it takes 3 us.
@lru_cache(maxsize=1024)
def _client_network(text: str, ipv6_prefix: int) -> str:
    """Return what a client is counted by: the IPv4 address, or the IPv6 network, all of which the client can use.

    Text that is not an address is returned as it is: all clients on a Unix socket, which have none, count as one.
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
