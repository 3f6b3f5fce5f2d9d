"""The changes that a site and its worker make to a head: `Edits`, in order, and a refusal with a body of its own."""

import re

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.handshakes import FIELDS, Field, request
from tlstunnel.handshake.forwarding import NO_EDITS, Edits, Forwarding, render_forwarded_head
from tlstunnel.handshake.refusal import UPGRADE, Refusal, render_refusal
from tlstunnel.handshake.request import RequestReader

ID = "0123456789abcdef"
FORWARDING = Forwarding("198.51.100.7", ID, trusted=False)


def fields(edits: Edits, *more: Field) -> list[Field]:
    """Return how an origin parses the head."""
    found = RequestReader().feed(request((*FIELDS, *more)))
    assert found is not None
    server = h11.Connection(h11.SERVER)
    server.receive_data(render_forwarded_head(found, FORWARDING, edits))
    event = server.next_event()
    assert isinstance(event, h11.Request)
    return list(event.headers.raw_items())


def of(found: list[Field], *names: bytes) -> list[Field]:
    return [(name, value) for name, value in found if name.lower() in names]


def cgi(name: bytes) -> bytes:
    return re.sub(rb"[^0-9a-z]", b"_", name.lower())


def test_no_edits_change_nothing() -> None:
    assert fields(NO_EDITS, (b"X-A", b"1")) == fields(Edits(), (b"X-A", b"1"))
    assert NO_EDITS.then(NO_EDITS) == NO_EDITS


@pytest.mark.parametrize(
    "spelled", [b"X-User-Id", b"x-user-id", b"X_User_Id", b"X-User_Id", b"x_USER-id", b"X.User.Id", b"X-User~Id"]
)
@pytest.mark.parametrize("named", [b"X-User-Id", b"x_user_id"])
def test_names_are_compared_in_one_spelling(spelled: bytes, named: bytes) -> None:
    """CGI does not distinguish hyphens from underscores or dots: `names` has one spelling for all of them."""
    for edits in (Edits(added=((named, b"ann"),)), Edits(removed=frozenset({named.lower()}))):
        assert cgi(spelled) in {cgi(name) for name in edits.names}
        values = [value for _, value in fields(edits, (spelled, b"forged"), (b"X-User-Idx", b"kept"))]
        assert b"forged" not in values
        assert b"kept" in values


def test_added_fields_come_last_in_order_and_repeated() -> None:
    edits = Edits(added=((b"X-B", b"1"), (b"X-A", b"2"), (b"X-B", b"3")))
    assert fields(edits, (b"x-a", b"0"))[-3:] == [(b"X-B", b"1"), (b"X-A", b"2"), (b"X-B", b"3")]
    assert of(fields(edits, (b"x-a", b"0")), b"x-a") == [(b"X-A", b"2")]


def test_host_takes_the_place_of_the_clients() -> None:
    assert fields(Edits(host=b"inside.example"))[0] == (b"Host", b"inside.example")
    assert fields(Edits(host=b"one").then(Edits()))[0] == (b"Host", b"one")
    assert fields(Edits(host=b"one").then(Edits(host=b"two")))[0] == (b"Host", b"two")
    assert fields(Edits().then(Edits(host=b"two")))[0] == (b"Host", b"two")


def test_later_edits_take_precedence() -> None:
    first = Edits(added=((b"X-A", b"1"), (b"X-B", b"1"), (b"X-C", b"1")), removed=frozenset({b"x-d", b"x-e"}))
    later = Edits(added=((b"x-a", b"2"), (b"X-D", b"2")), removed=frozenset({b"x-b"}))
    found = fields(first.then(later), *((name, b"client") for name in (b"X-A", b"X-B", b"X-C", b"X-D", b"X-E", b"X-F")))
    assert of(found, b"x-a", b"x-b", b"x-c", b"x-d", b"x-e", b"x-f") == [
        (b"X-F", b"client"),
        (b"X-C", b"1"),
        (b"x-a", b"2"),
        (b"X-D", b"2"),
    ]


def test_then_replaces_another_spelling() -> None:
    for first, later in ((b"X-A", b"X_A"), (b"X_A", b"x-a")):
        edits = Edits(added=((first, b"1"),)).then(Edits(added=((later, b"2"),)))
        assert [value for _, value in of(fields(edits), b"x-a", b"x_a")] == [b"2"]
        gone = Edits(added=((first, b"1"),)).then(Edits(removed=frozenset({later.lower()})))
        assert of(fields(gone), b"x-a", b"x_a") == []


_NAMES = st.sampled_from(
    [b"X-A", b"x-a", b"X_A", b"X.A", b"X-B", b"X-User-Id", b"x_user-id", b"X-Forwarded-For", b"Cookie"]
)
_EDITS = st.builds(
    Edits,
    st.sampled_from([None, b"one.example", b"two.example"]),
    st.lists(st.tuples(_NAMES, st.sampled_from([b"1", b"2"])), max_size=3).map(tuple),
    st.frozensets(_NAMES.map(bytes.lower), max_size=2),
)


@given(_EDITS, _EDITS, _EDITS, st.lists(st.tuples(_NAMES, st.just(b"client")), max_size=3))
def test_then_applies_edits_in_order(one: Edits, two: Edits, three: Edits, client: list[Field]) -> None:
    """However they are combined, and whatever the client sent, no named field passes."""
    assert fields(one.then(two).then(three), *client) == fields(one.then(two.then(three)), *client)
    found = fields(one.then(two), *client)
    assert of(found, b"host") == [(b"Host", two.host or one.host or b"chat.example.com")]
    last = {cgi(name) for name, _ in two.added}
    gone = {cgi(name) for name in two.names} - last
    assert not gone & {cgi(name) for name, _ in found}
    for name in last:
        assert [v for n, v in found if cgi(n) == name] == [v for n, v in two.added if cgi(n) == name]
    named = {cgi(name) for edits in (one, two) for name in edits.names}
    assert not [name for name, value in found if value == b"client" and cgi(name) in named]


# --- a refusal's own body ---------------------------------------------------------------------------------------------


def rendered(refusal: Refusal, request_id: str | None = ID) -> tuple[bytes, list[bytes], bytes]:
    head, _, body = render_refusal(refusal, request_id).partition(b"\r\n\r\n")
    line, *rest = head.split(b"\r\n")
    return line, rest, body


def test_a_body_is_sent_as_it_is() -> None:
    line, rest, body = rendered(
        Refusal(403, "r", "never said", ((b"Content-Type", b"image/png"),), body=b"\0\r\n\r\n\xff")
    )
    assert line == b"HTTP/1.1 403 Forbidden"
    assert rest == [
        b"Content-Length: 6",
        b"Connection: close",
        b"Content-Type: image/png",
        b"X-Request-Id: " + ID.encode(),
    ]
    assert body == b"\0\r\n\r\n\xff"


def test_an_empty_body_is_empty_and_not_the_default() -> None:
    line, rest, body = rendered(Refusal(401, "r", "never said", body=b""))
    assert (line, body) == (b"HTTP/1.1 401 Unauthorized", b"")
    assert b"Content-Length: 0" in rest
    assert not [field for field in rest if field.startswith(b"Content-Type")]


def test_304_has_neither_body_nor_length() -> None:
    _, rest, body = rendered(Refusal(304, "r", "", ((b"ETag", b'"1"'),), body=b""))
    assert rest == [b"Connection: close", b'ETag: "1"', b"X-Request-Id: " + ID.encode()]
    assert body == b""


def test_an_unknown_status_has_a_phrase() -> None:
    for status in (399, 499, 599):
        assert rendered(Refusal(status, "r", "", body=b""))[0] == f"HTTP/1.1 {status} Refused".encode()


def test_the_default_body_is_text_with_the_id() -> None:
    _, rest, body = rendered(Refusal(404, "r", "there is none"))
    assert b"Content-Type: text/plain; charset=utf-8" in rest
    assert body == f"404 Not Found: there is none\nid: {ID}\n".encode()
    _, rest, body = rendered(Refusal(404, "r", "there is none"), None)
    assert body == b"404 Not Found: there is none\n"
    assert not [field for field in rest if field.startswith(b"X-Request-Id")]


def test_426_names_the_protocol_to_upgrade_to() -> None:
    _, rest, _ = rendered(Refusal(426, "r", "no", UPGRADE))
    assert b"Connection: close, Upgrade" in rest
    assert b"Upgrade: websocket" in rest
