"""What the plan of a site means: its guideline, the next plan, and the line that says so."""

from pathlib import Path

import pytest

from tlstunnel.config import decode
from tlstunnel.plans.guidelines import SitePlan, describe_plan, find_plans

NONE = "no plan: its usage is measured, and nothing else"


def found(site: str, plans: str = "") -> SitePlan:
    notices = '[usage.notices]\nsecret_file = "s"\n'
    text = f'{notices}{plans}\n[[sites]]\nnames = ["a.example"]\norigins = ["localhost:1"]\n{site}\n'
    return find_plans(decode(text, Path("/"), "t"))["a.example"]


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
    assert describe_plan(found(site)) == line


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
