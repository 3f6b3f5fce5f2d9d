"""What the plan of a site means: its guideline, the next plan, and the line that says so."""

from pathlib import Path

import pytest

from tlstunnel.config import Config, decode
from tlstunnel.plans.guidelines import SitePlan, describe_plan, find_plans

NONE = "no plan: its usage is measured, and nothing else"


MAIL = 'email = "smtp://mail.example"\nsender = "tunnel@example.net"\n'


def load(site: str, plans: str = "", notices: str = MAIL) -> Config:
    notices = f'[usage.notices]\nsecret_file = "s"\n{notices}'
    text = f'{notices}{plans}\n[[sites]]\nnames = ["a.example"]\norigins = ["localhost:1"]\n{site}\n'
    return decode(text, Path("/"), "t")


def found(site: str, plans: str = "") -> SitePlan:
    return find_plans(load(site, plans))["a.example"]


@pytest.mark.parametrize(
    ("site", "line"),
    [
        ("", NONE),
        ('guideline = "none"', NONE),
        (
            'plan = "pro"\ncontact = "mailto:ops@b.example"',
            (
                "Pro, for 1000 concurrent tunnels, and nothing is cut off above that; the next plan is Business;"
                " notices to mailto:ops@b.example"
            ),
        ),
        (
            'plan = "free"\nguideline = 1',
            (
                "Free, for 1 concurrent tunnel, and nothing is cut off above that; the next plan is Pro; no contact, so"
                " notices go to the log"
            ),
        ),
        (
            "guideline = 20",
            (
                "a guideline of its own, for 20 concurrent tunnels, and nothing is cut off above that; no contact,"
                " so notices go to the log"
            ),
        ),
        (
            'plan = "enterprise"',
            "Enterprise, without a guideline: its usage is measured, and only suspected abuse is reported",
        ),
        (
            'plan = "enterprise"\nguideline = 50000\ncontact = "https://a.example/x?key=geheim"',
            (
                "Enterprise, for 50000 concurrent tunnels, and nothing is cut off above that; notices to"
                " https://a.example/x?(hidden)"
            ),
        ),
    ],
)
def test_what_a_plan_means(site: str, line: str) -> None:
    assert describe_plan(found(site), load(site).usage.notices) == line


@pytest.mark.parametrize(
    ("contact", "notices", "end"),
    [
        ("", "", "; no contact, so notices go to the log"),
        ("", 'webhook = "https://h.example/x"', "; no contact, so notices go to the webhook and the log"),
        (
            "",
            f'{MAIL}operator = "mailto:o@b.example"',
            "; no contact, so notices go to the operator, mailto:o@b.example",
        ),
        ("", 'operator = "https://b.example/?key=geheim"', " go to the operator, https://b.example/?(hidden)"),
        (
            "",
            'operator = "mailto:o@b.example"',
            "; notices to mailto:o@b.example need usage.notices.email; without it they go to the log",
        ),
        (
            'contact = "mailto:a@b.example"',
            'webhook = "https://h.example/x"',
            "; notices to mailto:a@b.example need usage.notices.email; without it they go to the webhook and the log",
        ),
        ('contact = "mailto:a@b.example"', MAIL, "; notices to mailto:a@b.example"),
        ('contact = "https://b.example/"', "", "; notices to https://b.example/"),
    ],
)
def test_where_notices_go(contact: str, notices: str, end: str) -> None:
    config = load(f"guideline = 9\n{contact}", notices=f"{notices}\n")
    assert describe_plan(find_plans(config)["a.example"], config.usage.notices).endswith(end)


def test_the_contact_is_complete() -> None:
    plan = found('contact = "https://a.example/x?key=geheim"')
    assert (plan.contact, plan.shown_contact) == ("https://a.example/x?key=geheim", "https://a.example/x?(hidden)")


@pytest.mark.parametrize(
    ("guideline", "following"),
    [(50, "pro"), (999, "pro"), (1000, "business"), (9999, "business"), (10**6, "enterprise")],
)
def test_a_plan_that_is_no_larger_than_the_sites_own_guideline_is_not_suggested(guideline: int, following: str) -> None:
    assert found(f'plan = "free"\nguideline = {guideline}').next_plan == following


def test_nothing_is_suggested_after_the_largest() -> None:
    largest = '[plans.gold]\nguideline = 5\n[plans.silver]\nguideline = 4\nnext = "gold"\n'
    assert found('plan = "silver"', largest).next_plan == "gold"
    assert found('plan = "silver"', largest).next_guideline == 5
    assert found('plan = "silver"\nguideline = 5', largest).next_plan == ""
    assert found('plan = "gold"', largest).next_plan == ""
