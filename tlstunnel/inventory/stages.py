"""What every stage decided about a connection that ended without a tunnel, from its record.

Tested by tests/unit/test_inventory_stages.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from tlstunnel.commands.records import StageStatus
from tlstunnel.config import Config, SiteConfig
from tlstunnel.journal.events import EndedBy, Event, Reason, fixed_reason

STAGES = (
    "accept",
    "hello",
    "site",
    "TLS",
    "request",
    "firewall: target",
    "firewall: address lists",
    "firewall: web origin",
    "firewall: rules",
    "firewall: throttles",
    "firewall: rate limits",
    "firewall: managed rules",
    "edge",
    "origin",
    "response",
)
"""The stages in their order, and the checks of the firewall as stages of their own (docs/architecture.md)."""

_BY_REASON: Mapping[str, tuple[Reason, ...]] = {
    "accept": (
        Reason.UNTRUSTED_PROXY,
        Reason.OUT_OF_DESCRIPTORS,
        Reason.OUT_OF_MEMORY,
        Reason.PROXY_TIMED_OUT,
        Reason.PROXY_CLIENT_CLOSED,
        Reason.PROXY_MALFORMED,
    ),
    "site": (Reason.HELLO_NO_SITE,),
    "request": (
        Reason.MALFORMED_HEAD,
        Reason.BARE_LF,
        Reason.CONTROL_CHARACTER,
        Reason.FOLDED_FIELD,
        Reason.TARGET_FORM,
        Reason.HOST,
        Reason.BODY,
        Reason.CONNECTION_FIELD,
        Reason.KEY_FIELD,
        Reason.METHOD,
        Reason.REQUEST_TIMED_OUT,
        Reason.MISDIRECTED,
        Reason.NO_UPGRADE,
        Reason.WEBSOCKET_VERSION,
        Reason.HEAD_TOO_LARGE,
        Reason.TOO_MANY_FIELDS,
        Reason.HTTP_VERSION,
        Reason.CLIENT_CERTIFICATE,
        Reason.CLIENT_EXPIRED,
        Reason.CLIENT_REVOKED,
        Reason.CLIENT_CRL_EXPIRED,
        Reason.CLIENT_NO_CRL,
    ),
    "firewall: target": (
        Reason.AMBIGUOUS_TARGET,
        Reason.TOO_MANY_QUERY_VALUES,
        Reason.TOO_MANY_COOKIES,
        Reason.TOO_MANY_ELEMENTS,
        Reason.REPEATED_FIELD,
    ),
    "firewall: address lists": (Reason.ADDRESS_BLOCKED, Reason.ADDRESS_NOT_ALLOWED),
    "firewall: web origin": (Reason.WEB_ORIGIN_MISSING, Reason.WEB_ORIGIN_NOT_ALLOWED),
    "firewall: rules": (Reason.RULE,),
    "firewall: throttles": (Reason.THROTTLED,),
    "firewall: rate limits": (Reason.RATE_LIMIT, Reason.NOT_COUNTED),
    "firewall: managed rules": (Reason.MANAGED_RULES, Reason.MANAGED_RULES_GUARD, Reason.MANAGED_RULES_FAILURE),
    "edge": (
        Reason.WORKER_FAILED,
        Reason.WORKER_ORIGIN,
        Reason.WORKER_BUSY,
        Reason.WORKER_TIMED_OUT,
        Reason.WORKER_REPLY,
        Reason.WORKER_EXPIRED,
    ),
    "origin": (
        Reason.TOO_MANY_UPLOADS,
        Reason.ORIGIN_UNREACHABLE,
        Reason.ORIGIN_CONNECT_TIMED_OUT,
        Reason.NO_ORIGIN,
        Reason.OUT_OF_RESOURCES,
        Reason.ORIGIN_NO_TLS,
        Reason.ORIGIN_TLS_FAILED,
        Reason.ORIGIN_NOT_TRUSTED,
        Reason.ORIGIN_SELF_SIGNED,
        Reason.ORIGIN_UNKNOWN_ISSUER,
        Reason.ORIGIN_WRONG_NAME,
        Reason.ORIGIN_EXPIRED,
        Reason.ORIGIN_NOT_YET_VALID,
    ),
    "response": (
        Reason.ORIGIN_FAILED,
        Reason.ORIGIN_RESPONSE_TIMED_OUT,
        Reason.INVALID_RESPONSE,
        Reason.DECLINED,
        Reason.RESPONDED,
        Reason.MALFORMED_BODY,
        Reason.RESPONSE_TRUNCATED,
        Reason.CLOSED_DURING_RESPONSE,
        Reason.RESPONSE_TIMED_OUT,
    ),
}
_STAGE_OF = {reason: stage for stage, reasons in _BY_REASON.items() for reason in reasons}


@dataclass(frozen=True, slots=True)
class Checks:
    """Which checks of the firewall a site has, and the names of its rules and rate limits."""

    addresses: bool
    web_origins: bool
    rules: frozenset[str]
    limits: frozenset[str]
    managed: bool
    worker: str

    @classmethod
    def of(cls, site: SiteConfig, config: Config) -> "Checks":
        """Return those of a site, with those of all sites."""
        tables = (config, site)
        return cls(
            addresses=any(table.allow_addresses or table.block_addresses for table in tables),
            web_origins=site.web_origins is not None or site.require_web_origin,
            rules=frozenset(rule.name for rule in chain(config.rules, site.rules)),
            limits=frozenset(limit.name for limit in chain(config.rate_limits, site.rate_limits)),
            managed=site.managed_rules is not None,
            worker=site.worker or "",
        )


def describe_stages(record: Mapping[str, Any], checks: Checks | None = None) -> list[StageStatus]:
    """Return the decision of each stage about the connection with this record, which has the `event` of its line.

    `checks` are those that its site has now; None if they are not known.
    """
    at = STAGES.index(_find_stage(record))
    decision: Literal["refused", "ended"] = "refused" if _is_refused(record) else "ended"
    last = [StageStatus(STAGES[at], decision, _explain(record))]
    before = list(chain.from_iterable(_describe_passed(stage, record, checks) for stage in STAGES[:at]))
    if STAGES[at] == "firewall: rules" or STAGES[at] == "firewall: rate limits":
        last = [*_describe_logged(STAGES[at], record, checks), *last]
    return [*before, *last, *(StageStatus(stage, "not reached") for stage in STAGES[at + 1 :])]


def _find_stage(record: Mapping[str, Any]) -> str:
    """Return the stage at which the connection ended."""
    reason = record.get("reason", "")
    fixed = fixed_reason(reason)
    if record.get("event") != Event.CONNECTION:
        if record.get("event") == Event.NOT_ACCEPTED or fixed in _BY_REASON["firewall: address lists"]:
            return "accept"
        before_tls = _STAGE_OF.get(fixed) if fixed is not None else None
        return before_tls or ("hello" if reason.startswith("hello: ") else "TLS")
    stage = _STAGE_OF.get(fixed) if fixed is not None else None
    if stage is not None and not (stage == "request" and record.get("origin")):
        return stage
    # A client that has left, an error of a socket or a bug: it was as far as the record has something of it.
    if record.get("origin"):
        return "response" if record.get("status") or stage == "request" else "origin"
    return "origin" if record.get("edge") else "request"


def _is_refused(record: Mapping[str, Any]) -> bool:
    if record.get("event") != Event.CONNECTION:
        return not record.get("reason", "").endswith(("client closed", "timed out", "aborted"))
    return record.get("verdict") == "refused"


def _explain(record: Mapping[str, Any]) -> str:
    """Return why the connection ended, as a sentence."""
    parts = [str(record.get("reason", ""))]
    if record.get("detail"):
        parts.append(str(record["detail"]))
    if record.get("status"):
        who = "the origin" if record.get("ended_by") == EndedBy.ORIGIN else "the tunnel"
        parts.append(f"{who} responded with {record['status']}")
    return "; ".join(parts)


def _describe_passed(stage: str, record: Mapping[str, Any], checks: Checks | None) -> Iterator[StageStatus]:
    logged = list(_describe_logged(stage, record, checks))
    if logged:
        yield from logged
    else:
        detail = _describe(stage, record)
        missing = not detail and checks is not None and not _is_configured(stage, checks)
        yield StageStatus(stage, "not configured" if missing else "passed", detail)


def _describe_logged(stage: str, record: Mapping[str, Any], checks: Checks | None) -> Iterator[StageStatus]:
    for name in record.get("logged", ()):
        if _find_check(name, checks) == stage:
            yield StageStatus(stage, "logged", f'{name} would have refused it, but its mode is "log"')


def _find_check(name: str, checks: Checks | None) -> str:
    """Return the check that has logged under this name. A name may be a rule's and a limit's."""
    fixed = {
        "addresses": "firewall: address lists",
        "web origin": "firewall: web origin",
        "managed rules": "firewall: managed rules",
    }
    if name in fixed:
        return fixed[name]
    return "firewall: rate limits" if checks is not None and name in checks.limits - checks.rules else "firewall: rules"


def _describe(stage: str, record: Mapping[str, Any]) -> str:
    """Return what is known of a stage that has passed the connection on."""
    client, peer, sni, origin = (record.get(name, "") for name in ("client", "peer", "sni", "origin"))
    known = {
        "accept": f"from {client}, through the proxy {peer}" if peer else f"from {client}" if client else "",
        "hello": f"for {sni}" if sni else "without a server name",
        "site": str(record.get("site", "")),
        "TLS": " with ".join(filter(None, (record.get("tls_version"), record.get("cipher")))),
        "request": str(record.get("path", "")),
        "firewall: rules": f"allowed by {record['rule']}" if record.get("rule") else "",
        "edge": str(record.get("edge", "")),
        "origin": f"connected to {origin}" if origin else "",
    }
    return known.get(stage, "")


def _is_configured(stage: str, checks: Checks) -> bool:
    """Return whether the site has this check. Every site has the other stages."""
    has = {
        "firewall: address lists": checks.addresses,
        "firewall: web origin": checks.web_origins,
        "firewall: rules": bool(checks.rules),
        "firewall: rate limits": bool(checks.limits),
        "firewall: managed rules": checks.managed,
        "edge": bool(checks.worker),
    }
    return has.get(stage, True)
