"""The request as the origin gets it: which fields stay, which end at this hop, and which proxies are trusted."""

import re

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.handshakes import FIELDS, RICH_FIELDS, Field, mutated, request, without
from tlstunnel.addresses import Networks
from tlstunnel.escaping import printable
from tlstunnel.handshake.forwarding import Forwarding, find_client_address, read_request_id, render_forwarded_head
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader, UpgradeRequest

PEER = "198.51.100.7"
ID = "0123456789abcdef"
FROM_CLIENT = Forwarding(PEER, ID, trusted=False)
FROM_PROXY = Forwarding(PEER, ID, trusted=True)
TRUSTED = Networks.parse(["10.0.0.0/8", "2001:db8:1::/48"])
OURS = (
    (b"Connection", b"Upgrade"),
    (b"Upgrade", b"websocket"),
    (b"X-Forwarded-For", PEER.encode()),
    (b"X-Forwarded-Proto", b"https"),
    (b"X-Forwarded-Host", b"chat.example.com"),
    (b"Forwarded", b'for=198.51.100.7;proto=https;host="chat.example.com"'),
    (b"X-Request-Id", ID.encode()),
)
END_TO_END = without(b"Upgrade", without(b"Connection"))


def read(
    *more: Field, fields: tuple[Field, ...] = FIELDS, line: bytes = b"GET /chat?room=1 HTTP/1.1"
) -> UpgradeRequest:
    found = RequestReader().feed(request((*fields, *more), line))
    assert found is not None
    return found


def parsed(head: bytes) -> h11.Request:
    """Return how a server parses it: it must be one request without a body, and nothing after it."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(head)
    event = server.next_event()
    assert isinstance(event, h11.Request)
    assert isinstance(server.next_event(), h11.EndOfMessage)
    assert server.trailing_data == (b"", False)
    return event


def forwarded(found: UpgradeRequest, forwarding: Forwarding = FROM_CLIENT) -> tuple[Field, ...]:
    return tuple(parsed(render_forwarded_head(found, forwarding)).headers.raw_items())


def values(fields: tuple[Field, ...], name: bytes) -> list[bytes]:
    return [value for found, value in fields if found.lower() == name.lower()]


# What stays.


def test_fields_keep_order_and_case_and_the_tunnels_come_last() -> None:
    more = ((b"X-b", b"2"), (b"cOOkie", b"a=1"), (b"X-B", b"1"), (b"Origin", b"https://chat.example.com"))
    assert forwarded(read(*more)) == END_TO_END + more + OURS


def test_head_is_the_one_in_the_rfc() -> None:
    assert render_forwarded_head(read(), FROM_CLIENT) == (
        b"GET /chat?room=1 HTTP/1.1\r\n"
        b"Host: chat.example.com\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Sec-WebSocket-Version: 13\r\n"
        b"Connection: Upgrade\r\n"
        b"Upgrade: websocket\r\n"
        b"X-Forwarded-For: 198.51.100.7\r\n"
        b"X-Forwarded-Proto: https\r\n"
        b"X-Forwarded-Host: chat.example.com\r\n"
        b'Forwarded: for=198.51.100.7;proto=https;host="chat.example.com"\r\n'
        b"X-Request-Id: 0123456789abcdef\r\n"
        b"\r\n"
    )


@pytest.mark.parametrize("target", [b"/", b"//a", b"/a%2fb?c=%20&d=http://e", b"/?", b'/a|b"c'])
def test_target_is_untouched(target: bytes) -> None:
    assert parsed(render_forwarded_head(read(line=b"GET %b HTTP/1.1" % target), FROM_CLIENT)).target == target


def test_extensions_and_subprotocols_are_untouched() -> None:
    more = (
        (b"Sec-WebSocket-Extensions", b"permessage-deflate; client_max_window_bits; server_max_window_bits=10"),
        (b"sec-websocket-protocol", b"chat,  superchat"),
        (b"Sec-WebSocket-Extensions", b"x-other"),
        (b"Sec-WebSocket-Protocol", b"third"),
    )
    assert forwarded(read(*more)) == END_TO_END + more + OURS


def test_bytes_above_127_are_untouched() -> None:
    more = ((b"X-Name", b"J\xc3\xbcrgen\tM\xfcller"),)
    assert forwarded(read(*more)) == END_TO_END + more + OURS


# Hop by hop: RFC 9110 section 7.6.1.


@pytest.mark.parametrize(
    "name",
    [b"Keep-Alive", b"Proxy-Connection", b"TE", b"Trailer", b"keep-alive", b"PROXY-CONNECTION"],
)
def test_hop_by_hop_field_is_not_forwarded(name: bytes) -> None:
    assert forwarded(read((name, b"x"))) == END_TO_END + OURS


def test_upgrade_and_connection_are_set_anew() -> None:
    fields = (*END_TO_END, (b"Upgrade", b"h2c, WebSocket"), (b"Connection", b"keep-alive"), (b"connection", b"UPGRADE"))
    assert forwarded(read(fields=fields)) == END_TO_END + OURS


@pytest.mark.parametrize(
    "connection", [b"Upgrade, X-Private", b"x-private , upgrade", b"Upgrade,,X-PRIVATE", b"Upgrade,\tx-Private\t"]
)
def test_field_that_connection_names_is_not_forwarded(connection: bytes) -> None:
    fields = (*without(b"Connection"), (b"Connection", connection))
    assert values(forwarded(read((b"X-Private", b"1"), (b"x-private", b"2"), fields=fields)), b"X-Private") == []


def test_fields_that_two_connection_lines_name_are_not_forwarded() -> None:
    more = ((b"Connection", b"A"), (b"A", b"1"), (b"B", b"2"), (b"connection", b"b"))
    assert forwarded(read(*more)) == END_TO_END + OURS


@pytest.mark.parametrize(
    "name",
    [
        b"Host",
        b"Sec-WebSocket-Key",
        b"Sec-WebSocket-Version",
        b"Sec-WebSocket-Protocol",
        b"Sec-WebSocket-Extensions",
        b"Content-Length",
    ],
)
def test_fields_of_the_handshake_cannot_be_nominated_away(name: bytes) -> None:
    more = ((b"Sec-WebSocket-Protocol", b"chat"), (b"Sec-WebSocket-Extensions", b"x"), (b"Content-Length", b"0"))
    fields = (*without(b"Connection"), (b"Connection", b"Upgrade, " + name), *more)
    assert forwarded(read(fields=fields)) == END_TO_END + more + OURS


@pytest.mark.parametrize("name", [b"X-Forwarded-For", b"Forwarded", b"X-Request-Id", b"Upgrade"])
def test_the_tunnels_fields_cannot_be_nominated_away(name: bytes) -> None:
    fields = (*without(b"Connection"), (b"Connection", b"Upgrade, " + name))
    assert forwarded(read(fields=fields)) == END_TO_END + OURS
    proxied = forwarded(read((b"X-Forwarded-For", b"192.0.2.1"), fields=fields), FROM_PROXY)
    assert values(proxied, b"X-Forwarded-For") == [b"192.0.2.1, " + PEER.encode()]


@pytest.mark.parametrize("name", [b"Hostname", b"Host-Override", b"Content-Length-Hint"])
def test_nominated_field_is_not_forwarded_whatever_its_name_begins_with(name: bytes) -> None:
    """RFC 9110 section 7.6.1: what Connection names MUST be removed. Only Host itself is Host."""
    fields = (*without(b"Connection"), (b"Connection", b"Upgrade, " + name))
    assert values(forwarded(read((name, b"x"), fields=fields)), name) == []


# Fields with which a client claims to be a proxy.

FORGED = [
    b"X-Forwarded-For",
    b"x-forwarded-for",
    b"X-Forwarded-Proto",
    b"X-Forwarded-Host",
    b"X-Forwarded-Port",
    b"X-Forwarded-Prefix",
    b"X-Forwarded-Anything",
    b"Forwarded",
    b"FORWARDED",
    b"X-Real-IP",
    b"X-Request-Id",
    b"X_Forwarded_For",
    b"X-Forwarded_For",
    b"x_forwarded-proto",
    b"X_Real_IP",
    b"X_Request_Id",
    b"X.Forwarded.For",
    b"X+Real~IP",
    b"x!request|id",
]


@pytest.mark.parametrize("name", FORGED)
def test_forged_field_is_dropped(name: bytes) -> None:
    assert forwarded(read((name, b"192.0.2.66"), (name, b"again"))) == END_TO_END + OURS


@pytest.mark.parametrize("name", [b"X-Forwarded", b"X-Forward-For", b"Forwarded-For", b"X-Request-Identity", b"Via"])
def test_similar_names_are_forwarded(name: bytes) -> None:
    assert forwarded(read((name, b"a"))) == (*END_TO_END, (name, b"a"), *OURS)


# The tunnel's own fields: RFC 7239 section 6.


@pytest.mark.parametrize(
    ("peer", "x_forwarded_for", "node"),
    [
        ("192.0.2.1", b"192.0.2.1", b"192.0.2.1"),
        ("2001:db8::7", b"2001:db8::7", b'"[2001:db8::7]"'),
        ("", b"unknown", b"unknown"),
    ],
    ids=["IPv4", "IPv6", "Unix socket"],
)
def test_address_of_the_peer(peer: str, x_forwarded_for: bytes, node: bytes) -> None:
    fields = forwarded(read(), Forwarding(peer, ID, trusted=False))
    assert values(fields, b"X-Forwarded-For") == [x_forwarded_for]
    assert values(fields, b"Forwarded") == [b'for=%b;proto=https;host="chat.example.com"' % node]


@pytest.mark.parametrize("host", [b"[::1]:8443", b"a,b;c=d:1", b"chat.example.com:8443"])
def test_host_is_quoted(host: bytes) -> None:
    """RFC 7239 section 4: a value that is not a token is a quoted-string."""
    fields = forwarded(read(fields=((b"Host", host), *without(b"Host"))))
    assert values(fields, b"Forwarded") == [b'for=198.51.100.7;proto=https;host="%b"' % host]
    assert values(fields, b"X-Forwarded-Host") == [host]


# Fields of a trusted proxy.


@pytest.mark.parametrize("name", [b"X_Real_IP", b"X.Real.IP", b"X.Forwarded-Port"])
def test_only_the_usual_spelling_of_a_proxys_field_is_kept(name: bytes) -> None:
    assert forwarded(read((name, b"192.0.2.66")), FROM_PROXY) == END_TO_END + OURS


def test_chain_of_a_trusted_proxy_grows() -> None:
    more = (
        (b"X-Forwarded-For", b"192.0.2.1"),
        (b"Forwarded", b"for=192.0.2.1;proto=http"),
        (b"x-forwarded-for", b"10.0.0.1, 10.0.0.2"),
        (b"forwarded", b"for=10.0.0.1"),
    )
    fields = forwarded(read(*more), FROM_PROXY)
    assert values(fields, b"X-Forwarded-For") == [b"192.0.2.1, 10.0.0.1, 10.0.0.2, 198.51.100.7"]
    assert values(fields, b"Forwarded") == [
        b'for=192.0.2.1;proto=http, for=10.0.0.1, for=198.51.100.7;proto=https;host="chat.example.com"'
    ]


@pytest.mark.parametrize(
    ("client", "more", "first"),
    [
        ("192.0.2.1", (), b"for=192.0.2.1"),
        ("2001:db8::7", (), b'for="[2001:db8::7]"'),
        ("192.0.2.1", ((b"X-Forwarded-Proto", b"http"),), b'for=192.0.2.1;proto="http"'),
        (
            "192.0.2.1",
            ((b"X-Forwarded-Proto", b"https"), (b"X-Forwarded-Host", b"[::1]:8443")),
            b'for=192.0.2.1;proto="https";host="[::1]:8443"',
        ),
        ("192.0.2.1", ((b"X-Forwarded-Proto", b'"'), (b"X-Forwarded-Host", b'a";for=evil')), b"for=192.0.2.1"),
    ],
)
def test_forwarded_begins_with_the_client_if_the_proxy_sends_only_x_forwarded_for(
    client: str, more: tuple[Field, ...], first: bytes
) -> None:
    found = read((b"X-Forwarded-For", b"192.0.2.66, " + client.encode()), *more)
    fields = forwarded(found, Forwarding(PEER, ID, trusted=True, client=client))
    assert values(fields, b"Forwarded") == [first + b', for=198.51.100.7;proto=https;host="chat.example.com"']
    assert values(fields, b"X-Forwarded-For") == [b"192.0.2.66, %b, %b" % (client.encode(), PEER.encode())]


@pytest.mark.parametrize("client", [PEER, "", "192.0.2.1"])
def test_forwarded_of_a_client_names_its_peer_alone(client: str) -> None:
    """Only a trusted proxy can name another address."""
    trusted = client != "192.0.2.1"
    fields = forwarded(read(), Forwarding(PEER, ID, trusted=trusted, client=client))
    assert values(fields, b"Forwarded") == [b'for=198.51.100.7;proto=https;host="chat.example.com"']


def test_first_hop_of_a_trusted_proxy_is_kept() -> None:
    more = ((b"X-Forwarded-Proto", b"http"), (b"X-Forwarded-Host", b"outside.example.com"))
    fields = forwarded(read(*more), FROM_PROXY)
    assert values(fields, b"X-Forwarded-Proto") == [b"http"]
    assert values(fields, b"X-Forwarded-Host") == [b"outside.example.com"]


@pytest.mark.parametrize("name", [b"X-Forwarded-Port", b"X-Forwarded-Prefix", b"x-real-ip"])
def test_other_fields_of_a_trusted_proxy_are_kept(name: bytes) -> None:
    assert forwarded(read((name, b"1")), FROM_PROXY) == (*END_TO_END, (name, b"1"), *OURS)


def test_trusted_proxy_without_these_fields_is_treated_as_a_client() -> None:
    assert forwarded(read(), FROM_PROXY) == forwarded(read(), FROM_CLIENT)


def test_id_is_the_one_of_the_record() -> None:
    """`read_request_id` decides whether a proxy's id is used; the head carries the id in the log."""
    fields = forwarded(read((b"X-Request-Id", b"not\xffthis")), FROM_PROXY)
    assert values(fields, b"X-Request-Id") == [ID.encode()]


@pytest.mark.parametrize("given", [b"a", b"0f8fad5b-d9cb-469f-a165-70867728950e", b"A_.-9", b"x" * 128])
def test_id_of_a_proxy_is_used(given: bytes) -> None:
    assert read_request_id(read((b"x-request-ID", given))) == given.decode()


@pytest.mark.parametrize(
    "given", [b"", b"x" * 129, b"a b", b"a\tb", b"\xff", b"a,b", b"<script>", b"%0a", b'"a"', b"a/b", b"a\\b"]
)
def test_id_that_cannot_be_forwarded_is_not_used(given: bytes) -> None:
    assert read_request_id(read((b"X-Request-Id", given))) is None


def test_no_id_or_two_are_ignored() -> None:
    assert read_request_id(read()) is None
    assert read_request_id(read((b"X-Request-Id", b"a"), (b"X-Request-Id", b"a"))) is None


# The client's address.


@pytest.mark.parametrize(
    ("entries", "address"),
    [
        ([], "10.0.0.9"),
        ([b""], "10.0.0.9"),
        ([b"192.0.2.1"], "192.0.2.1"),
        ([b"  192.0.2.1\t"], "192.0.2.1"),
        ([b"192.0.2.66, 192.0.2.1"], "192.0.2.1"),
        ([b"192.0.2.66, 192.0.2.1, 10.0.0.1"], "192.0.2.1"),
        ([b"192.0.2.66,192.0.2.1,10.0.0.1,10.0.0.2"], "192.0.2.1"),
        ([b"192.0.2.66", b"192.0.2.1", b"10.0.0.1"], "192.0.2.1"),
        ([b"192.0.2.1, 10.0.0.1", b"10.0.0.2"], "192.0.2.1"),
        ([b"10.0.0.1, 10.0.0.2"], "10.0.0.1"),
        ([b"2001:db8::1"], "2001:db8::1"),
        ([b"2001:DB8:0:0::1"], "2001:db8::1"),
        ([b"::ffff:192.0.2.1"], "192.0.2.1"),
        ([b"192.0.2.1, ::ffff:10.0.0.1"], "192.0.2.1"),
        ([b"192.0.2.1, 2001:db8:1::5"], "192.0.2.1"),
        ([b"192.0.2.1:4711"], "192.0.2.1"),
        ([b"[2001:db8::1]"], "2001:db8::1"),
        ([b"[2001:db8::1]:4711"], "2001:db8::1"),
        ([b"192.0.2.1, [2001:db8:1::5]:1, 10.0.0.1:2"], "192.0.2.1"),
        ([b"garbage"], "10.0.0.9"),
        ([b"192.0.2.1, garbage"], "10.0.0.9"),
        ([b"192.0.2.1, garbage, 10.0.0.1"], "10.0.0.1"),
        ([b"garbage, 192.0.2.1"], "192.0.2.1"),
        ([b"192.0.2.1, unknown"], "10.0.0.9"),
        ([b"192.0.2.1,"], "10.0.0.9"),
        ([b"192.0.2.1,,10.0.0.1"], "10.0.0.1"),
        ([b"192.0.2.256"], "10.0.0.9"),
        ([b"192.0.2"], "10.0.0.9"),
        ([b"0300.0.2.1"], "10.0.0.9"),
        ([b"3221225985"], "10.0.0.9"),
        ([b"192.0.2.1/32"], "10.0.0.9"),
        ([b"192.0.2.1:"], "10.0.0.9"),
        ([b"192.0.2.1:a"], "10.0.0.9"),
        ([b"[]"], "10.0.0.9"),
        ([b"[2001:db8::1"], "10.0.0.9"),
        ([b"[2001:db8::1]4711"], "10.0.0.9"),
        ([b"2001:db8::1::2"], "10.0.0.9"),
        ([b"\xff\x9b31m"], "10.0.0.9"),
        ([b'"192.0.2.1"'], "10.0.0.9"),
        ([b"for=192.0.2.1"], "10.0.0.9"),
    ],
)
def test_client_address_is_the_right_most_that_is_not_trusted(entries: list[bytes], address: str) -> None:
    more = [(b"X-Forwarded-For", entry) for entry in entries]
    assert find_client_address(read(*more), "10.0.0.9", TRUSTED) == address


def test_forwarded_of_a_client_is_never_read() -> None:
    found = read((b"Forwarded", b"for=192.0.2.1"), (b"X-Real-IP", b"192.0.2.2"), (b"X_Forwarded_For", b"192.0.2.3"))
    assert find_client_address(found, "10.0.0.9", TRUSTED) == "10.0.0.9"


@pytest.mark.parametrize("zone", [b"eth0", b"\x9b31m", b"a b", b"<script>"])
def test_client_address_has_no_zone(zone: bytes) -> None:
    """RFC 4007 section 6: a zone has a meaning only on its own host, and Python allows any text in it."""
    found = read((b"X-Forwarded-For", b"fe80::1%" + zone))
    assert find_client_address(found, "10.0.0.9", TRUSTED) == "10.0.0.9"


@given(
    st.lists(
        st.one_of(
            st.ip_addresses().map(str),
            st.sampled_from(["10.0.0.1", "2001:db8:1::1", "10.0.0.1:80", "[2001:db8:1::1]:80", "", "unknown"]),
            st.text(st.characters(codec="latin-1", exclude_characters="\r\n", exclude_categories=["Cc"]), max_size=10),
            st.ip_addresses(v=6).map(lambda address: f"{address}%\x80"),
        ),
        max_size=5,
    )
)
def test_client_address_of_anything_is_an_address_that_can_be_logged(entries: list[str]) -> None:
    found = read((b"X-Forwarded-For", ",".join(entries).encode("latin-1").strip()))
    address = find_client_address(found, "10.0.0.9", TRUSTED)
    assert printable(address) == address
    assert re.fullmatch(r"[0-9a-f.:]+", address)


# Any accepted request.

BASES = (
    request(),
    request(RICH_FIELDS),
    request((*RICH_FIELDS, (b"Forwarded", b"for=192.0.2.66"), (b"X_Real_IP", b"192.0.2.66"), (b"TE", b"trailers"))),
    request((*FIELDS, (b"Connection", b"Host, Sec-WebSocket-Key, X-Forwarded-For, Upgrade"))) + b"\x81\x05hello",
)
FORBIDDEN = {b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding"}
ONCE = {b"host", b"sec-websocket-key", b"sec-websocket-version"} | {name.lower() for name, _ in OURS}


@given(mutated(*BASES), st.booleans())
def test_any_accepted_request_is_forwarded_as_one_clean_request(data: bytes, trusted: bool) -> None:
    try:
        found = RequestReader().feed(data)
    except Refusal:
        return
    if found is None:
        return
    forwarding = Forwarding(PEER, ID, trusted=trusted)
    head = render_forwarded_head(found, forwarding)
    assert head.count(b"\r\n\r\n") == 1
    assert head.endswith(b"\r\n\r\n")
    assert head.count(b"\r") == head.count(b"\n") == head.count(b"\r\n")
    assert head.startswith(b"GET %b HTTP/1.1\r\n" % found.target)
    fields = tuple(parsed(head).headers.raw_items())
    names = [name.lower() for name, _ in fields]
    assert not FORBIDDEN.intersection(names)
    assert all(names.count(name) == 1 for name in ONCE)
    if not trusted:
        as_cgi_reads_them = [name.replace(b"_", b"-") for name in names]
        assert b"x-real-ip" not in as_cgi_reads_them
        claims = [n for n in as_cgi_reads_them if n in {b"forwarded", b"x-request-id"} or n.startswith(b"x-forwarded-")]
        assert claims == [name.lower() for name, _ in OURS[2:]]
        clients = values(fields, b"X-Forwarded-For") + values(fields, b"Forwarded")
        assert clients == [PEER.encode(), b'for=198.51.100.7;proto=https;host="%b"' % found.authority]
    again = RequestReader().feed(head)
    assert again is not None
    assert (again.target, again.authority, again.host, again.key) == (
        found.target,
        found.authority,
        found.host,
        found.key,
    )
    assert (again.subprotocols, again.extensions) == (found.subprotocols, found.extensions)
    assert again.fields == fields
