"""Host, Origin and query: what other pages and other names can make a browser send is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.admin.checks import Unacceptable, check_host, check_origin, check_query, is_proxied


def status(check: object, *arguments: object, **options: object) -> int:
    try:
        check(*arguments, **options)  # type: ignore[operator]
    except Unacceptable as refusal:
        return refusal.status
    return 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", 200),
        ("localhost:9180", 200),
        ("LOCALHOST:1", 200),
        ("localhost.:1", 200),
        ("127.0.0.1:9180", 200),
        ("[::1]:9180", 200),
        ("10.0.0.7:9180", 200),
        ("tunnel.example:443", 200),
        ("listen.example", 200),
        ("evil.example", 421),
        ("evil.example:9180", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("10.0.0.8", 421),
        ("127.1", 421),
        ("2130706433", 421),
        ("", 400),
        ("localhost:", 400),
        ("localhost:x", 400),
        ("local host", 400),
        ("localhost/", 400),
        ("user@localhost", 400),
        ("localhost,evil.example", 400),
        ("[::1", 400),
        ("localhost\udc80", 400),
    ],
)
def test_hosts(host: str, expected: int) -> None:
    assert status(check_host, [host], "10.0.0.7", {"tunnel.example"}, "listen.example") == expected


def test_there_is_one_host() -> None:
    assert status(check_host, [], "", (), "") == 400
    assert status(check_host, ["localhost", "localhost"], "", (), "") == 400
    assert status(check_host, ["[::ffff:10.0.0.7]"], "10.0.0.7", (), "") == 200


@pytest.mark.parametrize(
    ("origins", "site", "secure", "expected"),
    [
        ([], "", False, False),
        ([], "same-origin", False, True),
        ([], "none", False, False),
        (["http://localhost:9180"], "", False, True),
        (["https://localhost:9180"], "", False, True),
        (["https://localhost:9180"], "same-origin", True, True),
        (["HTTP://localhost:9180"], "", False, 403),
        (["http://localhost:9180"], "", True, 403),
        (["http://localhost"], "", False, 403),
        (["http://localhost:8443"], "", False, 403),
        (["http://127.0.0.1:9180"], "", False, 403),
        (["http://evil.example"], "", False, 403),
        (["http://localhost:9180.evil.example"], "", False, 403),
        (["null"], "", False, 403),
        ([""], "", False, 403),
        (["http://localhost:9180", "http://localhost:9180"], "", False, 400),
        (["http://localhost:9180"], "cross-site", False, 403),
        (["http://localhost:9180"], "same-site", False, 403),
        ([], "same-site", False, 403),
        ([], "whatever", False, 403),
    ],
)
def test_origins(origins: list[str], site: str, secure: bool, expected: bool | int) -> None:
    found: bool | int
    try:
        found = check_origin(origins, site, "localhost:9180", secure=secure)
    except Unacceptable as refusal:
        found = refusal.status
    assert found == expected


@pytest.mark.parametrize("name", ["token", "TOKEN", "access_token", "password", "api_key", "csrf", "x-csrf-token"])
def test_a_secret_in_a_url_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(Unacceptable, match="does not belong into a URL") as caught:
        check_query(f"a=1&{name}=s3cret")
    assert caught.value.status == 400
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("query", ["a", "a=1&a=2", "&".join(f"a{n}=1" for n in range(40)), "=&&"])
def test_queries_that_are_refused(query: str) -> None:
    assert status(check_query, query) == 400


@given(st.text(max_size=200))
def test_any_query(query: str) -> None:
    try:
        found = check_query(query)
    except Unacceptable:
        return
    assert all(isinstance(value, str) for value in found.values())


def test_what_a_proxy_adds_is_seen() -> None:
    assert is_proxied(["host", "x-forwarded-for"])
    assert is_proxied(["forwarded"])
    assert is_proxied(["x-forwarded-proto"])
    assert not is_proxied(["host", "accept"])
