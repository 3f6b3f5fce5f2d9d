"""How text from other people or programs is displayed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.escaping import printable


@given(st.text())
def test_printable_text_is_one_harmless_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert all(char in text for char in shown if not char.isascii())


@given(st.text(), st.text())
def test_printable_texts_of_different_texts_differ(first: str, second: str) -> None:
    assert (printable(first) == printable(second)) is (first == second)


@pytest.mark.parametrize("text", ["", "chat.example.com", "/a b?c=%20&d", "é", '"quoted"'])
def test_harmless_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text
