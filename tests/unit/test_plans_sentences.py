"""The sentences about standings: each is one plain sentence, and none of them threatens."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.config.usage import Usage
from tlstunnel.plans.sentences import describe
from tlstunnel.plans.values import Figures, Standing

numbers = st.integers(0, 10**7)
shares = st.none() | st.floats(0, 1)
figures = st.builds(
    Figures,
    guideline=st.none() | st.integers(1, 10**9),
    now=numbers,
    peak=numbers,
    latest_peak=numbers,
    p95=st.none() | st.floats(0, 10**6),
    hours_measured=numbers,
    hours_over=numbers,
    days_over=numbers,
    days_sustained=numbers,
    resource=st.sampled_from([None, "tunnels", "handshakes", "bytes", "cpu"]),
    share=shares,
    suggested_share=shares,
    scarcity=st.sampled_from([None, "cpu", "descriptors", "memory"]),
    scarcity_share=st.floats(0, 1),
    flood=st.sampled_from([None, "refused", "short", "unfinished"]),
    flood_rate=st.floats(0, 10**6),
    flood_share=st.floats(0, 1),
    flood_addresses=numbers,
)


@given(standing=st.sampled_from(Standing), found=figures)
def test_each_is_one_sentence_without_a_threat(standing: Standing, found: Figures) -> None:
    sentence = describe(standing, found, Usage())
    assert re.fullmatch(r"[A-Z0-9][^\n]*\.", sentence)
    assert ". " not in sentence
    assert sentence.isprintable()
    assert not re.search(r"limit|exceed|violat|must|cut off|abuse|None", sentence)
    assert standing in (Standing.SUSPECTED_ABUSE, Standing.DISPROPORTIONATE) or "guideline" in sentence


@pytest.mark.parametrize(
    ("standing", "values", "sentence"),
    [
        (Standing.WITHIN, {"guideline": 100, "now": 1}, "1 tunnel is open, which is within the guideline of 100."),
        (
            Standing.SUSTAINED,
            {"guideline": 1000, "days_sustained": 4, "p95": 1234.5},
            (
                "More tunnels than the guideline of 1 000 were open for many hours of 4 of the last 7 measured days,"
                " and the 95th percentile of a day was 1 234."
            ),
        ),
        (
            Standing.DISPROPORTIONATE,
            {"share": 0.25, "suggested_share": 0.0034, "resource": "cpu", "scarcity": "memory", "scarcity_share": 0.9},
            (
                "It uses 25 % of the CPU time of all sites, where its plan suggests 0.34 %, while 90 % of the machine's"
                " memory is in use."
            ),
        ),
    ],
)
def test_sentences(standing: Standing, values: dict[str, Any], sentence: str) -> None:
    assert describe(standing, Figures(**values), Usage()) == sentence
