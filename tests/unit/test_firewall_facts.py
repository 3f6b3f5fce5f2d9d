"""Facts: each field, and the normalised path, whatever a client sends."""

import dataclasses
import re
from datetime import UTC, datetime
from urllib.parse import quote, unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.corpus import corpus
from tests.handshakes import FIELDS as PLAIN
from tests.handshakes import Field, request, without
from tlstunnel.firewall.cookies import MAX_COOKIES
from tlstunnel.firewall.facts import (
    FIELDS,
    MAX_ELEMENTS,
    MAX_QUERY_VALUES,
    Facts,
    gather,
    normalise_path,
    refuse_ambiguous,
)
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader

CONNECTION = Connection(
    ip="192.0.2.1",
    tls_version="TLSv1.3",
    tls_cipher="TLS_AES_128_GCM_SHA256",
    tls_sni="chat.example.com",
    tls_ja4="t13d1516h2_8daaf6152771_b0da82dd1658",
    client_subject="CN=device-7",
    site="*.example.com",
)


def facts(target: bytes = b"/", *added: Field, strict: bool = True, ip: str = "192.0.2.1") -> Facts:
    found = RequestReader().feed(request((*PLAIN, *added), b"GET %b HTTP/1.1" % target))
    assert found is not None
    connection = dataclasses.replace(CONNECTION, ip=ip)
    return gather(found, connection, strict_path=strict, now=1_767_225_600.5)


def refused(target: bytes, *added: Field, strict: bool = True) -> Refusal:
    with pytest.raises(Refusal) as caught:
        facts(target, *added, strict=strict)
    assert caught.value.status == 400
    return caught.value


def test_every_field_has_a_value() -> None:
    found = facts(
        b"/a%20b/?x=1",
        (b"Origin", b"https://chat.example.com"),
        (b"User-Agent", b"Mozilla/5.0"),
        (b"Cookie", b"a=1"),
        (b"Sec-WebSocket-Protocol", b"mqtt, v2"),
        (b"Sec-WebSocket-Extensions", b"permessage-deflate; client_max_window_bits, x-other"),
    )
    assert {name: getattr(found, name) for name in FIELDS if name != "headers"} == {
        "ip": "192.0.2.1",
        "method": "GET",
        "host": "chat.example.com",
        "path": "/a b/",
        "raw_path": "/a%20b/",
        "query": {"x": ["1"]},
        "cookies": {"a": "1"},
        "origin": "https://chat.example.com",
        "user_agent": "Mozilla/5.0",
        "subprotocols": ("mqtt", "v2"),
        "extensions": ("permessage-deflate", "x-other"),
        "tls_version": "TLSv1.3",
        "tls_cipher": "TLS_AES_128_GCM_SHA256",
        "tls_sni": "chat.example.com",
        "tls_ja4": "t13d1516h2_8daaf6152771_b0da82dd1658",
        "client_subject": "CN=device-7",
        "site": "*.example.com",
        "now": datetime(2026, 1, 1, 0, 0, 0, 500_000, UTC),
    }
    assert found.headers["user-agent"] == "Mozilla/5.0"
    assert found.request.target == b"/a%20b/?x=1"


def test_missing_fields_are_empty() -> None:
    found = facts()
    assert (found.origin, found.user_agent, found.subprotocols, found.extensions) == ("", "", (), ())
    assert (found.query, found.cookies) == ({}, {})


def test_header_names_are_in_lower_case_and_repeated_ones_joined() -> None:
    found = facts(b"/", (b"X-A", b"1"), (b"x-a", b"2"), (b"Cookie", b"a=1"), (b"cookie", b"b=2"), (b"X-L", b"\xe9"))
    assert found.headers["x-a"] == "1, 2"
    assert found.headers["cookie"] == "a=1; b=2"
    assert found.headers["x-l"] == "\u00e9"
    assert found.cookies == {"a": "1", "b": "2"}
    assert all(name == name.lower() for name in found.headers)


def test_repeated_fields_are_joined() -> None:
    added = ((b"Origin", b"https://a.example"), (b"Origin", b"https://b.example"), (b"User-Agent", b"a"))
    assert facts(b"/", *added).origin == "https://a.example, https://b.example"


@pytest.mark.parametrize(
    ("value", "cookies"),
    [
        (b"a=1; b=2", {"a": "1", "b": "2"}),
        (b"a=1;b=2;", {"a": "1", "b": "2"}),
        (b'a="1 2"; b="', {"a": "1 2", "b": '"'}),
        (b"a=1=2", {"a": "1=2"}),
        (b"a=first; a=second", {"a": "first"}),
        (b"A=1; a=2", {"A": "1", "a": "2"}),
        (b"alone; =nameless; a=", {"": "nameless", "a": ""}),
        (b"a=%2f\xff", {"a": "%2F\u00ff"}),
    ],
)
def test_cookies(value: bytes, cookies: dict[str, str]) -> None:
    assert facts(b"/", (b"Cookie", value)).cookies == cookies


@pytest.mark.parametrize(
    ("query", "found"),
    [
        (b"a=1&b=2&a=3", {"a": ["1", "3"], "b": ["2"]}),
        (b"a", {"a": [""]}),
        (b"a=&&b", {"a": [""], "b": [""]}),
        (b"a=b=c?d", {"a": ["b=c?d"]}),
        (b"a+b=c+d%2B", {"a b": ["c d+"]}),
        (b"url=https%3A%2F%2Fa.example%2F%3Fx%3D%252e", {"url": ["https://a.example/?x=%2e"]}),
        (b"p=a\\b%5c", {"p": ["a\\b\\"]}),
        (b"n=J%C3%BCrgen", {"n": ["J\u00fcrgen"]}),
        (b"n=100%&m=%zz", {"n": ["100%"], "m": ["%zz"]}),
        (b"A=1&a=2", {"A": ["1"], "a": ["2"]}),
    ],
)
def test_query(query: bytes, found: dict[str, list[str]]) -> None:
    assert facts(b"/?" + query).query == found


@pytest.mark.parametrize(
    ("ip", "seen"),
    [
        ("::ffff:192.0.2.9", "192.0.2.9"),
        ("::ffff:c000:209", "192.0.2.9"),
        ("::1", "::1"),
        ("2001:db8::1", "2001:db8::1"),
        ("", ""),
    ],
)
def test_ipv4_mapped_addresses_are_ipv4(ip: str, seen: str) -> None:
    assert facts(ip=ip).ip == seen


# The path.


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/", "/"),
        (b"/a/b", "/a/b"),
        (b"/a/b/", "/a/b/"),
        (b"/Admin", "/Admin"),
        (b"/%61dmin", "/admin"),
        (b"/%41dmin", "/Admin"),
        (b"/a%20b", "/a b"),
        (b"/b%C3%BCcher", "/b\u00fccher"),
        (b"//admin", "/admin"),
        (b"///", "/"),
        (b"/a//b///c", "/a/b/c"),
        (b"/a//", "/a/"),
        (b"/./admin", "/admin"),
        (b"/x/../admin", "/admin"),
        (b"/x/%2e%2e/admin", "/admin"),
        (b"/x/.%2E/admin", "/admin"),
        (b"/x//../admin", "/admin"),
        (b"/../../admin", "/admin"),
        (b"/admin/.", "/admin/"),
        (b"/admin/..", "/"),
        (b"/a/b/..", "/a/"),
        (b"/..", "/"),
        (b"/...", "/..."),
        (b"/.admin", "/.admin"),
        (b"/admin..", "/admin.."),
        (b"/admin;a=1", "/admin;a=1"),
        (b"/admin%3Fa", "/admin?a"),
        (b"/admin%0a", "/admin\n"),
        (b"/100%25", "/100%"),
        (b"/%2541dmin", "/%41dmin"),
    ],
)
def test_path(raw: bytes, path: str) -> None:
    assert normalise_path(raw) == path


@pytest.mark.parametrize(
    ("reference", "target"),
    # RFC 3986 section 5.4: merged with the base's /b/c/ (section 5.2.3), and 5.2.4's own example.
    [
        (b"g", "/b/c/g"),
        (b"./g", "/b/c/g"),
        (b"g/", "/b/c/g/"),
        (b"g;x", "/b/c/g;x"),
        (b";x", "/b/c/;x"),
        (b".", "/b/c/"),
        (b"./", "/b/c/"),
        (b"..", "/b/"),
        (b"../", "/b/"),
        (b"../g", "/b/g"),
        (b"../..", "/"),
        (b"../../", "/"),
        (b"../../g", "/g"),
        (b"../../../g", "/g"),
        (b"../../../../g", "/g"),
        (b"g.", "/b/c/g."),
        (b".g", "/b/c/.g"),
        (b"g..", "/b/c/g.."),
        (b"..g", "/b/c/..g"),
        (b"./../g", "/b/g"),
        (b"./g/.", "/b/c/g/"),
        (b"g/./h", "/b/c/g/h"),
        (b"g/../h", "/b/c/h"),
        (b"g;x=1/./y", "/b/c/g;x=1/y"),
        (b"g;x=1/../y", "/b/c/y"),
        (b"../../a/b/c/./../../g", "/a/g"),
    ],
)
def test_dot_segments_are_removed_as_in_the_rfc(reference: bytes, target: str) -> None:
    assert normalise_path(b"/b/c/" + reference) == target


AMBIGUOUS = {
    "an encoded slash": b"/x%2fadmin",
    "an encoded slash, upper case": b"/x%2Fadmin",
    "an encoded dot segment with its slash": b"/x/..%2fadmin",
    "a backslash": b"/x\\admin",
    "an encoded backslash": b"/x%5cadmin",
    "an encoded backslash, upper case": b"/x%5Cadmin",
    "NUL": b"/admin%00",
    "NUL before an extension": b"/admin%00.png",
    "NUL in the query": b"/?a=%00",
    "overlong slash": b"/x%c0%afadmin",
    "overlong dot": b"/x/%c0%ae%c0%ae/admin",
    "overlong slash of three bytes": b"/x%e0%80%afadmin",
    "overlong slash in the query": b"/?p=%c0%af",
    "latin-1": b"/caf%e9",
    "latin-1 in the query": b"/?a=%e9",
    "a surrogate": b"/%ed%a0%80",
    "half a character": b"/a%c3",
    "a doubly encoded dot": b"/x/%252e%252e/admin",
    "a doubly encoded slash": b"/x%252fadmin",
    "a doubly encoded letter": b"/%2561dmin",
    "an encoded percent whose digits are encoded": b"/%25%36%31dmin",
    "a percent before encoded digits": b"/%%36%31dmin",
    "a percent that begins no escape": b"/100%",
    "a percent before other letters": b"/%zz",
    "an escape of IIS": b"/%u0061dmin",
    "a dot segment": b"/x/../admin",
    "a dot segment at the end": b"/admin/..",
    "a single dot": b"/./admin",
    "a single dot at the end": b"/admin/.",
    "an encoded dot segment": b"/admin/%2e%2e/x",
    "a partly encoded dot segment": b"/admin/.%2E/x",
    "a dot segment with parameters": b"/admin/..;a=1/x",
    "a dot segment with encoded parameters": b"/admin/..%3ba/x",
    "two slashes": b"//x/admin",
    "two slashes at the end": b"/admin//",
    "two slashes before a query": b"/admin//?a",
    "an empty segment with parameters": b"/x/;a/admin",
    "LF": b"/admin%0a",
    "CR": b"/admin%0D",
    "TAB": b"/%09admin",
    "DEL": b"/admin%7f",
    "a C1 control character": b"/admin%c2%85",
}


@pytest.mark.parametrize("target", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_ambiguous_target_is_refused(target: bytes) -> None:
    refusal = refused(target)
    assert refusal.reason == "ambiguous target"
    assert facts(target, strict=False).request.target == target


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/x%2fadmin", "/x/admin"),
        (b"/x/..%2fadmin", "/admin"),
        (b"/x%5cadmin", "/x\\admin"),
        (b"/%252e%252e/admin", "/%2e%2e/admin"),
        (b"/caf%e9", "/caf\ufffd"),
        (b"/a%00", "/a\0"),
    ],
)
def test_path_of_an_accepted_target(raw: bytes, path: str) -> None:
    assert facts(raw, strict=False).path == path


def test_query_may_contain_what_a_path_may_not() -> None:
    assert facts(b"/?next=%2Fa%5Cb\\c%252e%zz%//a/../b/;c%0a%0D").path == "/"


@pytest.mark.parametrize(
    "target", [b"/.well-known/x", b"/a..b/...", b"/..a/.b", b"/a;b=1/c;d", b"/%C3%BC%20", b"/a/", b"/%2ea", b"/@x:80"]
)
def test_ordinary_paths_are_accepted(target: bytes) -> None:
    assert facts(target).request.target == target


def test_targets_of_real_applications_are_accepted() -> None:
    for sample in corpus.handshakes():
        refuse_ambiguous(sample.request.target)


# Bounds.


def test_too_many_query_values_are_refused() -> None:
    most = b"&".join([b"a"] * MAX_QUERY_VALUES)
    assert len(facts(b"/?" + most).query["a"]) == MAX_QUERY_VALUES
    assert refused(b"/?a&" + most, strict=False).reason == "too many query values"


def test_too_many_cookies_are_refused() -> None:
    most = b";".join(b"c%d=" % number for number in range(MAX_COOKIES))
    assert len(facts(b"/", (b"Cookie", most)).cookies) == MAX_COOKIES
    assert refused(b"/", (b"Cookie", most), (b"Cookie", b"a=1")).reason == "too many cookies"
    # Python's http.cookies separates cookies at white space, too.
    spaces = b" ".join(b"c%d=1" % number for number in range(MAX_COOKIES + 1))
    assert refused(b"/", (b"Cookie", spaces)).reason == "too many cookies"


@pytest.mark.parametrize("name", [b"Sec-WebSocket-Protocol", b"Sec-WebSocket-Extensions"])
def test_too_many_offers_are_refused(name: bytes) -> None:
    most = b",".join([b"a"] * MAX_ELEMENTS)
    found = facts(b"/", (name, most))
    assert MAX_ELEMENTS in (len(found.subprotocols), len(found.extensions))
    assert refused(b"/", (name, most), (name, b"a")).reason == "too many elements"


# Any request.

pieces = st.sampled_from(b"/ // . .. %2e %2E%2e %2f %5c \\ %25 % %c0%af %00 %c3%bc a admin 2e %61 ; %u002f %e9".split())
paths = st.lists(pieces, max_size=12).map(lambda found: b"/" + b"".join(found))
visible = st.binary(max_size=60).map(lambda data: b"/" + bytes(33 + byte % 94 for byte in data).replace(b"#", b""))


@given(raw=paths | visible)
@example(raw=b"/%2e%2e/%2e%2e/")
def test_normalising_twice_changes_nothing(raw: bytes) -> None:
    path = normalise_path(raw)
    assert path.startswith("/")
    assert "//" not in path
    assert not {".", ".."} & set(path.split("/"))
    # A target that is forwarded unchanged normalises to the expected form.
    assert normalise_path(quote(path).encode()) == path


@given(target=paths | visible)
def test_strict_targets_have_one_reading(target: bytes) -> None:
    raw = target.partition(b"?")[0]
    try:
        path = facts(target).path
    except Refusal:
        return
    assert "\\" not in path
    assert "\0" not in path
    assert "\ufffd" not in path or b"%EF%BF%BD" in raw.upper()
    # Decoding once more has no effect, so it does not matter whether an origin does.
    assert unquote(path) == path
    # Nothing is removed, and no escape decodes to a slash.
    assert path.count("/") == raw.count(b"/")
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", path)
    assert normalise_path(raw) == unquote(raw.decode())


values = st.binary(max_size=40).map(lambda data: bytes(b for b in data if b >= 32 and b != 127).strip(b" "))
names = st.sampled_from([b"Cookie", b"Origin", b"User-Agent", b"X-A", b"Sec-WebSocket-Protocol", b"Forwarded"])


@given(
    target=visible.map(lambda path: path.replace(b"%", b"")),
    added=st.lists(st.tuples(names, values), max_size=8),
    strict=st.booleans(),
)
def test_no_request_makes_a_field_raise(target: bytes, added: list[Field], strict: bool) -> None:
    try:
        found = facts(target, *added, strict=strict)
    except Refusal:
        return
    for name in FIELDS:
        getattr(found, name)
    for key, value in found.headers.items():
        key.encode()
        value.encode()
    assert all(isinstance(value, str) for values in found.query.values() for value in values)


def test_host_has_no_port_and_no_case() -> None:
    found = RequestReader().feed(request(((b"Host", b"Chat.Example.COM.:8443"), *without(b"Host"))))
    assert found is not None
    assert gather(found, CONNECTION, strict_path=True, now=0).host == "chat.example.com"
