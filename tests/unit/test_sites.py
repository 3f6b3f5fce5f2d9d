"""Which site a client requests: the rules of names, and the sites built from a configuration."""

import ssl
import time
from pathlib import Path

import pytest

from tests.harness import assert_below
from tlstunnel.addresses import OriginAddress
from tlstunnel.certificates import issue
from tlstunnel.certificates.store import Certificates
from tlstunnel.config import OriginConfig, SiteConfig
from tlstunnel.errors import ConfigurationError
from tlstunnel.handshake.forwarding import Forwarding, render_forwarded_head
from tlstunnel.handshake.request import RequestReader
from tlstunnel.origins.pool import Pool
from tlstunnel.serving.sites import build_edits, build_sites
from tlstunnel.tunnel.sites import Site, Sites

ADDRESS = OriginConfig(address=OriginAddress.parse("localhost:3000"))
SERVED = Certificates().serve(())


def site(*names: str) -> Site:
    return Site(frozenset(names), names[0], SERVED, Pool((ADDRESS,)))


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> issue.Issued:
    return issue.create([], tmp_path_factory.mktemp("certs"))


@pytest.mark.parametrize(
    ("server_name", "chosen"),
    [
        ("chat.example.com", "chat.example.com"),
        ("deep.chat.example.com", "deep.chat.example.com"),
        ("a.chat.example.com", "*.chat.example.com"),
        ("other.example.com", "*.example.com"),
        ("a.b.example.com", "*"),
        ("example.com", "*"),
        ("com", "*"),
        ("", "*"),
        ("192.0.2.1", "*"),
        ("*.example.com", "*.example.com"),
    ],
)
def test_exact_name_before_wildcard_before_any(server_name: str, chosen: str) -> None:
    made = [
        site(name) for name in ("*", "*.example.com", "*.chat.example.com", "chat.example.com", "deep.chat.example.com")
    ]
    for order in (made, made[::-1]):
        found = Sites(order, None).choose(server_name)
        assert found is not None
        assert found.name == chosen


@pytest.mark.parametrize(
    "server_name", ["other.example.com", "example.com", "a.b.example.org", "example.org", "chat.example.com.evil", ""]
)
def test_name_of_no_site_has_none(server_name: str) -> None:
    assert Sites([site("chat.example.com", "*.example.org")], None).choose(server_name) is None


def test_name_of_no_site_has_none_even_with_a_default() -> None:
    only = site("chat.example.com")
    assert Sites([only], only).choose("other.example.com") is None


def test_any_of_a_sites_names_leads_to_it() -> None:
    first, second = site("a.example", "*.b.example"), site("c.example")
    sites = Sites([first, second], None)
    assert sites.choose("a.example") is sites.choose("x.b.example") is first
    assert sites.choose("c.example") is second


def test_without_sni_the_default_site_serves() -> None:
    first, default = site("a.example"), site("b.example")
    assert Sites([first, default], default).choose(None) is default


def test_without_sni_and_default_no_site_serves() -> None:
    assert Sites([site("a.example"), site("*.b.example")], None).choose(None) is None


def test_without_sni_the_site_of_any_name_serves() -> None:
    anyone = site("*")
    assert Sites([site("a.example"), anyone], None).choose(None) is anyone


def test_default_site_comes_before_the_one_of_any_name() -> None:
    default = site("a.example")
    assert Sites([site("*"), default], default).choose(None) is default


@pytest.mark.parametrize(
    ("names", "host", "served"),
    [
        (("chat.example.com",), "chat.example.com", True),
        (("chat.example.com",), "other.example.com", False),
        (("chat.example.com",), "a.chat.example.com", False),
        (("chat.example.com",), "example.com", False),
        (("chat.example.com",), "", False),
        (("*.example.com",), "chat.example.com", True),
        (("*.example.com",), "a.b.example.com", False),
        (("*.example.com",), "example.com", False),
        (("*.example.com",), ".example.com", True),
        (("a.example", "b.example"), "b.example", True),
        (("*",), "anything.example", True),
        (("*",), "192.0.2.1", True),
        (("*",), "::1", True),
        (("192.0.2.1",), "192.0.2.1", True),
        (("::1",), "::1", True),
        (("::1",), "::2", False),
    ],
)
def test_host_must_be_one_of_the_sites_names(names: tuple[str, ...], host: str, served: bool) -> None:
    """A host that is not served gets 421 (RFC 9110 section 15.5.20)."""
    only = site(*names)
    assert (Sites([only], None).choose(host) is only) is served


# From the configuration.


def test_sites_of_a_configuration(issued: issue.Issued) -> None:
    other = OriginConfig(address=OriginAddress.parse("unix:/run/chat.sock"))
    sites = build_sites(
        [
            SiteConfig(
                names=("chat.example.com", "*.chat.example.com"),
                default=False,
                cert=issued.cert,
                key=issued.key,
                origins=(ADDRESS,),
            ),
            SiteConfig(names=("other.example.com",), default=True, cert=issued.cert, key=issued.key, origins=(other,)),
        ]
    )
    chat, default = sites.choose("a.chat.example.com"), sites.choose(None)
    assert chat is not None
    assert default is not None
    assert chat is sites.choose("chat.example.com")
    assert default is sites.choose("other.example.com")
    assert (chat.name, chat.pool.name) == ("chat.example.com", "localhost:3000")
    assert (default.name, default.pool.name) == ("other.example.com", "unix:/run/chat.sock")
    assert chat.context is default.context  # the same files, and no client certificates
    assert chat.context.cert_store_stats()["x509"] == 0
    assert sites.choose("third.example.com") is None


def test_site_without_names_serves_any(issued: issue.Issued) -> None:
    sites = build_sites([SiteConfig(cert=issued.cert, key=issued.key, origins=(ADDRESS,))])
    found = sites.choose(None)
    assert found is not None
    assert found is sites.choose("anything.example")
    assert found.name == "*"


def test_site_without_certificate_is_served_with_the_test_pair(issued: issue.Issued) -> None:
    assert build_sites([SiteConfig(origins=(ADDRESS,))], (issued.cert, issued.key)).choose(None) is not None


def test_own_certificate_comes_before_the_test_pair(issued: issue.Issued) -> None:
    config = [SiteConfig(cert=issued.cert, key=issued.key, origins=(ADDRESS,))]
    assert build_sites(config, (Path("/nowhere"), Path("/nowhere"))).choose(None) is not None


def test_certificate_that_cannot_be_read_is_named(issued: issue.Issued, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(ConfigurationError, match=r"missing\.pem"):
        build_sites([SiteConfig(cert=missing, key=issued.key, origins=(ADDRESS,))])


def test_site_without_any_certificate_cannot_be_served() -> None:
    with pytest.raises(ConfigurationError):
        build_sites([SiteConfig(origins=(ADDRESS,))])


def test_the_next_configuration_keeps_what_has_not_changed(issued: issue.Issued) -> None:
    config = [SiteConfig(cert=issued.cert, key=issued.key, origins=(ADDRESS,))]
    before = build_sites(config)
    first = before.choose(None)
    assert first is not None
    context = first.context
    after = build_sites(config, None, before)
    after.certificates.activate()
    second = after.choose(None)
    assert second is not None
    assert second is not first
    assert second.context is context


def test_certificates_that_have_become_invalid_stay_in_use(tmp_path: Path) -> None:
    made = issue.create([], tmp_path)
    config = [SiteConfig(cert=made.cert, key=made.key, origins=(ADDRESS,))]
    before = build_sites(config)
    made.key.unlink()
    after = build_sites(config, None, before)
    assert after.choose("localhost") is not None
    assert after.certificates.complaints() == [f"{made.key}: cannot be read: No such file or directory"]
    with pytest.raises(ConfigurationError, match="cannot be read"):
        build_sites(config)


def test_a_configured_site_asks_for_client_certificates(issued: issue.Issued) -> None:
    configured = SiteConfig(
        cert=issued.cert, key=issued.key, origins=(ADDRESS,), client_ca=issued.ca, client_auth="request"
    )
    found = build_sites([configured]).choose(None)
    assert found is not None
    assert found.context.verify_mode is ssl.CERT_OPTIONAL


@pytest.mark.alone
def test_a_site_among_ten_thousand_is_found_in_microseconds() -> None:
    many = Sites([site(f"h{number}.example.com") for number in range(10_000)], None)

    def seconds() -> float:
        start = time.process_time()
        for number in range(10_000):
            assert many.choose(f"h{number}.example.com") is not None
            assert many.choose(f"a.h{number}.example.com") is None
        return (time.process_time() - start) / 20_000

    assert_below(50e-6, seconds)


def test_fields_that_applications_trust_can_all_be_removed() -> None:
    fields = b"X-Original-URL: /admin\r\nTrue_Client_IP: 127.0.0.1\r\nRemote-User: root\r\nX-Other: kept\r\n"
    asked = RequestReader().feed(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" + fields + b"\r\n"
    )
    assert asked is not None
    sent = Forwarding("192.0.2.1", "0123456789abcdef", trusted=False)
    kept = {}
    for removes in (False, True):
        site = SiteConfig(origins=(ADDRESS,), remove_spoofable_headers=removes)
        head = render_forwarded_head(asked, sent, build_edits(site).of("localhost:3000", ""))
        kept[removes] = [line for line in fields.splitlines() if line in head.splitlines()]
    assert kept == {False: fields.splitlines(), True: [b"X-Other: kept"]}
