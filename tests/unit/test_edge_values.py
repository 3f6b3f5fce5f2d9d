"""What an edge worker sees of a request, how it may change it, and how it may refuse it."""

import contextlib
import dataclasses
import re
from typing import Any

import h11
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.handshakes import FIELDS, KEY, Field, request, without
from tlstunnel.addresses import OriginAddress
from tlstunnel.edge import TLS, ClientCertificate, EdgeError, Reply, WorkerRequest
from tlstunnel.edge.values import Forwarded, InvalidReply, to_outcome, to_worker_request
from tlstunnel.firewall.facts import normalise_path
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.forwarding import Forwarding, render_forwarded_head
from tlstunnel.handshake.refusal import Refusal, render_refusal
from tlstunnel.handshake.request import RequestReader
from tlstunnel.handshake.response import BadResponse, Switched, UpgradeResponseReader
from tlstunnel.tunnel.sites import SiteEdits

CONNECTION = Connection(
    ip="198.51.100.7",
    tls_version="TLSv1.3",
    tls_cipher="TLS_AES_256_GCM_SHA384",
    tls_sni="chat.example.com",
    tls_ja4="t13d",
    client_subject="CN=ann",
    site="chat",
)
ID = "0123456789abcdef"
OURS = (
    (b"Connection", b"Upgrade"),
    (b"Upgrade", b"websocket"),
    (b"X-Forwarded-For", b"198.51.100.7"),
    (b"X-Forwarded-Proto", b"https"),
    (b"X-Forwarded-Host", b"chat.example.com"),
    (b"Forwarded", b'for=198.51.100.7;proto=https;host="chat.example.com"'),
    (b"X-Request-Id", ID.encode()),
)
END_TO_END = without(b"Upgrade", without(b"Connection"))


def make(
    *more: Field,
    line: bytes = b"GET /chat?room=1 HTTP/1.1",
    connection: Connection = CONNECTION,
    der: bytes | None = None,
) -> WorkerRequest:
    """Return what a worker gets for this request."""
    found = RequestReader().feed(request((*FIELDS, *more), line))
    assert found is not None
    return to_worker_request(found, dataclasses.replace(connection, certificate=der, request_id=ID), 0.0)


def made(given: WorkerRequest) -> Forwarded:
    """Return the outcome if a worker returns this request."""
    found = to_outcome(given, given)
    assert isinstance(found, Forwarded)
    return found


def head(given: WorkerRequest, site: SiteEdits | None = None) -> h11.Request:
    """Parse the head for the origin, which must be exactly one request without a body."""
    forwarded = made(given)
    edits = forwarded.edits if site is None else site.of("localhost:1", "").then(forwarded.edits)
    server = h11.Connection(h11.SERVER)
    server.receive_data(render_forwarded_head(forwarded.request, Forwarding("198.51.100.7", ID, trusted=False), edits))
    event = server.next_event()
    assert isinstance(event, h11.Request)
    assert isinstance(server.next_event(), h11.EndOfMessage)
    assert server.trailing_data == (b"", False)
    return event


def fields(given: WorkerRequest, site: SiteEdits | None = None) -> tuple[Field, ...]:
    return tuple(head(given, site).headers.raw_items())


# --- what it sees -----------------------------------------------------------------------------------------------------


def test_every_property() -> None:
    given = make(
        (b"Cookie", b'sid="5"; b=2'),
        (b"cookie", b"sid=6"),
        (b"Sec-WebSocket-Protocol", b"chat, , superchat"),
        (b"sec-websocket-protocol", b"third"),
        line=b"GET /a%20b//%41?q=1&q=%C3%BC&r=a+b&s HTTP/1.1",
        der=b"DER",
    )
    assert given.method == "GET"
    assert given.id == ID
    assert (given.path, given.raw_path) == ("/a b/A", "/a%20b//%41")
    assert [*given.query.items()] == [("q", "1"), ("q", "ü"), ("r", "a b"), ("s", "")]
    assert given.query["q"] == "1"
    assert given.query.getall("q") == ["1", "ü"]
    assert dict(given.cookies) == {"sid": "5", "b": "2"}
    assert given.subprotocols == ("chat", "superchat", "third")
    assert given.host == "chat.example.com"
    assert (given.client_address, given.site, given.origin) == ("198.51.100.7", "chat", None)
    assert given.tls == TLS("TLSv1.3", "TLS_AES_256_GCM_SHA384", "chat.example.com", "t13d")
    assert given.client_certificate == ClientCertificate("CN=ann", b"DER")


def test_attributes_without_a_value() -> None:
    anonymous = Connection(ip="", tls_version="TLSv1.2", tls_cipher="c", site="*")
    given = make(line=b"GET / HTTP/1.1", connection=anonymous)
    assert (given.client_address, given.tls.server_name, given.client_certificate) == ("", "", None)
    assert (dict(given.query), dict(given.cookies), given.subprotocols) == ({}, {}, ())
    assert "a Unix socket" in repr(given)


def test_a_mapped_address_is_the_ipv4_one() -> None:
    assert make(connection=dataclasses.replace(CONNECTION, ip="::ffff:192.0.2.1")).client_address == "192.0.2.1"


def test_headers_by_any_case_and_repeated_ones_kept() -> None:
    given = make((b"X-Tag", b"a"), (b"x-tAG", b"b"), (b"X-Bytes", b"J\xfcrgen\tM"))
    assert given.headers["x-TAG"] == "a"
    assert given.headers.getall("X-TAG") == ["a", "b"]
    assert given.headers.get("X-None") is None
    assert "X-tag" in given.headers
    assert given.headers["x-bytes"] == "J\xfcrgen\tM"
    names = [name.encode() for name, _ in given.headers.items()]
    assert names == [name for name, _ in (*FIELDS, (b"X-Tag", b""), (b"x-tAG", b""), (b"X-Bytes", b""))]


def test_its_repr_contains_no_secret() -> None:
    """A worker that logs the request does not log cookies, tokens or the query."""
    given = make((b"Cookie", b"sid=secret"), (b"Authorization", b"secret"), line=b"GET /chat?token=secret HTTP/1.1")
    assert "secret" not in repr(given) + str(given) + f"{given.forward(headers={'X-A': 'secret'})}"
    assert ID in repr(given)


@pytest.mark.parametrize(
    "name", ["id", "path", "raw_path", "headers", "cookies", "query", "origin", "tls", "site", "new"]
)
def test_no_attribute_can_be_set_or_deleted(name: str) -> None:
    given = make()
    with pytest.raises(AttributeError):
        setattr(given, name, "changed")
    with pytest.raises(AttributeError):
        delattr(given, name)


def test_it_is_immutable() -> None:
    given: Any = make((b"Cookie", b"a=1"), der=b"DER")
    for change in (
        lambda: given.headers.__setitem__("X", "1"),
        lambda: given.headers.add("X", "1"),
        lambda: given.headers.popall("Host"),
        lambda: given.query.__setitem__("room", "2"),
        lambda: given.query.pop("room"),
        lambda: given.cookies.__setitem__("a", "2"),
        lambda: given.cookies.pop("a"),
        lambda: given.subprotocols.append("x"),
        lambda: setattr(given.tls, "version", "x"),
        lambda: setattr(given.client_certificate, "subject", "x"),
    ):
        with pytest.raises((AttributeError, TypeError)):
            change()
    assert fields(given) == (*END_TO_END, (b"Cookie", b"a=1"), *OURS)


def test_forward_does_not_change_the_original() -> None:
    given = make((b"X-A", b"1"), (b"Sec-WebSocket-Protocol", b"a, b"))
    before = (given.path, [*given.query.items()], [*given.headers.items()], given.subprotocols, fields(given))
    given.forward(
        origin="localhost:1", path="/x", query="y", headers={"X-A": "2"}, remove_headers=["X-B"], subprotocols=["b"]
    )
    assert before == (given.path, [*given.query.items()], [*given.headers.items()], given.subprotocols, fields(given))
    assert given.origin is None


# --- forward ----------------------------------------------------------------------------------------------------------


def test_forward_without_arguments_changes_nothing() -> None:
    given = make((b"X-A", b"1"), (b"Sec-WebSocket-Protocol", b"a"), line=b"GET /%41?b%20=+ HTTP/1.1")
    again = given.forward()
    assert again is not given
    assert (head(again).target, fields(again)) == (head(given).target, fields(given))
    assert again.id == given.id


def test_headers_replace_in_any_case_and_in_the_underscore_spelling() -> None:
    given = make((b"x-user", b"forged"), (b"X-USER", b"forged"), (b"x_USER", b"forged"), (b"X-Kept", b"1"))
    after = given.forward(headers={"X-User": "ann", "x-more": ["a", "b"]})
    assert fields(after) == (
        *END_TO_END,
        (b"X-Kept", b"1"),
        *OURS,
        (b"X-User", b"ann"),
        (b"x-more", b"a"),
        (b"x-more", b"b"),
    )
    assert after.headers.getall("x-user") == ["ann"]
    assert after.headers.getall("x-more") == ["a", "b"]
    assert "x_user" not in after.headers


@pytest.mark.parametrize("forged", [b"X-User_Id", b"x_user-id"])
def test_headers_replace_in_a_mixed_spelling(forged: bytes) -> None:
    after = make((forged, b"forged")).forward(headers={"X-User-Id": "ann"})
    assert b"forged" not in [value for _, value in fields(after)]


def test_headers_with_an_underscore_replace_those_with_a_hyphen() -> None:
    after = make((b"X-User", b"forged")).forward(headers={"X_User": "ann"})
    assert b"forged" not in [value for _, value in fields(after)]


def test_empty_values_and_surrounding_blanks() -> None:
    after = make().forward(headers={"X-Empty": "", "X-Blanks": " \ta b\t ", "X-Latin": "ü"})
    assert fields(after)[-3:] == ((b"X-Empty", b""), (b"X-Blanks", b"a b"), (b"X-Latin", b"\xfc"))
    assert after.headers["X-Blanks"] == "a b"


def test_an_empty_list_sets_no_field() -> None:
    """No value is set, but the client's value for that name is not forwarded either."""
    after = make((b"X-User", b"forged")).forward(headers={"X-User": []}, remove_headers=["X-User"])
    assert "x-user" not in after.headers
    assert b"forged" not in [value for _, value in fields(after)]


def test_remove_headers() -> None:
    given = make((b"Cookie", b"a"), (b"cookie", b"b"), (b"X_Debug", b"1"), (b"X-Kept", b"1"))
    after = given.forward(remove_headers=("COOKIE", "x-debug", "X-Forwarded-Host", "forwarded", "X-None"))
    assert fields(after) == (*END_TO_END, (b"X-Kept", b"1"), *OURS[:4], OURS[6])
    assert after.headers.get("cookie") is None


def test_a_field_that_is_both_set_and_removed_is_set() -> None:
    after = make((b"X-A", b"1")).forward(headers={"X-A": "2"}, remove_headers=["X-A"])
    assert [value for name, value in fields(after) if name == b"X-A"] == [b"2"]


def test_the_tunnels_own_fields_can_be_set() -> None:
    after = make().forward(headers={"X-Forwarded-For": "192.0.2.1", "x-request-id": "mine", "Forwarded": "for=_x"})
    assert fields(after)[-3:] == (
        (b"X-Forwarded-For", b"192.0.2.1"),
        (b"x-request-id", b"mine"),
        (b"Forwarded", b"for=_x"),
    )
    assert len([name for name, _ in fields(after) if name.lower() == b"x-forwarded-for"]) == 1


def test_host() -> None:
    after = make().forward(headers={"host": "inside.example:81"})
    assert fields(after)[0] == (b"Host", b"inside.example:81")
    assert after.headers["Host"] == "inside.example:81"
    assert [name for name, _ in fields(after)].count(b"Host") == 1
    # It also overrides the site's origin_host.
    assert fields(after, SiteEdits(host="origin"))[0] == (b"Host", b"inside.example:81")
    assert fields(make().forward(), SiteEdits(host="origin"))[0] == (b"Host", b"localhost:1")


@pytest.mark.parametrize("host", ["", "a b", "a/b", "a@b", "a:99999999", ["a", "b"], [], "a\r\nX: 1", "ü", "[::1"])
def test_invalid_hosts(host: str | list[str]) -> None:
    if host == []:
        assert fields(make().forward(headers={"Host": host}))[0] == (b"Host", b"chat.example.com")
        return
    with pytest.raises(EdgeError):
        make().forward(headers={"Host": host})


def test_changes_of_the_site_come_first() -> None:
    site = SiteEdits(added=((b"X-Site", b"chat"), (b"X-Both", b"site")), removed=frozenset({b"x-gone", b"x-back"}))
    given = make((b"X-Gone", b"1"), (b"X-Back", b"1"), (b"X-Both", b"client"))
    after = given.forward(headers={"X-Both": "worker", "X-Back": "worker"}, remove_headers=["X-Site"])
    last = (fields(after, site)[len(END_TO_END) + len(OURS) :], fields(given, site)[-2:])
    assert last == (
        ((b"X-Both", b"worker"), (b"X-Back", b"worker")),
        ((b"X-Site", b"chat"), (b"X-Both", b"site")),
    )


def test_a_field_that_connection_nominates_can_be_set() -> None:
    nominating = (*without(b"Connection"), (b"Connection", b"Upgrade, X-User"), (b"X-User", b"client"))
    found = RequestReader().feed(request(nominating, b"GET / HTTP/1.1"))
    assert found is not None
    given = to_worker_request(found, dataclasses.replace(CONNECTION, request_id=ID), 0.0)
    assert b"client" not in [value for _, value in fields(given)]
    assert fields(given.forward(headers={"X-User": "ann"}))[-1] == (b"X-User", b"ann")


KEPT = [
    "Connection",
    "Keep-Alive",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
    "Content-Length",
    "Sec-WebSocket-Key",
    "Sec-WebSocket-Version",
    "Sec-WebSocket-Accept",
    "Sec-WebSocket-Extensions",
    "Sec-WebSocket-Protocol",
    "Sec-WebSocket-Whatever",
]


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("spelled", [str, str.lower, str.upper, lambda name: name.replace("-", "_")])
def test_hop_by_hop_and_handshake_fields_cannot_be_changed(name: str, spelled: Any) -> None:
    with pytest.raises(EdgeError, match="cannot be changed"):
        make().forward(headers={spelled(name): "1"})
    with pytest.raises(EdgeError, match="cannot be changed"):
        make().forward(remove_headers=[spelled(name)])


def test_host_cannot_be_removed_and_subprotocols_have_their_own_argument() -> None:
    with pytest.raises(EdgeError, match="cannot be changed"):
        make().forward(remove_headers=["Host"])
    with pytest.raises(EdgeError, match="subprotocols="):
        make().forward(headers={"Sec-WebSocket-Protocol": "a"})


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a:", "a\r\nb", "a\0", "ü", "a" * 257, None, 5, b"X-A", "X-A\n", "(x)"]
)
def test_invalid_names(name: Any) -> None:
    for wrong in ({"headers": {name: "1"}}, {"remove_headers": [name]}):
        with pytest.raises(EdgeError):
            make().forward(**wrong)


@pytest.mark.parametrize(
    "value",
    [
        "a\r\nb",
        "a\nb",
        "a\rb",
        "a\0b",
        "\x1b",
        "\x7f",
        "€",
        "\ud800",
        "a\n",
        "\n",
        None,
        5,
        b"a",
        {"a": 1},
        [None],
        ["a", "b\n"],
        [["a"]],
    ],
)
def test_invalid_values(value: Any) -> None:
    with pytest.raises(EdgeError) as caught:
        make().forward(headers={"X-A": value})
    assert "X-A" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_error_does_not_show_the_value() -> None:
    """It may be a secret."""
    with pytest.raises(EdgeError) as caught:
        make().forward(headers={"X-A": "secret\n"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"headers": [("X-A", "1")]},
        {"headers": "X-A: 1"},
        {"remove_headers": "X-A"},
        {"path": "chat"},
        {"path": ""},
        {"path": 5},
        {"path": "/a\0b"},
        {"path": b"/a"},
        {"query": "a b"},
        {"query": "a#b"},
        {"query": "ü"},
        {"query": "a\r\nb"},
        {"origin": ""},
        {"origin": 5},
        {"origin": "localhost"},
        {"origin": "http://localhost:1"},
        {"origin": "127.1:80"},
        {"origin": b"localhost:1"},
        {"subprotocols": ["a"]},
    ],
)
def test_an_error_is_raised_by_the_wrong_call(wrong: dict[str, Any]) -> None:
    with pytest.raises(EdgeError) as caught:
        make().forward(**wrong)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("wrong", [{"query": 5}, {"remove_headers": 5}, {"subprotocols": 5}, {"remove_headers": None}])
def test_a_wrong_type_is_an_error_too(wrong: dict[str, Any]) -> None:
    with pytest.raises(EdgeError):
        make().forward(**wrong)


def test_arguments_have_names() -> None:
    with pytest.raises(TypeError):
        make().forward("localhost:1")  # type: ignore[call-arg]


def test_origin() -> None:
    after = make().forward(origin="wss://Shard-1.Internal.:444/")
    assert after.origin == "wss://Shard-1.Internal.:444/"
    assert made(after).address == OriginAddress("shard-1.internal", 444, tls=True)
    later = after.forward(path="/x")
    assert (later.origin, made(later).address) == (after.origin, made(after).address)
    assert made(after.forward(origin="localhost:1")).address == OriginAddress("localhost", 1)
    assert made(make()).address is None


def test_chained() -> None:
    given = make((b"X-A", b"0"), (b"Sec-WebSocket-Protocol", b"a, b, c"))
    after = (
        given.forward(headers={"X-A": "1", "X-B": "1", "X-C": "1", "Host": "one.example"})
        .forward(headers={"x-a": "2"}, remove_headers=["X-B"], subprotocols=["a", "c"])
        .forward(headers={"X-B": "3", "Host": "two.example"}, path="/p", subprotocols=["c"])
        .forward(query={"q": "1"}, remove_headers=["x_c"])
    )
    assert head(after).target == b"/p?q=1"
    found = fields(after)
    assert found[0] == (b"Host", b"two.example")
    assert [(n, v) for n, v in found if n.lower().startswith(b"x-") and len(n) == 3] == [
        (b"x-a", b"2"),
        (b"X-B", b"3"),
    ]
    assert [value for name, value in found if name == b"Sec-WebSocket-Protocol"] == [b"c"]
    assert after.headers["X-A"] == "2"
    assert (after.path, dict(after.query), after.subprotocols) == ("/p", {"q": "1"}, ("c",))


# --- the head, whatever the changes -----------------------------------------------------------------------------------

_NAMES = (
    st.from_regex(r"\A[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,12}\Z")
    | st.sampled_from(
        [*KEPT, "Host", "X-Forwarded-For", "x_forwarded_for", "Cookie", "cookie", "X-A", "x_a", "Forwarded"]
    )
    | st.text(max_size=5)
)
_VALUES = (
    st.text(st.characters(codec="latin-1"), max_size=20)
    | st.text(max_size=6)
    | st.sampled_from(["\r\nX-Injected: 1", "a\r\n\r\nGET / HTTP/1.1", "a.example", " ", "\t"])
)
_HEADERS = st.dictionaries(_NAMES, _VALUES | st.lists(_VALUES, max_size=3), max_size=5)


def _as_cgi(name: bytes) -> bytes:
    """CGI and WSGI do not distinguish hyphens from underscores, nor upper from lower case."""
    return name.upper().replace(b"-", b"_")


@given(_HEADERS, st.lists(_NAMES, max_size=3), st.lists(st.tuples(_NAMES, _VALUES), max_size=4))
def test_forward_builds_one_request_with_exactly_these_fields(
    headers: dict[str, str | list[str]], removed: list[str], client: list[tuple[str, str]]
) -> None:
    more = [
        (name.encode(), value.strip(" \t").encode("latin-1"))
        for name, value in client
        if re.fullmatch(r"(?i)[xc][-_a-z]*", name) and re.fullmatch(r"[\t -~\x80-\xff]*", value)
    ]
    assume(not any(name.lower() in (b"connection", b"content-length", b"content_length") for name, _ in more))
    given = make(*more)
    try:
        after = given.forward(headers=headers, remove_headers=removed)
    except EdgeError:
        return
    wanted = [
        (name.encode(), one.strip(" \t").encode("latin-1"))
        for name, value in headers.items()
        if name.lower() != "host"
        for one in (value if isinstance(value, list) else [value])
    ]
    found = fields(after)
    assert list(found[len(found) - len(wanted) :]) == wanted
    kept = found[: len(found) - len(wanted)]
    named = {_as_cgi(name) for name, _ in wanted} | {_as_cgi(name.encode()) for name in removed}
    assert not {_as_cgi(name) for name, _ in kept} & named
    # The rest is what the client sent and what the tunnel adds, in order.
    own = [(n, v) for n, v in fields(given) if n.lower() != b"host"]
    assert [(n, v) for n, v in kept if n.lower() != b"host"] == [(n, v) for n, v in own if _as_cgi(n) not in named]
    # The fields of the handshake are the client's.
    by_name = {name.lower(): value for name, value in kept}
    assert by_name[b"sec-websocket-key"] == KEY
    assert (by_name[b"connection"], by_name[b"upgrade"]) == (b"Upgrade", b"websocket")
    assert [n.lower() for n, _ in found].count(b"host") == 1


# --- subprotocols -----------------------------------------------------------------------------------------------------


def test_kept_subprotocols_are_where_the_first_field_was() -> None:
    given = make((b"sec-websocket-protocol", b"a,b"), (b"X-A", b"1"), (b"Sec-WebSocket-Protocol", b"c"))
    assert fields(given.forward(subprotocols=["a", "c"])) == (
        *END_TO_END,
        (b"sec-websocket-protocol", b"a, c"),
        (b"X-A", b"1"),
        *OURS,
    )
    assert fields(given.forward(subprotocols=[])) == (*END_TO_END, (b"X-A", b"1"), *OURS)
    assert fields(given.forward(subprotocols=(p for p in ("b",))))[3] == (b"sec-websocket-protocol", b"b")


@pytest.mark.parametrize(
    "wrong", [["b", "a"], ["a", "a"], ["A"], ["d"], [None], [b"a"], ["a, b"], [""], "ab", ["a\r\n"]]
)
def test_invalid_subprotocols(wrong: Any) -> None:
    given = make((b"Sec-WebSocket-Protocol", b"a, b, c"))
    with pytest.raises(EdgeError, match=r"subprotocols must be (some of those|a list)"):
        given.forward(subprotocols=wrong)


_TOKENS = st.lists(st.from_regex(r"\A[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,6}\Z"), max_size=6)


def _is_part(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(one in rest for one in part)


@given(_TOKENS, st.data())
def test_any_ordered_part_of_the_subprotocols_and_nothing_else(offered: list[str], data: st.DataObject) -> None:
    """The accepted subprotocols are in the head, and the origin may choose only one of these."""
    given = make(*([(b"Sec-WebSocket-Protocol", ", ".join(offered).encode())] if offered else []))
    part = data.draw(st.lists(st.sampled_from(offered) if offered else st.just("x"), max_size=5))
    if not _is_part(part, offered):
        with pytest.raises(EdgeError):
            given.forward(subprotocols=part)
        return
    after = given.forward(subprotocols=part)
    assert after.subprotocols == tuple(part)
    found = [value for name, value in fields(after) if name.lower() == b"sec-websocket-protocol"]
    assert found == ([", ".join(part).encode()] if part else [])
    for chosen in {*offered, "never"}:
        answer = UpgradeResponseReader(made(after).request)
        said = (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: %b\r\n\r\n"
            % chosen.encode()
        )
        if chosen in part:
            assert isinstance(answer.feed(said), Switched)
        else:
            with pytest.raises(BadResponse):
                answer.feed(said)


# --- path and query ---------------------------------------------------------------------------------------------------

_PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20).map(lambda t: f"/{t}")
_VISIBLE = re.compile(rb"/[!-~]*")


def _normal(path: str) -> str:
    """The form that `path` has: no doubled slash, no dot segments."""
    segments: list[str] = []
    for part in (parts := path.split("/")):
        if part == "..":
            del segments[-1:]
        elif part not in ("", "."):
            segments.append(part)
    return "/" + "/".join(segments) + ("/" if segments and parts[-1] in ("", ".", "..") else "")


@given(_PATHS)
def test_a_path_is_read_as_it_was_set(path: str) -> None:
    after = make().forward(path=path)
    assert after.path == _normal(path)
    target = head(after).target
    assert _VISIBLE.fullmatch(target)
    assert target.endswith(b"?room=1")
    assert target.count(b"?") == 1
    assert b"#" not in target
    # Setting the path that was read changes nothing.
    assert after.forward(path=after.path).path == after.path


@given(st.text(max_size=10))
def test_any_text_as_a_path_is_one_target_or_an_error(text: str) -> None:
    """Also with lone surrogates, which UTF-8 cannot encode."""
    try:
        after = make().forward(path=text)
    except EdgeError:
        assert not text.startswith("/") or "\0" in text
        return
    assert _VISIBLE.fullmatch(head(after).target)
    assert after.path.startswith("/")


@given(
    st.dictionaries(
        st.text(max_size=8), st.text(max_size=8) | st.lists(st.text(max_size=4), min_size=1, max_size=3), max_size=4
    )
)
def test_a_query_from_a_mapping_is_read_as_it_was_set(query: dict[str, str | list[str]]) -> None:
    assume(not any("\ud800" <= c <= "\udfff" for c in str(query)))
    after = make().forward(query=query)
    assert _VISIBLE.fullmatch(head(after).target)
    wanted = {name: [value] if isinstance(value, str) else value for name, value in query.items()}
    assert {name: after.query.getall(name) for name in after.query} == wanted
    assert after.path == "/chat"


@pytest.mark.parametrize(
    ("query", "target"),
    [
        ("", b"/chat"),
        ({}, b"/chat"),
        ("a=1&b=%20?/", b"/chat?a=1&b=%20?/"),
        ({"a": ["1", "2"]}, b"/chat?a=1&a=2"),
        ({"a": ""}, b"/chat?a="),
        ({"a": []}, b"/chat"),
        ({"a&b": "c d"}, b"/chat?a%26b=c+d"),
    ],
)
def test_query(query: Any, target: bytes) -> None:
    assert head(make().forward(query=query)).target == target
    assert head(make().forward(path="/chat", query=query)).target == target


def test_a_query_that_was_read_can_be_set_again() -> None:
    given = make(line=b"GET /c?a=1&a=%C3%BC&b=x+y HTTP/1.1")
    assert [*given.forward(query=given.query).query.items()] == [*given.query.items()]


def test_the_path_alone_can_be_changed() -> None:
    assert head(make(line=b"GET /a?b%20c HTTP/1.1").forward(path="/ü?#%/")).target == b"/%C3%BC%3F%23%25/?b%20c"
    assert head(make(line=b"GET /a? HTTP/1.1").forward(path="/b")).target == b"/b?"


def test_normalise_path_is_the_firewalls() -> None:
    for path in ("/a/../b", "/%2e", "/a//b", "/a/./", "/"):
        assert _normal(path.replace("%2e", ".")) == normalise_path(path.encode())


# --- Reply ------------------------------------------------------------------------------------------------------------


def rendered(reply: Reply) -> tuple[int, list[Field], bytes]:
    """Parse what the client gets, which must be exactly one response."""
    refusal = to_outcome(reply, make())
    assert isinstance(refusal, Refusal)
    assert (refusal.status, refusal.reason, refusal.detail) == (reply.status, "edge: reply", "")
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(render_refusal(refusal, ID))
    event = client.next_event()
    assert isinstance(event, h11.Response)
    body = b""
    while isinstance(data := client.next_event(), h11.Data):
        body += bytes(data.data)
    assert isinstance(data, h11.EndOfMessage)
    assert client.trailing_data == (b"", False)
    return event.status_code, list(event.headers.raw_items()), body


@pytest.mark.parametrize("status", [300, 302, 304, 399, 400, 401, 418, 499, 500, 503, 599])
def test_a_status_from_300_to_599(status: int) -> None:
    found, headers, body = rendered(Reply(status))
    assert (found, body) == (status, b"")
    assert (b"X-Request-Id", ID.encode()) in headers
    assert (b"Connection", b"close") in headers
    assert ((b"Content-Length", b"0") in headers) == (status != 304)


@pytest.mark.parametrize("status", [100, 101, 103, 200, 201, 204, 206, 299, 0, -1, 600, 999, 10**9])
def test_other_statuses_are_refused(status: int) -> None:
    with pytest.raises(InvalidReply) as caught:
        Reply(status, "hello")
    assert str(status) in str(caught.value)
    assert ("an edge worker cannot be a WebSocket endpoint" in str(caught.value)) == (status < 300)
    assert issubclass(InvalidReply, EdgeError)


@pytest.mark.parametrize("status", [None, "401", 401.0, True, b"401", [401]])
def test_a_status_is_a_number(status: Any) -> None:
    with pytest.raises(InvalidReply, match="a number from 300 to 599"):
        Reply(status)


def test_a_status_of_the_standard_library() -> None:
    import http  # noqa: PLC0415

    assert rendered(Reply(http.HTTPStatus.FORBIDDEN))[0] == 403


@pytest.mark.parametrize("body", [None, 5, ["a"], {"a": 1}, bytearray(b"a")])
def test_a_body_is_text_or_bytes(body: Any) -> None:
    with pytest.raises(InvalidReply, match="text or bytes"):
        Reply(401, body)


def test_bodies() -> None:
    assert rendered(Reply(401, "ü\n"))[2] == "ü\n".encode()
    assert rendered(Reply(401, b"\0\xff"))[2] == b"\0\xff"
    assert rendered(Reply(401, "\ud800"))[2] == b"\\ud800"
    with pytest.raises(InvalidReply, match="304 has no body"):
        Reply(304, "a")


def test_headers_of_a_reply() -> None:
    _, headers, _ = rendered(Reply(302, "x", {"Location": "/login?a=b", "Set-Cookie": ["a=1", "b=2"], "X-Empty": ""}))
    assert headers == [
        (b"Content-Length", b"1"),
        (b"Connection", b"close"),
        (b"Content-Type", b"text/plain; charset=utf-8"),
        (b"Location", b"/login?a=b"),
        (b"Set-Cookie", b"a=1"),
        (b"Set-Cookie", b"b=2"),
        (b"X-Empty", b""),
        (b"X-Request-Id", ID.encode()),
    ]
    _, headers, _ = rendered(Reply(403, "{}", {"CONTENT-type": "application/json"}))
    assert [value for name, value in headers if name.lower() == b"content-type"] == [b"application/json"]


@pytest.mark.parametrize(
    "name", [*KEPT, "Host", "X-Request-Id", "x-request-ID", "content_length", "a b", "", "ü", "a\r\nb"]
)
def test_invalid_header_names_of_a_reply(name: str) -> None:
    with pytest.raises(InvalidReply):
        Reply(401, "", {name: "1"})


@pytest.mark.parametrize("value", ["a\r\nb", "a\n", "\0", "\x1b[2J", "€", None, 5])
def test_invalid_header_values_of_a_reply(value: Any) -> None:
    with pytest.raises(InvalidReply):
        Reply(401, "", {"X-A": value})


@given(st.integers(300, 599), st.text(max_size=20) | st.binary(max_size=20), _HEADERS)
def test_any_valid_reply_is_one_response(status: int, body: str | bytes, headers: dict[str, Any]) -> None:
    try:
        reply = Reply(status, body, headers)
    except InvalidReply:
        return
    found, sent, content = rendered(reply)
    wanted = body if isinstance(body, bytes) else body.encode("utf-8", "backslashreplace")
    assert (found, content) == (status, wanted)
    assert [name.lower() for name, _ in sent].count(b"x-request-id") == 1
    assert [name.lower() for name, _ in sent].count(b"connection") == 1


def test_a_reply_is_immutable() -> None:
    reply: Any = Reply(401, "no", {"X-A": "1"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        reply.status = 200


def test_changing_the_headers_later_does_not_change_a_reply() -> None:
    headers = {"X-A": "1"}
    reply = Reply(401, "no", headers)
    headers["X-A"] = "a\r\nX-Injected: 1"
    assert (b"X-A", b"1") in rendered(reply)[1]


# --- the results of a worker ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [None, 401, "401", (401, "no"), Reply, WorkerRequest, object(), True, {"status": 401}])
def test_other_return_values_are_errors(said: object) -> None:
    with pytest.raises(EdgeError, match=r"a worker must return the request, request\.forward"):
        to_outcome(said, make())


def test_another_clients_request_is_refused() -> None:
    """However it was changed: its cookies and its key are another client's."""
    kept = make()
    for said in (kept, kept.forward(), kept.forward(headers={"X-A": "1"}), dataclasses.replace(kept, id="other")):
        assert to_outcome(said, kept)
        with pytest.raises(EdgeError, match="another client's"):
            to_outcome(said, make())


class _Denied(Reply):
    pass


def test_a_subclass_of_reply_is_a_refusal_or_invalid() -> None:
    """The worker meant to refuse, so `worker_on_error = "forward"` does not apply."""
    with contextlib.suppress(InvalidReply):
        assert isinstance(to_outcome(_Denied(403), make()), Refusal)


def test_replacing_attributes_by_other_means_has_no_effect() -> None:
    """`dataclasses.replace` and the like bypass `forward`; only the origin passed to `forward` counts."""
    assert made(dataclasses.replace(make(), origin="evil.example:80")).address is None
