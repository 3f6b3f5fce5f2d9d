"""URLs of Valkey and Redis servers: what they mean, and errors that say what to write but no password."""

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tlstunnel.errors import ConfigurationError
from tlstunnel.state.valkey.address import Endpoint, ServerAddress, parse_url


@pytest.mark.parametrize(
    ("url", "expected", "shown"),
    [
        ("valkey://localhost", ServerAddress("single", (Endpoint("localhost", 6379),)), "valkey://localhost:6379"),
        (
            "redis://me:s%40cret@[::1]:7000/3",
            ServerAddress("single", (Endpoint("::1", 7000),), user="me", password="s@cret", database=3),
            "valkey://[::1]:7000/3",
        ),
        (
            "REDISS://:pw@cache.example.com/0?ca=ca.pem&cert=/etc/c.pem&key=k.pem",
            ServerAddress(
                "single",
                (Endpoint("cache.example.com", 6379),),
                tls=True,
                password="pw",
                ca=Path("/conf/ca.pem"),
                cert=Path("/etc/c.pem"),
                key=Path("/conf/k.pem"),
            ),
            "valkeys://cache.example.com:6379",
        ),
        (
            "valkey+unix://u:p.w@/run/a%20b.sock?db=2",
            ServerAddress("unix", (Endpoint(path="/run/a b.sock"),), user="u", password="p.w", database=2),
            "valkey+unix:///run/a b.sock?db=2",
        ),
        (
            "valkeys+sentinel://user@a,b:1,[::2]/main/1",
            ServerAddress(
                "sentinel",
                (Endpoint("a", 26379), Endpoint("b", 1), Endpoint("::2", 26379)),
                tls=True,
                user="user",
                database=1,
                service="main",
            ),
            "valkeys+sentinel://a:26379,b:1,[::2]:26379/main/1",
        ),
        (
            "redis+cluster://a,b:7001",
            ServerAddress("cluster", (Endpoint("a", 6379), Endpoint("b", 7001))),
            "valkey+cluster://a:6379,b:7001",
        ),
    ],
)
def test_urls(url: str, expected: ServerAddress, shown: str) -> None:
    address = parse_url(url, Path("/conf"))
    assert address == expected
    assert str(address) == shown
    assert not address.password or address.password not in repr(address)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "a URL begins with valkey://, valkeys://, redis:// or rediss://; write "),
        ("localhost:6379", "a URL begins with valkey://, valkeys://, redis:// or rediss://; write "),
        ("http://localhost", 'rediss://, not "http"; write "valkey://HOST:6379/0"'),
        ("valkey+sentinels://a/main", '"+sentinels" is unknown; write +sentinel, +cluster or +unix, or nothing'),
        ("valkey+single://a", '"+single" is unknown'),
        ("valkey+://a", '"+" is unknown'),
        ("valkey://", 'there is no host; write "valkey://HOST:6379/0"'),
        ("valkey://:6379", 'a host is not HOST or HOST:PORT; write "valkey://HOST:6379/0"'),
        ("valkey://a,b", "several hosts need +sentinel or +cluster after the scheme"),
        ("valkey+cluster://a,,b", "a host is not HOST or HOST:PORT"),
        ("valkey+cluster://" + ",".join(["a"] * 65), "there are more than 64 hosts"),
        ("valkey://a b", "a host is not HOST or HOST:PORT"),
        ("valkey://a:0", "a host is not HOST or HOST:PORT"),
        ("valkey://user:secret", "a host is not HOST or HOST:PORT"),
        ("valkey://::1:6379", "a host is not HOST or HOST:PORT"),
        ("valkey://a/first", '"first" is not the number of a database'),
        ("valkey://a/0/1", '"0/1" is not the number of a database'),
        ("valkey+cluster://a/1", "a cluster has only database 0"),
        ("valkey+sentinel://a", "the name of the service that the sentinels watch is missing"),
        ("valkey+sentinel://a/my%0Amain", "the name of the service that the sentinels watch is missing"),
        ("valkey+unix://run/valkey.sock", "the path of a Unix socket begins with a third /"),
        ("valkey+unix:///run/%1b[2J", "the path has unprintable characters"),
        ("valkeys+unix:///run/valkey.sock", "there is no TLS over a Unix socket"),
        ("valkey+unix:///" + "a" * 200, "the most for a Unix socket"),
        ("valkey://a?ca=ca.pem", "ca, cert and key are for TLS; begin the URL with valkeys://"),
        ("valkeys://a?cert=c.pem", "cert and key belong together; write both"),
        ("valkeys://a?ca=", "ca is empty after ?"),
        ("valkeys://a?ca=b&ca=c", "ca is repeated after ?"),
        ("valkeys://a?ca=%00", "there is a NUL in the ca"),
        ("valkey://a?ssl=true", '"ssl" is unknown after ?; known are ca, cert, key'),
        ("valkey://a?password=x", "a password belongs before the host, or in state.password_file"),
        ("valkey://a#0", "a URL of a server has no fragment; write %23 for a # in the password"),
        ("valkey://u:p/w@a", "in the password, write %2F for / and %40 for @"),
        ("valkey://u:p?w@a", "in the password, write %3F for ? and %40 for @"),
        ("valkey://u:p@w@a", "there are two @; in the password, write %40 for @"),
        ("valkey://u:50%@a", "that begins no escape; write %25 for it"),
        ("valkey://u:%ff@a", "the password is not UTF-8"),
    ],
)
def test_errors(url: str, reason: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse_url(url)
    assert str(raised.value).startswith("state.url: ")
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def find_error(url: str) -> str:
    """Return what is wrong with a URL, or ""."""
    try:
        parse_url(url)
    except ConfigurationError as error:
        return str(error)
    return ""


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(user=texts, password=texts, database=st.integers(0, 99_999))
def test_any_user_and_password_can_be_written(user: str, password: str, database: int) -> None:
    address = parse_url(f"valkey://{quote(user, safe='')}:{quote(password, safe='')}@host/{database}")
    assert (address.user, address.password, address.database) == (user, password, database)
    assert address.endpoints == (Endpoint("host", 6379),)


@given(
    head=st.sampled_from(["valkey://", "rediss://u", "redis+sentinel://", "valkey+unix://", "valkey+cluster://me", ""]),
    password=st.text("abc/?#@:%,[]=&", max_size=12),
    tail=st.sampled_from(["@host", "@host/main", "@/run/a.sock", "@a,b"]),
)
@example(head="valkey://", password="", tail="@host")
def test_no_error_shows_a_password(head: str, password: str, tail: str) -> None:
    """Written as people write it, with nothing escaped."""
    secret = f"s3kr1t{password}s3kr1t"
    assert "s3kr1t" not in find_error(f"{head}:{secret}{tail}")


@given(st.text())
@example("valkey+unix:////")
def test_anything_is_parsed_or_refused(url: str) -> None:
    for text in (url, f"valkey://{url}", f"valkeys+sentinel://{url}", f"redis+unix:///{url}"):
        assert len(find_error(text)) < 1000
