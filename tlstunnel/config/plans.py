"""Plans, and who is told about a site. A plan is a guideline for concurrent tunnels, and never a limit.

Tested by tests/unit/test_config_plans.py.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from tlstunnel.addresses import quoted
from tlstunnel.config.document import KeyPath
from tlstunnel.config.kinds import UNREADABLE, Integer, Kind, Reading, Schema, Text, describe
from tlstunnel.config.tables import Findings, Table, TableKind
from tlstunnel.config.urls import WebURL, parse_mailbox

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LABEL_LENGTH = 100
_NO_PLAN = "none"


def parse_plan_name(text: str) -> str:
    """Return the name of a plan. Raises ValueError."""
    if not _NAME.fullmatch(text):
        raise ValueError(f"expected the name of a plan: 1 to 64 letters, digits or one of _ . -, got {quoted(text)}")
    return text


def parse_label(text: str) -> str:
    """Return what a plan is called in notices. Raises ValueError."""
    if not text.isprintable() or not 0 < len(text) <= _LABEL_LENGTH:
        raise ValueError(f"expected 1 to {_LABEL_LENGTH} printable characters, got {quoted(text)}")
    return text


def parse_contact(text: str) -> str | WebURL:
    """Return `mailto:` with one e-mail address, or a WebURL. Raises ValueError."""
    if text[:7].lower() == "mailto:":
        return f"mailto:{parse_mailbox(text[7:])}"
    if text[:8].lower() == "https://":
        return WebURL.parse(text)
    raise ValueError(f'expected "mailto:ops@example.com" or "https://example.com/notices", got {quoted(text)}')


PlanName = Annotated[str, Text(parse_plan_name, "pro", expected="the name of a plan", pattern=f"^{_NAME.pattern}$")]
Label = Annotated[str, Text(parse_label, "Pro")]
Guideline = Annotated[int, Integer(1, 1_000_000_000)] | Literal["none"]
Contact = Annotated[str | WebURL, Text(parse_contact, "mailto:ops@example.com", pattern="^([Mm][Aa][Ii]|[Hh][Tt])")]


class PlanConfig(Table, frozen=True):
    """A plan: the number of concurrent tunnels it is meant for, its name in notices, and the plan to suggest next."""

    guideline: Guideline
    label: Label
    next: PlanName = _NO_PLAN

    @property
    def tunnels(self) -> int | None:
        """The guideline, or None if it has none."""
        return None if self.guideline == "none" else self.guideline

    @property
    def next_plan(self) -> str | None:
        """The name of the plan to suggest, or None if there is none."""
        return None if self.next == _NO_PLAN else self.next


class Plans(dict[str, PlanConfig]):
    """Plans by name: those that the program comes with, as the file changes them, and those of the file."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    @classmethod
    def kind(cls) -> Kind:
        """Return the kind of this value in the file."""
        return _PlansKind()


BUILT_IN: Mapping[str, PlanConfig] = {
    "free": PlanConfig(guideline=100, label="Free", next="pro"),
    "pro": PlanConfig(guideline=1000, label="Pro", next="business"),
    "business": PlanConfig(guideline=10_000, label="Business", next="enterprise"),
    "enterprise": PlanConfig(guideline="none", label="Enterprise"),
}
"""The plans that are there without any configuration."""


class _PlansKind(Kind):
    def __init__(self) -> None:
        self._table = TableKind(PlanConfig)

    def read(self, value: object, path: KeyPath, reading: Reading) -> Any:
        if not isinstance(value, dict):
            reading.refuse(path, f"expected a table such as {{ pro = {{ guideline = 500 }} }}, got {describe(value)}")
            return UNREADABLE
        before = len(reading.problems)
        plans = Plans(BUILT_IN)
        for name, inner in value.items():
            self._check_name(name, path, reading)
            plans[name] = self._table.read(_complete(name, inner), (*path, name), reading)
        if len(reading.problems) == before:
            for inside, reason in _check_next(plans, value):
                reading.refuse((*path, *inside), reason)
        return plans if len(reading.problems) == before else UNREADABLE

    def _check_name(self, name: str, path: KeyPath, reading: Reading) -> None:
        if name == _NO_PLAN:
            reading.refuse(path, '"none" means that there is no plan; choose another name', name)
            return
        try:
            parse_plan_name(name)
        except ValueError as error:
            reading.refuse(path, str(error), name)

    def schema(self) -> Schema:
        table = self._table.schema()
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^{_NAME.pattern}$"},
            "properties": {name: table | {"required": []} for name in BUILT_IN},
            "additionalProperties": table | {"required": ["guideline"]},
        }

    def render(self, value: Any) -> Any:
        return {name: self._table.render(plan) for name, plan in value.items()}


def _complete(name: str, table: object) -> object:
    """Return a plan of the file with what it leaves out."""
    if not isinstance(table, dict):
        return table
    if name not in BUILT_IN:
        return {"label": name[:1].upper() + name[1:], **table}
    plan = BUILT_IN[name]
    return {"guideline": plan.guideline, "label": plan.label, "next": plan.next, **table}


def _check_next(plans: Plans, written: Mapping[str, Any]) -> Findings:
    """Check that the next plan of each is there, and larger."""
    for name, plan in plans.items():
        following = plan.next_plan
        if following is None:
            continue
        place = (name, "next") if "next" in written.get(name, ()) else (name,) if name in written else ()
        if following not in plans:
            yield place, describe_unknown(following, plans)
        elif plan.tunnels is None:
            yield place, f'a plan without a guideline needs no larger one, so set next = "none", not "{following}"'
        elif (plans[following].tunnels or plan.tunnels + 1) <= plan.tunnels:
            larger = f'"{following}" has a guideline of {plans[following].tunnels}, which is no more than'
            yield place, f'{larger} the {plan.tunnels} of "{name}": change one, or set next of "{name}" to another plan'


def describe_unknown(name: str, plans: Mapping[str, PlanConfig]) -> str:
    """Return the reason for refusing a plan that is not there."""
    near = difflib.get_close_matches(name, plans, n=1)
    hint = f'did you mean "{near[0]}"?' if near else f"the plans are {', '.join(plans)}"
    return f"there is no plan {quoted(name)}; {hint}"
