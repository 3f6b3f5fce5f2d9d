"""What is logged of a malformed head: its kind and line, and none of its bytes."""

import h11
import pytest
from hypothesis import given

from tests.handshakes import FIELDS, RICH_FIELDS, Field, mutated, request, without
from tlstunnel.handshake.malformed import describe_malformed_head
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader
from tlstunnel.handshake.response import BadResponse, UpgradeResponseReader

LENGTH, CODING = b"Content-Length", b"Transfer-Encoding"


def detail_of(data: bytes) -> str:
    with pytest.raises(Refusal) as caught:
        RequestReader(accept_plain=True).feed(data)
    return caught.value.detail


def with_fields(*fields: Field) -> bytes:
    return request((*FIELDS, *fields))


@pytest.mark.parametrize(
    ("data", "detail"),
    [
        (request(line=b"GET /x?token=hush HTTP/1.1 x"), "line 1: malformed request line"),
        (request(line=b"GET /hush\xff HTTP/1.1"), "line 1: malformed request line"),
        (with_fields((b"Authorization ", b"Bearer hush")), "line 7: malformed field"),
        (request(((b"Authoriz\xe4tion", b"hush"), *FIELDS)), "line 2: malformed field"),
        (request()[:-2] + b"Bearer hush\r\n\r\n", "line 7: malformed field"),
        (with_fields((LENGTH, b"hush")), "line 7: malformed Content-Length"),
        (with_fields((LENGTH, b"9" * 30)), "line 7: malformed Content-Length"),
        (with_fields((LENGTH, b"1"), (b"A", b"b"), (LENGTH, b"2")), "line 9: several values in Content-Length"),
        (with_fields((CODING, b"hush")), "line 7: transfer coding other than chunked"),
        (with_fields((CODING, b"chunked"), (CODING, b"chunked")), "line 8: several Transfer-Encoding fields"),
        (request(without(b"Host")), "no Host field"),
        (with_fields((b"host", b"hush")), "line 7: several Host fields"),
    ],
)
def test_kind_and_line(data: bytes, detail: str) -> None:
    assert detail_of(data) == detail


def test_an_unknown_error_is_not_quoted() -> None:
    assert describe_malformed_head(h11.RemoteProtocolError("hush"), b"GET / HTTP/1.1\r\n\r\n") == "not HTTP/1.1"


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"HTTP/1.1 hush\r\n\r\n", "malformed status line"),
        (b"HTTP/1.1 200 OK\r\nSet-Cookie : hush\r\n\r\n", "malformed field"),
        (b"hush\r\n\r\n", "malformed status line"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: hush\r\n\r\n", "malformed Content-Length"),
    ],
)
def test_response(head: bytes, reason: str) -> None:
    found = RequestReader().feed(request())
    assert found is not None
    reader = UpgradeResponseReader(found)
    with pytest.raises(BadResponse) as caught:
        reader.feed(head)
    assert caught.value.reason == f"response is not HTTP: {reason}"


SECRET = b"hush4711"


@given(mutated(request((*RICH_FIELDS, (b"Authorization", SECRET)), line=b"GET /" + SECRET + b"?" + SECRET)))
def test_nothing_of_a_head_is_in_the_detail(data: bytes) -> None:
    shown = ""
    try:
        RequestReader().feed(data)
    except Refusal as refusal:
        shown = f"{refusal.detail} {refusal.text} {refusal.reason}"
    assert "hush" not in shown
