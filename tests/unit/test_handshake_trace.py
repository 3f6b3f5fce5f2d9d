"""The trace id of a request: strictly as W3C Trace Context has it."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.handshakes import request
from tlstunnel.handshake.fields import group_by_name
from tlstunnel.handshake.request import RequestReader
from tlstunnel.handshake.trace import read_trace_id

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def read(*values: str) -> str:
    found = RequestReader().feed(request())
    assert found is not None
    fields = tuple((b"Traceparent", value.encode("latin-1")) for value in values)
    return read_trace_id(dataclasses.replace(found, by_name=group_by_name(fields)))


@pytest.mark.parametrize(
    "value",
    [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-00",
        f"00-{TRACE}-{PARENT}-03",
        f"cc-{TRACE}-{PARENT}-01",
        f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like",
    ],
)
def test_a_valid_one_has_a_trace_id(value: str) -> None:
    assert read(value) == TRACE


@pytest.mark.parametrize(
    "value",
    [
        "",
        TRACE,
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01-",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01 ",
        f"cc-{TRACE}-{PARENT}-01.more",
        f"cc-{TRACE}-{PARENT}-01-{'x' * 600}",
    ],
)
def test_an_invalid_one_has_none(value: str) -> None:
    assert read(value) == ""


def test_only_one_field_counts() -> None:
    assert read(f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-01") == ""
    assert read() == ""


@given(st.text(alphabet=st.characters(max_codepoint=255)))
def test_what_is_returned_is_an_id_or_nothing(value: str) -> None:
    assert re.fullmatch("([0-9a-f]{32})?", read(value))
