"""What the plan of each site means: its guideline, and the plan to suggest. No I/O."""

from collections.abc import Mapping

import msgspec

from tlstunnel.config import Config, SiteConfig
from tlstunnel.config.plans import PlanConfig
from tlstunnel.config.urls import WebURL
from tlstunnel.config.usage import Notices


class SitePlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of one site, which is known by its first name. Names and labels are "" where there is no plan."""

    site: str
    plan: str = ""
    label: str = ""
    guideline: int | None = None
    next_plan: str = ""
    next_label: str = ""
    next_guideline: int | None = None
    contact: str = ""
    """A `mailto:` or `https:` URL, or ""."""
    shown_contact: str = ""
    """The same without what may be a secret."""


def find_plans(config: Config) -> dict[str, SitePlan]:
    """Return the plan of each site, by the site's first name."""
    return {site.names[0]: find_plan(site, config.plans) for site in config.sites}


def find_plan(site: SiteConfig, plans: Mapping[str, PlanConfig]) -> SitePlan:
    """Return the plan of a site. The site's own guideline takes precedence over the plan's.

    A larger plan is suggested only if it is larger than the site's own guideline too. For a site without a guideline
    there is nothing to suggest.
    """
    plan = plans[site.plan] if site.plan is not None else None
    guideline = plan.tunnels if plan is not None else None
    if site.guideline is not None:
        guideline = None if site.guideline == "none" else site.guideline
    name = _find_next(plan, guideline, plans)
    following = plans[name] if name else None
    return SitePlan(
        site=site.names[0],
        plan=site.plan or "",
        label=plan.label if plan is not None else "",
        guideline=guideline,
        next_plan=name,
        next_label=following.label if following is not None else "",
        next_guideline=following.tunnels if following is not None else None,
        contact=site.contact.text if isinstance(site.contact, WebURL) else site.contact or "",
        shown_contact=str(site.contact or ""),
    )


def _find_next(plan: PlanConfig | None, guideline: int | None, plans: Mapping[str, PlanConfig]) -> str:
    """Follow the plans to the first that is larger. Each is larger than the one before, so this ends."""
    while guideline is not None and plan is not None and plan.next_plan is not None:
        following = plans[plan.next_plan]
        if following.tunnels is None or following.tunnels > guideline:
            return plan.next_plan
        plan = following
    return ""


def describe_plan(plan: SitePlan, notices: Notices) -> str:
    """Return in one line what a site's plan means, and where notices about it go."""
    if not plan.plan and plan.guideline is None:
        return "no plan: its usage is measured, and nothing else"
    name = plan.label if plan.plan else "a guideline of its own"
    if plan.guideline is None:
        return f"{name}, without a guideline: its usage is measured, and only suspected abuse is reported"
    tunnels = "concurrent tunnel" if plan.guideline == 1 else "concurrent tunnels"
    following = f"; the next plan is {plan.next_label}" if plan.next_plan else ""
    recipients = _describe_recipients(plan, notices)
    return f"{name}, for {plan.guideline} {tunnels}, and nothing is cut off above that{following}; {recipients}"


def _describe_recipients(plan: SitePlan, notices: Notices) -> str:
    operator = str(notices.operator or "")
    recipient = plan.shown_contact or operator
    others = "the webhook and the log" if notices.webhook is not None else "the log"
    if not recipient:
        return f"no contact, so notices go to {others}"
    if recipient.startswith("mailto:") and notices.email is None:
        return f"notices to {recipient} need usage.notices.email; without it they go to {others}"
    return f"notices to {recipient}" if plan.contact else f"no contact, so notices go to the operator, {recipient}"
