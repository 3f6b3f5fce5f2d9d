"""How much of an address is shown, and which fields of a record are written."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.config.log import LOG_FIELDS, USUAL_FIELDS
from tlstunnel.journal.record import Record
from tlstunnel.journal.style import Style


def test_all_is_shown_by_default() -> None:
    assert Style().show("192.0.2.77") == "192.0.2.77"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3::4", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::/48"),
        ("", ""),
        ("no address", "?"),
    ],
)
def test_a_prefix_is_shown(address: str, shown: str) -> None:
    assert Style(address="prefix").show(address) == shown


@pytest.mark.parametrize(
    ("network", "shown"),
    [
        ("192.0.2.77/32", "192.0.2.0/24"),
        ("192.0.2.64/28", "192.0.2.0/24"),
        ("192.0.2.0/24", "192.0.2.0/24"),
        ("192.0.0.0/16", "192.0.0.0/16"),
        ("2001:db8:1:2::/64", "2001:db8:1::/48"),
        ("2001:db8:1:2:3::4/128", "2001:db8:1::/48"),
        ("192.0.2.77", "192.0.2.0/24"),
    ],
)
def test_a_network_is_shown_as_no_smaller_one(network: str, shown: str) -> None:
    assert Style(address="prefix").show_network(network) == shown
    assert Style().show_network(network) == network


def test_a_network_of_one_address_has_the_hash_of_the_address() -> None:
    style = Style(address="hash", key=b"k")
    assert style.show_network("192.0.2.1/32") == style.show_network("192.0.2.1") == style.show("192.0.2.1")
    assert style.show_network("192.0.2.0/30").startswith("~")


def test_a_hash_depends_on_the_address_and_the_key() -> None:
    one, other = Style(address="hash", key=b"one"), Style(address="hash", key=b"other")
    assert one.show("192.0.2.1") == one.show("192.0.2.1") == Style(address="hash", key=b"one").show("192.0.2.1")
    assert one.show("192.0.2.1") != one.show("192.0.2.2")
    assert one.show("192.0.2.1") != other.show("192.0.2.1")
    assert one.show("") == ""


@given(st.ip_addresses(), st.sampled_from(["prefix", "hash"]))
def test_the_address_itself_is_never_shown(address: ipaddress.IPv4Address | ipaddress.IPv6Address, style: str) -> None:
    shown = Style(address="prefix" if style == "prefix" else "hash", key=b"k").show(str(address))
    assert shown != str(address)


def test_fields_that_are_not_wanted_are_left_out() -> None:
    record = Record("a", "192.0.2.1", method="GET", host="a.test", path="/x", raw_user_agent=b"curl/8")
    assert Style(["path"]).select(record.all_facts()).keys() == {"id", "path"}
    usual = Style(USUAL_FIELDS).select(record.all_facts())
    assert usual.keys() >= {"id", "path", "user_agent", "reason"}
    assert not usual.keys() & {"method", "host"}


def test_every_field_of_a_record_has_a_name_in_the_configuration() -> None:
    record = Record(
        "a",
        "192.0.2.1",
        client="192.0.2.2",
        method="GET",
        host="a.test",
        raw_web_origin=b"https://a.test",
        raw_user_agent=b"curl/8",
        client_subject="CN=a",
        trace="0" * 32,
        edge="forwarded",
        edge_log=(("room", 7),),
        tags=("user=1",),
        detail="more",
        firewall={"rule": "a", "logged": ["b"], "managed_rules": {}},
    )
    assert record.all_facts().keys() - {"id"} == set(LOG_FIELDS)


def test_addresses_are_shown_everywhere_in_a_record() -> None:
    record = Record("a", "10.0.0.1", client="192.0.2.2")
    facts = record.all_facts(Style(address="prefix").show)
    assert (facts["client"], facts["peer"]) == ("192.0.2.0/24", "10.0.0.0/24")


@given(st.binary(max_size=2_000), st.binary(max_size=2_000))
def test_what_a_client_sent_is_escaped_and_cut(agent: bytes, origin: bytes) -> None:
    record = Record("a", "", raw_user_agent=agent, raw_web_origin=origin)
    for text in (record.user_agent, record.web_origin):
        assert text.isprintable()
        assert text.isascii()
        assert len(text) <= 256
