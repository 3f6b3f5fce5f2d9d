"""Each reason has advice, and each piece of advice leads to a heading that exists."""

from pathlib import Path

import pytest

from tests.unit.test_documents import _anchors
from tlstunnel.inventory.advice import find_advice
from tlstunnel.journal.events import Reason

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("reason", list(Reason))
def test_a_reason_has_advice_and_a_document(reason: Reason) -> None:
    advice = find_advice(f"{reason}")
    assert advice is not None
    assert advice.text.endswith(".")
    document, _, anchor = advice.document.partition("#")
    assert (REPOSITORY / document).is_file()
    assert not anchor or anchor in _anchors(document)


def test_a_reason_with_a_text_has_advice() -> None:
    assert find_advice("rule: admin: only from inside") == find_advice(Reason.RULE)


def test_an_unknown_reason_has_none() -> None:
    assert find_advice("of a later release") is None
