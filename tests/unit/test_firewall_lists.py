"""Lists: what they contain, fast lookups, and reloading of changed files."""

import ipaddress
import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import assert_below
from tlstunnel.addresses import Networks
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall import lists as firewall_lists
from tlstunnel.firewall.lists import AddressLists, AddressSet, NamedLists

networks = st.one_of(
    st.builds(
        lambda bits, length: str(ipaddress.ip_network((bits, length), strict=False)),
        st.integers(0, 2**32 - 1),
        st.integers(0, 32),
    ),
    st.builds(
        lambda bits, length: str(ipaddress.ip_network((bits, length), strict=False)),
        st.integers(2**112, 2**128 - 1),
        st.integers(17, 128),
    ),
)


@given(texts=st.lists(networks, max_size=20), data=st.data())
def test_address_set_agrees_with_a_linear_search(texts: list[str], data: st.DataObject) -> None:
    fast, plain = AddressSet(texts), Networks.parse(texts)
    assert len(fast) <= len(texts)
    edges = [edge for text in texts for edge in (ipaddress.ip_network(text)[0], ipaddress.ip_network(text)[-1])]
    addresses = [str(edge) for edge in edges] + [str(edge + 1) for edge in edges if int(edge + 0) < 2**32 - 1]
    addresses += [str(edge - 1) for edge in edges if int(edge) > 0]
    addresses += data.draw(st.lists(st.ip_addresses().map(str), max_size=5))
    for ip in addresses:
        assert (ip in fast) == (ip in plain), ip


@pytest.mark.parametrize(
    ("network", "ip"),
    [
        ("10.0.0.0/8", "10.255.255.255"),
        ("10.0.0.0/8", "::ffff:10.1.2.3"),
        ("10.0.0.0/8", "::ffff:a01:203"),
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.0/0008", "10.1.2.3"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.0/104", "10.255.0.1"),
        ("0.0.0.0/0", "203.0.113.9"),
        ("::/0", "2001:db8::1"),
        ("2001:db8::/32", "2001:DB8:0::1"),
    ],
)
def test_address_in_network(network: str, ip: str) -> None:
    assert ip in AddressSet([network])


@pytest.mark.parametrize(
    ("network", "ip"),
    [
        ("10.0.0.0/8", "11.0.0.0"),
        ("10.0.0.0/8", "9.255.255.255"),
        ("::/0", "10.0.0.1"),
        ("::/0", "::ffff:10.0.0.1"),
        ("0.0.0.0/0", "::1"),
        ("0.0.0.0/0", ""),
        ("0.0.0.0/0", "a"),
        ("0.0.0.0/0", "1.2.3"),
        ("0.0.0.0/0", "1.2.3.04"),
        ("0.0.0.0/0", "1.2.3.4\0"),
        ("0.0.0.0/0", "\u0661.2.3.4"),
        ("::/0", "fe80::1%eth0"),
        ("::/0", ":"),
    ],
)
def test_address_not_in_network(network: str, ip: str) -> None:
    assert ip not in AddressSet([network])


def test_other_types_are_not_in_a_set() -> None:
    assert 1 not in AddressSet(["0.0.0.0/0"])


@pytest.mark.parametrize("text", ["", "a", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/", "::/129", "::1/64"])
def test_invalid_networks(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a network|has bits set"):
        AddressSet([text])


@pytest.mark.alone
def test_lookup_in_100_000_networks_takes_microseconds() -> None:
    source = random.Random(1)
    texts = [f"{source.randrange(1, 224)}.{source.randrange(256)}.{source.randrange(256)}.0/24" for _ in range(50_000)]
    texts += [f"2001:{source.randrange(65536):x}:{source.randrange(65536):x}::/48" for _ in range(50_000)]
    found = AddressSet(texts)
    assert "203.0.113.9" in AddressSet(["203.0.113.0/24", *texts])

    def seconds() -> float:
        began = time.process_time()
        for _ in range(5_000):
            assert "230.0.0.1" not in found
            assert "2a00::1" not in found
        return (time.process_time() - began) / 10_000

    # A look at each network would take 100 ms for each of them. Measured: 1 us.
    assert_below(30e-6, seconds)


# Named lists.


def test_entries_are_networks_or_words() -> None:
    named = NamedLists({"mixed": ["10.0.0.0/8", "2001:db8::1", "alice@example.com", "02:42:ac:11:00:02", "v1.2"]})[
        "mixed"
    ]
    assert "10.1.2.3" in named
    assert "::ffff:10.1.2.3" in named
    assert "2001:db8:0::1" in named
    assert "alice@example.com" in named
    assert "02:42:ac:11:00:02" in named
    assert "v1.2" in named
    assert "Alice@example.com" not in named
    assert "alice" not in named
    assert "" not in named
    assert "10.0.0.0/8" not in named


def test_a_file_has_comments_and_empty_lines(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(b"\xef\xbb\xbf# all of them\r\n\r\n10.0.0.0/8\r\n  192.0.2.1   # one\n\ta#b\nlast # 1 # 2")
    named = NamedLists({"a": str(file)})["a"]
    assert all(value in named for value in ("10.0.0.1", "192.0.2.1", "a#b", "last"))
    assert "# all of them" not in named
    assert "last # 1" not in named


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# a\n\n10.0.0.1/8\n", ':3: "10.0.0.1/8" has bits set after the /8; write 10.0.0.0/8'),
        (b"10.0.0.0/33", ':1: "10.0.0.0/33" is not a network'),
        (b"10.0.0.256", ':1: "10.0.0.256" is not a network'),
        (b"a\n2001:db8::/129", ':2: "2001:db8::/129" is not a network'),
        (b"a\nb\xff", ":2: the file is not UTF-8"),
        (b"a\nb\x1b[2J", ':2: "b\\x1b[2J": an entry may have at most 1024 characters, all of them printable'),
        (b"a" * 1025, ':1: "aaa'),
    ],
)
def test_invalid_line_is_reported_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        NamedLists({"a": str(file)})
    assert str(caught.value).startswith(f"lists.a: {file}{message}")


def test_invalid_entry_of_the_configuration_is_reported_with_its_place() -> None:
    with pytest.raises(ConfigurationError, match=r'^lists\.a\[1\]: "10\.0\.0\.0/33" is not a network'):
        NamedLists({"a": ["10.0.0.0/8", "10.0.0.0/33"]})


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.txt: cannot be read: No such file"):
        NamedLists({"a": str(tmp_path / "none.txt")})


def test_file_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firewall_lists, "MAX_FILE", 1 << 20)
    file = tmp_path / "list.txt"
    file.write_bytes(b"\n" * ((1 << 20) + 1))
    with pytest.raises(ConfigurationError, match="the file has more than 1 MiB"):
        NamedLists({"a": str(file)})


def test_changed_file_applies_at_once(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("10.0.0.0/8\n")
    found = NamedLists({"a": str(file), "b": ["x"]})
    named = found["a"]
    assert found.refresh().lists == ()
    # Replaced by another file of the same size, as careful programs do, and written over.
    other = tmp_path / "new"
    other.write_text("11.0.0.0/8\n")
    stat = file.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert found.refresh().lists == ("a",)
    assert ("10.0.0.1" in named, "11.0.0.1" in named) == (False, True)
    file.write_text("11.0.0.0/8\nword\n")
    assert found.refresh().lists == ("a",)
    assert "word" in named
    assert found.refresh() == firewall_lists.RefreshResult()


def test_invalid_file_keeps_the_old_content_and_is_reported_once(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("10.0.0.0/8\n")
    found = NamedLists({"a": str(file)})
    file.write_text("10.0.0.0/8\n11.0.0.0/99\n")
    refreshed = found.refresh()
    assert refreshed.lists == ()
    (error,) = refreshed.errors
    assert error.startswith(f'list a is unchanged: {file}:2: "11.0.0.0/99" is not a network')
    assert "10.0.0.1" in found["a"]
    assert found.refresh().errors == ()
    file.unlink()
    assert found.refresh().errors == (f"list a is unchanged: {file}: cannot be read: No such file or directory",)
    assert found.refresh().errors == ()
    assert "10.0.0.1" in found["a"]
    file.write_text("11.0.0.0/8\n")
    assert found.refresh().lists == ("a",)
    assert "10.0.0.1" not in found["a"]


# Address lists.


def test_blocked_takes_precedence_over_allowed() -> None:
    found = AddressLists(("10.0.0.0/8", "@friends"), ("10.9.0.0/16",), NamedLists({"friends": ["192.0.2.1"]}))
    assert found.check("10.1.0.1") is None
    assert found.check("192.0.2.1") is None
    assert found.check("::ffff:192.0.2.1") is None
    assert found.check("10.9.0.1") == "address blocked"
    assert found.check("192.0.2.2") == "address not allowed"
    assert found.check("") == "address not allowed"


def test_without_lists_all_addresses_are_allowed() -> None:
    found = AddressLists((), (), NamedLists())
    assert found.check("192.0.2.1") is found.check("") is None


def test_empty_allowed_list_refuses_all() -> None:
    assert AddressLists(("@none",), (), NamedLists({"none": []})).check("192.0.2.1") == "address not allowed"


def test_address_lists_follow_their_files(tmp_path: Path) -> None:
    file = tmp_path / "bots.txt"
    file.write_text("")
    named = NamedLists({"bots": str(file)})
    found = AddressLists((), ("@bots",), named)
    assert found.check("192.0.2.1") is None
    file.write_text("192.0.2.0/24\n")
    named.refresh()
    assert found.check("192.0.2.1") == "address blocked"
    file.write_text("192.0.2.0/24\nword\n")
    (error,) = named.refresh().errors
    assert f'{file}:2: "word" is not a network' in error


def test_address_list_accepts_only_networks() -> None:
    with pytest.raises(
        ConfigurationError, match=r'lists\.a: "word" is not a network, and the list is used for address'
    ):
        AddressLists(("@a",), (), NamedLists({"a": ["word", "10.0.0.1"]}))


def test_all_invalid_entries_of_all_lists_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("10.0.0.0/33\n10.0.0.0/8\n10.0.0.1/8\n")
    with pytest.raises(ConfigurationError) as caught:
        NamedLists({"a": ["10.0.0.0/8", "::/129", "::/130"], "b": str(file), "c": str(tmp_path / "none.txt")})
    places = ["lists.a[1]: ", "lists.a[2]: ", f"lists.b: {file}:1: ", f"lists.b: {file}:3: ", "lists.c: "]
    for problem, place in zip(caught.value.problems, places, strict=True):
        assert problem.startswith(place)


def test_a_file_of_another_kind_does_not_fill_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("10.0.0.0/33\n" * 1000)
    with pytest.raises(ConfigurationError) as caught:
        NamedLists({"a": str(file)})
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "lists.a: 980 more entries are wrong"
