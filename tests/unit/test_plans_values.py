"""Values of plans: the weight of standings, who is told, and that values survive being stored."""

import msgspec
import pytest

from tlstunnel.plans.values import Assessment, Figures, Notice, Standing


def test_standings_by_weight() -> None:
    assert sorted(Standing, key=lambda standing: standing.weight) == [
        Standing.WITHIN,
        Standing.SPIKE,
        Standing.REPEATED,
        Standing.SUSTAINED,
        Standing.DISPROPORTIONATE,
        Standing.SUSPECTED_ABUSE,
    ]


@pytest.mark.parametrize(
    ("standing", "recipient"),
    [
        (Standing.WITHIN, None),
        (Standing.SPIKE, None),
        (Standing.REPEATED, "contact"),
        (Standing.SUSTAINED, "contact"),
        (Standing.DISPROPORTIONATE, "contact"),
        (Standing.SUSPECTED_ABUSE, "operator"),
    ],
)
def test_who_is_told(standing: Standing, recipient: str | None) -> None:
    assert standing.recipient == recipient


def test_a_notice_is_the_same_after_it_was_stored() -> None:
    figures = Figures(guideline=100, now=120, peak=400, p95=110.5, hours=168, hours_measured=160, hours_over=30)
    assessment = Assessment(
        site="chat.example",
        plan="free",
        label="Free",
        next_plan="pro",
        next_label="Pro",
        standing=Standing.SUSTAINED,
        since=1_700_000_000.0,
        figures=figures,
        sentence="The site is busy.",
    )
    notice = Notice(
        id="msg_1",
        site="chat.example",
        standing=Standing.SUSTAINED,
        created=1_700_000_060.0,
        recipient="contact",
        address="mailto:ops@chat.example",
        assessment=assessment,
        language="en",
    )
    assert msgspec.json.decode(msgspec.json.encode(notice), type=Notice) == notice
