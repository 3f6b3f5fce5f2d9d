"""What machines tell each other about ended tags can be read again, and everything else is ignored."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.state.ended_tags import LONGEST_TEXT, EndedTag, decode_ended, encode_ended

ENDED = EndedTag(tag="user=42", who="ann (uid 1000)", why="signed out", site="a.test", age=1.5)


@given(st.text(min_size=1, max_size=161), st.text(max_size=200), st.text(max_size=200), st.floats(0, 86_400))
def test_it_is_read_as_it_was_written(tag: str, who: str, why: str, age: float) -> None:
    ended = EndedTag(tag=tag, who=who, why=why, age=age)
    try:
        text = encode_ended(ended, "1f", "token")
    except UnicodeEncodeError:  # a lone surrogate, which no tag has
        return
    assert decode_ended(text) == (("1f", ended) if len(text) <= LONGEST_TEXT else None)


def forge(**changes: Any) -> str:
    fields = json.loads(base64.urlsafe_b64decode(encode_ended(ENDED, "1f", "token")))
    ended = fields["ended"]
    for name, value in changes.items():
        (ended if name in ended else fields)[name] = value
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


def test_a_later_release_may_add_fields() -> None:
    assert decode_ended(forge(more=1)) == ("1f", ENDED)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "!",
        "é",
        "A" * (LONGEST_TEXT + 4),
        base64.urlsafe_b64encode(b"{}").decode(),
        base64.urlsafe_b64encode(b"[" * 2000).decode(),
        forge(format=2),
        forge(tag=""),
        forge(tag=5),
        forge(why="x" * 201),
        forge(age=-1),
        forge(age=1e9),
        forge(site="x" * 1025),
    ],
    ids=lambda text: text[:20],
)
def test_anything_else_is_ignored(text: str) -> None:
    assert decode_ended(text) is None


@given(st.text())
def test_any_text_is_read_or_ignored(text: str) -> None:
    decode_ended(text)
