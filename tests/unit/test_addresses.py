"""Addresses, networks and names as people write them."""

import ipaddress
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tlstunnel.addresses import ListenAddress, Networks, OriginAddress, normalise_name, quoted, to_client_key

FOLDER = Path("/etc/tlstunnel")

# Characters of addresses are frequent, so that more than the first check is reached.
texts = st.one_of(
    st.text(max_size=300),
    st.text(alphabet="0123456789abcdefx.:[]%/*@?#- _\0", max_size=60),
    st.builds(
        "".join,
        st.lists(st.sampled_from(["unix:", "ws://", "wss://", "xn--", "[", "]", "::", ":", "1", "ü", ".", "/"])),
    ),
    st.text(alphabet=st.characters(categories=["Cs", "Lo", "Mn", "Cf"]), max_size=40),
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8443", ListenAddress("127.0.0.1", 8443)),
        ("0.0.0.0:0", ListenAddress("0.0.0.0", 0)),
        ("[::]:65535", ListenAddress("::", 65535)),
        ("[0:0::1]:1", ListenAddress("::1", 1)),
        ("[fe80::1%eth0]:1", ListenAddress("fe80::1%eth0", 1)),
        ("LOCALHOST:08443", ListenAddress("localhost", 8443)),
        ("unix:/run/t.sock", ListenAddress(None, 0, "/run/t.sock")),
        ("unix:///run//t.sock", ListenAddress(None, 0, "/run/t.sock")),
    ],
)
def test_listen_address(text: str, address: ListenAddress) -> None:
    assert ListenAddress.parse(text) == address
    assert ListenAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", '"" is not a host name'),
        ("8443", "has no host; write 127.0.0.1:8443"),
        (":8443", "0.0.0.0:8443 for every IPv4 address"),
        ("*:8443", "[::]:8443 for every IPv6 address"),
        ("localhost", "has no port; add one, such as 127.0.0.1:8443"),
        ("[::1]", "has no port"),
        ("localhost:", '"" in "localhost:" is not a port'),
        ("localhost:65536", '"65536" in "localhost:65536" is not a port'),
        ("localhost:-1", "is not a port"),
        ("localhost:\uff11", "is not a port"),
        ("[::1]:1\n", "is not a port"),
        ("::1:8443", "write an IPv6 address in brackets"),
        ("[::g]:1", '"::g" is not an IPv6 address'),
        ("[127.0.0.1]:1", "is not an IPv6 address"),
        ("[fe80::1%]:1", "is not an IPv6 address"),
        ("[fe80::1%a b]:1", "is not an IPv6 address"),
        ("127.1:1", '"127.1" is not a host name or an IP address'),
        ("256.0.0.1:1", "is not a host name or an IP address"),
        ("0x7f000001:1", "is not a host name or an IP address"),
        ("unix:", "does not name a socket file"),
        ("unix:/", "does not name a socket file"),
        ("unix:/a\0b", "does not name a socket file"),
        ("unix:/run/\ud800", "is not a valid file name"),
        ("unix:run/t.sock", "is a relative path; write an absolute one"),
        ("unix:/" + "x" * 107, "has more than 107 bytes"),
    ],
)
def test_listen_address_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        ListenAddress.parse(text)


def test_longest_unix_path() -> None:
    assert ListenAddress.parse("unix:/" + "x" * 106).path == "/" + "x" * 106


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("localhost:3000", "localhost:3000"),
        ("10.0.0.5:1", "10.0.0.5:1"),
        ("[2001:DB8:0::1]:3000", "[2001:db8::1]:3000"),
        ("chat_origin:3000", "chat_origin:3000"),
        ("Bücher.example:3000", "xn--bcher-kva.example:3000"),
        ("ws://localhost", "localhost:80"),
        ("WS://localhost/", "localhost:80"),
        ("ws://[::1]", "[::1]:80"),
        ("ws://[::1]:3000/", "[::1]:3000"),
        ("unix:/run/chat.sock", "unix:/run/chat.sock"),
        ("unix:chat.sock", "unix:/etc/tlstunnel/chat.sock"),
    ],
)
def test_origin_address(text: str, written: str) -> None:
    address = OriginAddress.parse(text, FOLDER)
    assert str(address) == written
    assert address.text == text
    assert OriginAddress.parse(written) == address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3000", "has no host; write localhost:3000"),
        (":3000", "has no host; write localhost:3000"),
        ("localhost", "has no port; add one, such as localhost:3000"),
        ("localhost:0", "from 1 to 65535"),
        ("ws://localhost:0", "from 1 to 65535"),
        ("ws://", '"" is not a host name'),
        ("wss://localhost:0", "from 1 to 65535"),
        ("https://localhost:3000", "wss://host:port or unix:/path; write wss:// for it"),
        ("http://localhost:3000", "wss://host:port or unix:/path; write ws:// for it"),
        ("tcp://localhost:3000", "an origin is host:port, ws://host:port, wss://host:port or unix:/path"),
        ("ws://localhost/chat", "an origin cannot have a path"),
        ("ws://localhost//", "an origin cannot have a path"),
        ("ws://localhost?a=b", "an origin cannot have a query"),
        ("ws://localhost#a", "an origin cannot have a query"),
        ("ws://localhost:99999", "is not a port"),
        ("unix:chat.sock", "is a relative path"),
        ("unix:", "does not name a socket file"),
        ("a b:3000", '"a b" is not a host name'),
        ("-a:3000", "is not a host name"),
        ("xn--a:3000", "is not a host name"),
        ("a..b:3000", "is not a host name"),
        ("ü\u200d:3000", "is not a host name"),
        ("x" * 64 + ":3000", "is not a host name"),
        ("x." * 200 + "x:3000", "is not a host name"),
        (".".join(["x" * 63] * 4) + ":3000", "is not a host name"),
    ],
)
def test_origin_address_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        OriginAddress.parse(text)


def test_password_is_not_shown() -> None:
    with pytest.raises(ValueError, match="an origin cannot have a user or a password") as caught:
        OriginAddress.parse("ws://user:hunter2@localhost:3000/x?y")
    assert "hunter2" not in str(caught.value)


def test_networks() -> None:
    networks = Networks.parse(["10.0.0.0/8", "192.0.2.7", "2001:db8::/32", "::1", "10.0.0.0/8"])
    assert [str(network) for network in networks] == ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32", "::1/128"]
    for inside in ("10.1.2.3", "::ffff:10.1.2.3", "192.0.2.7", "2001:db8::5", "::1"):
        assert inside in networks
        assert ipaddress.ip_address(inside) in networks
    for outside in ("11.0.0.0", "192.0.2.8", "::2", "::ffff:11.0.0.1", "", "localhost", "10.1.2.3:80", None, 10):
        assert outside not in networks


def test_networks_are_values() -> None:
    networks = Networks.parse(["10.0.0.0/8", "::1"])
    again = Networks.parse(["::1/128", "10.0.0.0/8"])
    assert networks == again
    assert hash(networks) == hash(again)
    assert networks != Networks()
    assert networks != "10.0.0.0/8"
    assert networks
    assert not Networks()
    assert len(networks) == 2
    assert repr(networks) == "Networks.parse(['10.0.0.0/8', '::1/128'])"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.0.0.1/8", "write 10.0.0.0/8, or 10.0.0.1 for that address alone"),
        ("2001:db8::1/32", "write 2001:db8::/32, or 2001:db8::1"),
        ("::ffff:10.0.0.0/104", "write 10.0.0.0/8"),
        ("::ffff:10.0.0.1", "write 10.0.0.1/32"),
        ("10.0.0.0/33", "is not a network"),
        ("10.0.0.0/", "is not a network"),
        ("10.0.0.0/255.0.0.0", "is not a network"),
        ("fe80::1%eth0", "is not a network"),
        ("localhost", "is not a network"),
        ("", "is not a network"),
    ],
)
def test_networks_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        Networks.parse(["192.0.2.0/24", text])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("*", "*"),
        ("localhost", "localhost"),
        ("Chat.Example.COM.", "chat.example.com"),
        ("*.Example.com", "*.example.com"),
        ("Bücher.example", "xn--bcher-kva.example"),
        ("*.BÜCHER.example", "*.xn--bcher-kva.example"),
        ("XN--bcher-kva.example", "xn--bcher-kva.example"),
        ("faß.example", "xn--fa-hia.example"),
        ("a。example", "a.example"),
        ("my_service.example", "my_service.example"),
        ("192.0.2.7", "192.0.2.7"),
        ("::1", "::1"),
        ("[2001:DB8:0::1]", "2001:db8::1"),
    ],
)
def test_normalise_name(text: str, name: str) -> None:
    assert normalise_name(text) == name
    assert normalise_name(name) == name


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a b",
        "a\n",
        "x" * 64,
        "\xfc" * 60,
        ".",
        "..",
        "*.",
        "**",
        "*a.b",
        "*.*.b",
        "a.*.b",
        "a/b",
        "[a]",
        "[::1",
        "a:80",
        "fe80::1%eth0",
        "192.0.2.256",
        "192.0.2.7.",
        "*.192.0.2.7",
        "xn--0.example",
        "-a.b",
        "\u2603.b",
    ],
)
def test_normalise_name_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r'^"') as caught:
        normalise_name(text)
    assert "\n" not in str(caught.value)


def test_quoted() -> None:
    assert quoted("Bücher") == '"Bücher"'
    assert quoted("a\nb\x1b[1m\ud800\u2028") == '"a\\nb\\x1b[1m\\ud800\\u2028"'
    assert quoted("x" * 101) == '"' + "x" * 100 + '…"'


@given(text=texts)
@example("unix:\ud800")
def test_parsers_raise_value_errors_of_one_line(text: str) -> None:
    refusals: list[ValueError] = []
    for parse in (
        ListenAddress.parse,
        OriginAddress.parse,
        lambda text: OriginAddress.parse(text, FOLDER),
        lambda text: Networks.parse([text]),
        normalise_name,
    ):
        try:
            value = parse(text)
        except ValueError as error:
            refusals.append(error)
        else:
            if isinstance(value, ListenAddress | OriginAddress):
                assert type(value).parse(str(value)) == value
            if isinstance(value, str):
                assert normalise_name(value) == value
    for refusal in refusals:
        assert type(refusal) is ValueError  # and none of its subclasses, whose messages are not for users
        assert len(str(refusal).splitlines()) == 1


@given(address=st.ip_addresses(), network=st.ip_addresses().map(str))
def test_contains_what_ipaddress_says(address: ipaddress.IPv4Address, network: str) -> None:
    plain = getattr(address, "ipv4_mapped", None) or address
    if not getattr(ipaddress.ip_address(network), "ipv4_mapped", None):
        assert (address in Networks.parse([network])) == (plain == ipaddress.ip_address(network))


def test_ipv4_clients_are_counted_separately_however_their_addresses_are_written() -> None:
    """All IPv4-mapped addresses are in one /64, in which IPv6 clients count as one."""
    assert to_client_key("::ffff:192.0.2.1") == to_client_key("192.0.2.1") == "192.0.2.1"
    assert to_client_key("::ffff:192.0.2.2") == "192.0.2.2"
    assert to_client_key("2001:db8::1") == to_client_key("2001:db8::2") != to_client_key("2001:db8:0:1::1")
    assert to_client_key("fe80::1%eth0") == to_client_key("fe80::2%eth0")
