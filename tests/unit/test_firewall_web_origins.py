"""The origin check: which pages may connect."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.handshakes import Field, request, without
from tlstunnel.firewall.facts import Facts, gather
from tlstunnel.firewall.web_origins import WebOriginCheck, normalise_web_origin
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.request import RequestReader

NAMES = ("chat.example.com", "*.tenants.example.com")


def facts(*origins: bytes, host: bytes = b"chat.example.com") -> Facts:
    fields: tuple[Field, ...] = ((b"Host", host), *without(b"Host"), *((b"Origin", origin) for origin in origins))
    found = RequestReader().feed(request(fields))
    assert found is not None
    return gather(found, Connection(ip="192.0.2.1"), strict_path=True, now=0)


def allowed(check: WebOriginCheck, *origins: bytes, host: bytes = b"chat.example.com") -> bool:
    refusal = check.check(facts(*origins, host=host))
    assert refusal is None or refusal.status == 403
    return refusal is None


@pytest.mark.parametrize(
    ("entry", "origin"),
    [
        ("https://app.example.com", b"https://app.example.com"),
        ("https://app.example.com", b"HTTPS://App.Example.COM"),
        ("https://app.example.com", b"https://app.example.com:443"),
        ("https://app.example.com", b"https://app.example.com."),
        ("https://app.example.com:8443", b"https://app.example.com:8443"),
        ("http://localhost:3000", b"http://localhost:3000"),
        ("http://localhost", b"http://localhost:80"),
        ("https://[::1]", b"https://[0:0::1]"),
        ("https://xn--bcher-kva.example", b"https://xn--bcher-kva.example"),
        ("https://xn--bcher-kva.example", "https://B\u00fccher.example".encode()),
        ("https://*.example.com", b"https://a.example.com"),
        ("https://*.example.com", b"https://a.b.example.com"),
        ("https://*.example.com:8443", b"https://a.example.com:8443"),
        ("null", b"null"),
        ("chrome-extension://abcdefgh", b"chrome-extension://abcdefgh"),
        ("file://", b"file://"),
    ],
)
def test_allowed(entry: str, origin: bytes) -> None:
    assert allowed(WebOriginCheck([entry], NAMES), origin)


@pytest.mark.parametrize(
    ("entry", "origin"),
    [
        ("https://app.example.com", b"http://app.example.com"),
        ("https://app.example.com", b"https://app.example.com:8443"),
        ("https://app.example.com", b"https://app.example.com:80"),
        ("https://app.example.com", b"https://app.example.com.evil.example"),
        ("https://app.example.com", b"https://evil-app.example.com"),
        ("https://app.example.com", b"https://a.app.example.com"),
        ("https://app.example.com", b"https://example.com"),
        ("https://app.example.com", b"https://app.example.com@evil.example"),
        ("https://app.example.com", b"https://evil.example#https://app.example.com"),
        ("https://app.example.com", b"https://app.example.com/"),
        ("https://app.example.com", b"https://app.example.com https://evil.example"),
        ("https://app.example.com", b"https://app.example.com, https://evil.example"),
        ("https://app.example.com", b"https://app_example.com"),
        ("https://app.example.com", b"app.example.com"),
        ("https://app.example.com", b""),
        ("https://app.example.com", b"null"),
        ("https://app.example.com", b"https://"),
        ("https://app.example.com", b"https://app.example.com:"),
        ("https://app.example.com", b"https://app.example.com:443443"),
        ("https://app.example.com", b"wss://app.example.com"),
        ("https://app.example.com", b"https://\xffapp.example.com"),
        ("https://*.example.com", b"https://example.com"),
        ("https://*.example.com", b"https://.example.com"),
        ("https://*.example.com", b"https://*.example.com"),
        ("https://*.example.com", b"https://evilexample.com"),
        ("https://*.example.com", b"https://a.example.com:8443"),
        ("https://*.example.com", b"http://a.example.com"),
        ("https://*.example.com", b"https://evil.example/.example.com"),
        ("https://*.example.com", b"https://evil.example:1.example.com"),
        ("same", b"null"),
        ("null", b"https://chat.example.com"),
    ],
)
def test_refused(entry: str, origin: bytes) -> None:
    assert not allowed(WebOriginCheck([entry], NAMES), origin)


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        (b"https://chat.example.com", b"chat.example.com", True),
        (b"https://chat.example.com:443", b"chat.example.com:8443", True),
        (b"https://chat.example.com:8443", b"chat.example.com:8443", True),
        (b"https://chat.example.com:8443", b"chat.example.com:08443", True),
        (b"https://a.tenants.example.com", b"chat.example.com", True),
        (b"https://chat.example.com:8443", b"chat.example.com", False),
        (b"https://chat.example.com:8443", b"chat.example.com:", False),
        (b"https://chat.example.com:8444", b"chat.example.com:8443", False),
        (b"http://chat.example.com", b"chat.example.com", False),
        (b"http://chat.example.com:443", b"chat.example.com", False),
        (b"https://a.b.tenants.example.com", b"chat.example.com", False),
        (b"https://tenants.example.com", b"chat.example.com", False),
        (b"https://a.chat.example.com", b"chat.example.com", False),
        (b"https://evil.example", b"evil.example", False),
    ],
)
def test_same_allows_the_names_of_the_site(origin: bytes, host: bytes, own: bool) -> None:
    assert allowed(WebOriginCheck(["same"], NAMES), origin, host=host) is own


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        (b"https://a.example", b"a.example", True),
        (b"https://[::1]:8443", b"[::1]:8443", True),
        (b"https://[::1]", b"[::1]", True),
        (b"https://b.example", b"a.example", False),
        (b"https://[::2]:8443", b"[::1]:8443", False),
    ],
)
def test_same_on_a_wildcard_site_allows_the_requested_host(origin: bytes, host: bytes, own: bool) -> None:
    assert allowed(WebOriginCheck(["same"], ["*"]), origin, host=host) is own


def test_request_without_origin_passes_unless_required() -> None:
    assert allowed(WebOriginCheck(["same"], NAMES))
    refusal = WebOriginCheck(["same"], NAMES, required=True).check(facts())
    assert refusal is not None
    assert (refusal.status, refusal.reason) == (403, "web origin missing")
    assert allowed(WebOriginCheck(["same"], NAMES, required=True), b"https://chat.example.com")


def test_empty_list_refuses_all_pages() -> None:
    assert not allowed(WebOriginCheck([], NAMES), b"https://chat.example.com")
    assert allowed(WebOriginCheck([], NAMES))


@pytest.mark.parametrize("origins", [(), (b"null",), (b"https://login.example",), (b"a", b"b")])
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_plain_requests_are_not_checked(method: bytes, origins: tuple[bytes, ...]) -> None:
    """A page with the policy no-referrer posts its own form with the Origin null, a login service from its own."""
    fields = [(b"Host", b"chat.example.com"), *((b"Origin", origin) for origin in origins)]
    found = RequestReader(True).feed(request(tuple(fields), b"%b /callback HTTP/1.1" % method))
    assert found is not None
    plain = gather(found, Connection(ip="192.0.2.1"), strict_path=True, now=0)
    assert WebOriginCheck(["same"], NAMES, required=True).check(plain) is None


def test_several_origins_are_refused() -> None:
    same = b"https://chat.example.com"
    assert not allowed(WebOriginCheck(["same"], NAMES), same, same)
    assert not allowed(WebOriginCheck(["same"], NAMES), same, b"https://evil.example")


def test_sent_value_is_only_in_the_detail() -> None:
    refusal = WebOriginCheck(["same"], NAMES).check(facts(b"https://evil.example"))
    assert refusal is not None
    assert refusal.detail == "https://evil.example"
    assert "evil" not in refusal.text + refusal.reason


@given(
    value=st.one_of(
        st.binary(max_size=40), st.text(alphabet="htps:/.a*@[]:0123%\u00fc\u0130 ", max_size=30).map(str.encode)
    )
)
def test_no_value_raises_or_passes_as_another(value: bytes) -> None:
    found = normalise_web_origin(value)
    assert found == "" or normalise_web_origin(found.encode()) == found
    assert "*" not in found
    assert "@" not in found
