"""Bypasses of rules: one path written in many ways, repeated fields, and what servers parse in different ways.

Each is either normalized and matched, or refused as ambiguous; the origin gets the target as the client sent it.
"""

from collections.abc import Iterator

import pytest

from tests.harness import Certificate, Tunnel, handshake_request
from tests.promises.firewalled import Outcome, Servers, try_handshake, tunnel_to
from tests.promises.scripted_origin import ScriptedOrigin

SITE = """
web_origins = ["same"]

[[sites.rules]]
name = "admin"
when = 'path == "/admin" || path.startsWith("/admin/")'
action = "block"

[[sites.rules]]
name = "intern"
when = 'path.lower().startsWith("/intern")'
action = "block"

[[sites.rules]]
name = "query"
when = '"q" in query && query["q"].exists(v, v.lower().contains("union select"))'
action = "block"

[[sites.rules]]
name = "role"
when = '"x-role" in headers && headers["x-role"].contains("admin")'
action = "block"

[[sites.rules]]
name = "agent"
when = 'user_agent.regex("(?i)sqlmap")'
action = "block"

[[sites.rules]]
name = "cookie"
when = '"role" in cookies && cookies["role"] == "admin"'
action = "block"

[[sites.rules]]
name = "no key"
when = 'path == "/keyed" && (!("x-key" in headers) || headers["x-key"] != "sesame")'
action = "block"
"""


@pytest.fixture(scope="module")
def servers(certificate: Certificate) -> Iterator[Servers]:
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, site=SITE) as tunnel:
        yield origin, tunnel


@pytest.fixture(scope="module")
def lenient(certificate: Certificate) -> Iterator[Servers]:
    with (
        ScriptedOrigin() as origin,
        tunnel_to(origin.address, certificate, site=f"strict_path = false\n{SITE}") as tunnel,
    ):
        yield origin, tunnel


def _seen(outcome: Outcome, rule: str) -> None:
    assert (outcome.status, outcome.reason) == (403, f"rule: {rule}")


ADMIN = [
    "/admin",
    "/admin/",
    "/admin/users",
    "/admin?x=1",
    "/%61dmin",
    "/%61%64%6D%69%6e",
]
SEGMENTS = [
    "//admin",
    "////admin",
    "/./admin",
    "/././/./admin",
    "/x/../admin",
    "/x/y/../../admin",
    "/../admin",
    "/../../../admin",
    "/x/..//admin",
    "/x//../admin",
    "/admin/.",
    "/admin/x/..",
    "/admin//",
    "/%2e/admin",
    "/%2E%2e/admin",
    "/x/%2e%2e/admin",
    "/x/.%2E/admin",
    "/x/%2e./admin",
    "/admin/%2e",
    "/admin/..;/",  # a segment of its own here, as for most servers
]
"""What is refused, and without `strict_path` matched."""


@pytest.mark.parametrize("target", SEGMENTS)
def test_without_strict_path_every_spelling_of_a_path_is_matched(lenient: Servers, target: str) -> None:
    _seen(try_handshake(lenient, target), "admin")


@pytest.mark.parametrize("target", ADMIN)
def test_every_spelling_of_a_path_is_matched(servers: Servers, target: str) -> None:
    _seen(try_handshake(servers, target), "admin")


@pytest.mark.parametrize("target", ["/intern", "/INTERN", "/InTeRn/x", "/%49ntern"])
def test_rule_with_lower_matches_every_case(servers: Servers, target: str) -> None:
    _seen(try_handshake(servers, target), "intern")


@pytest.mark.parametrize(
    "target",
    [
        "/Admin",  # paths have cases (RFC 3986 section 6.2.2.1)
        "/administrator",
        "/x/admin",
        "/.admin",
        "/.../admin..x/chat",
        "/%EF%BD%81dmin",  # a fullwidth a, which no server treats as an a
        "/admi%C3%B1",
        "/chat/b/c%41/d?x=%2f%5c%2561&&y=//../admin%0a",
        "/chat?u=https://a.example/../admin",
        "/",
        "/?q=union",
    ],
)
def test_other_paths_pass_unchanged(servers: Servers, target: str) -> None:
    outcome = try_handshake(servers, target)
    assert (outcome.status, outcome.target) == (101, target.encode())


AMBIGUOUS = [
    *SEGMENTS,
    "/admin/../x",
    "/admin/..",
    "//",
    "//x/admin",
    "/admin%0a",
    "/admin%7f",
    "/admin%00",
    "/admin%00.png",
    "/%00admin",
    "/x%2fadmin",
    "/x%2Fadmin",
    "/x%5cadmin",
    "/x%5Cadmin",
    "/..%2fadmin",
    "/..%5cadmin",
    "/%2e%2e%2fadmin",
    "/%2561dmin",
    "/%252e%252e/admin",
    "/%252fadmin",
    "/%25%36%31dmin",  # %61 once the escapes of its digits are decoded
    "/%61dmin%2500",
    "/adm%in",
    "/admin%",
    "/admin%2",
    "/%zz",
    "/%u0061dmin",
    "/%C0%AFadmin",  # an overlong slash
    "/%C0%AE%C0%AE/admin",  # overlong dots
    "/%E0%80%AFadmin",
    "/%F0%80%80%AFadmin",
    "/%C1%A1dmin",  # an overlong a
    "/%E1dmin",  # latin-1
    "/%ED%A0%80admin",  # a surrogate
    "/%F4%90%80%80",  # beyond the last code point
    "/%FF%FEa",
    "/chat?q=%00",
    "/chat?q=union%00select",
    "/chat?%00=q",
    "/chat?q=%C0%A7",  # an overlong quote
    "/chat?q=%FF",
]


@pytest.mark.parametrize("target", AMBIGUOUS)
def test_ambiguous_target_is_a_400(servers: Servers, target: str) -> None:
    outcome = try_handshake(servers, target)
    assert (outcome.status, outcome.reason) == (400, "ambiguous target")


@pytest.mark.parametrize("target", ["/x\\admin", "\\admin", "/adm\0in", "/adm\xedn", "/ad\tmin", "/ad min", "admin"])
def test_invalid_target_is_a_400(servers: Servers, target: str) -> None:
    outcome = try_handshake(servers, target)
    assert outcome.status == 400


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        ("/x%2f..%2fadmin", "admin"),
        ("/..%2fadmin", "admin"),
        ("/%2fadmin", "admin"),
        ("/admin%2fusers", "admin"),
        ("/admin/%00", "admin"),
        ("/admin/%ff", "admin"),
        ("/admin/%C0%AF", "admin"),
        ("/INTERN%2500", "intern"),
        ("/admin%00", ""),
        ("/%2561dmin", ""),
        ("/%C0%AFadmin", ""),
        ("/x%5cadmin", ""),
        ("/a%2fb/%c3%a4%ff%zz%?q=%00%ff", ""),
    ],
)
def test_without_strict_path_decoded_once_and_sent_unchanged(lenient: Servers, target: str, rule: str) -> None:
    outcome = try_handshake(lenient, target)
    if rule:
        _seen(outcome, rule)
    else:
        assert (outcome.status, outcome.target) == (101, target.encode())


def test_without_rules_any_target_reaches_the_origin_as_it_is(certificate: Certificate) -> None:
    """Collabora's WebSocket has an encoded URL in its path. Without rules there is nothing to bypass."""
    with ScriptedOrigin() as origin, Tunnel(origin.address, certificate) as tunnel:
        for target in (
            "/cool/https%3A%2F%2Foffice.example%2Findex.php%2Frichdocuments/ws?WOPISrc=https%3A%2F%2Foffice.example",
            "/a%00/%ff/.././/%2e%2E/%5c\\%252f/%/;x?%00",
        ):
            outcome = try_handshake((origin, tunnel), target)
            assert (outcome.status, outcome.target) == (101, target.encode())


# --- the query -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        "q=union select",
        "q=UNION+SELECT",
        "q=union%20select",
        "q=%55nion%20%73elect",
        "%71=union+select",
        "q=x&q=union+select",
        "q=union+select&q=x",
        "&&q=union+select&&",
        "q=x=union+select",
        "q=a&q=b&%71=c+Union+Select+d",
    ],
)
def test_every_spelling_of_a_query_value_is_matched(servers: Servers, query: str) -> None:
    outcome = try_handshake(servers, f"/chat?{query}")
    if " " in query:
        assert outcome.status == 400
    else:
        _seen(outcome, "query")


def test_too_many_values_are_refused_and_not_ignored(servers: Servers) -> None:
    """127 values before the one that matters are read; more are a 400."""
    _seen(try_handshake(servers, "/chat?" + "q=x&" * 127 + "q=union+select"), "query")
    outcome = try_handshake(servers, "/chat?" + "q=x&" * 128 + "q=union+select")
    assert (outcome.status, outcome.reason) == (400, "too many query values")


# --- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "rule"),
    [
        ([("X-Role", "admin")], "role"),
        ([("x-role", "admin")], "role"),
        ([("X-ROLE", "  admin\t")], "role"),
        ([("User-Agent", "sqlmap/1.7")], "agent"),
        ([("user-agent", "Mozilla"), ("USER-AGENT", "SqlMap")], "agent"),
        ([("User-Agent", "x" * 8000 + "sqlmap")], "agent"),
        ([("Cookie", "role=admin")], "cookie"),
        ([("cookie", "a=b;role=admin; c=d")], "cookie"),
        ([("Cookie", "a=b"), ("Cookie", "role=admin")], "cookie"),
        ([("Cookie", 'role="admin"')], "cookie"),
        ([("Cookie", "a=b;  role = admin ")], "cookie"),
        ([("Cookie", "role=admin; role=user")], "cookie"),
        ([("Cookie", "role=user; role=admin")], "cookie"),
        ([("Cookie", r'role="\141dmin"')], "cookie"),
        ([("Cookie", "a=b role=admin")], "cookie"),
    ],
)
def test_every_spelling_of_a_field_is_matched(servers: Servers, headers: list[tuple[str, str]], rule: str) -> None:
    _seen(try_handshake(servers, headers=headers), rule)


@pytest.mark.parametrize(
    "headers",
    [
        [("X-Role", "user"), ("X-Role", "admin")],
        [("X-Role", "admin"), ("x-ROLE", "user")],
        [("X-Role", "user"), ("X-Other", "a"), ("x-role", "user")],
    ],
)
def test_repeated_field_that_a_rule_reads_is_refused(servers: Servers, headers: list[tuple[str, str]]) -> None:
    outcome = try_handshake(servers, headers=headers)
    assert (outcome.status, outcome.reason) == (400, "repeated field")


def test_correct_key_next_to_a_wrong_one_is_refused(servers: Servers) -> None:
    """A rule and an origin cannot each choose a different one."""
    assert try_handshake(servers, "/keyed", [("X-Key", "sesame")]).status == 101
    _seen(try_handshake(servers, "/keyed"), "no key")
    for headers in (
        [("X-Key", "sesame"), ("X-Key", "wrong")],
        [("X-Key", "wrong"), ("X-Key", "sesame")],
        [("X-Key", "sesame"), ("x-key", "")],
    ):
        outcome = try_handshake(servers, "/keyed", headers)
        assert (outcome.status, outcome.reason) == (400, "repeated field")


@pytest.mark.parametrize(
    "headers",
    [
        [("Origin", "https://localhost"), ("Origin", "https://evil.example")],
        [("Origin", "https://localhost"), ("origin", "https://localhost")],
        [("Origin", "https://localhost, https://evil.example")],
        [("Origin", "https://localhost https://evil.example")],
        [("Origin", "https://localhost.evil.example")],
        [("Origin", "https://evil.example#https://localhost")],
        [("Origin", "https://localhost@evil.example")],
        [("Origin", "https://evil.example/localhost")],
        [("Origin", "https://localhost/")],
        [("Origin", "https://localhost:444")],
        [("Origin", "http://localhost")],
        [("Origin", "HTTP://LOCALHOST")],
        [("Origin", "null")],
        [("Origin", "")],
    ],
    ids=str,
)
def test_no_other_web_origin_passes(servers: Servers, headers: list[tuple[str, str]]) -> None:
    outcome = try_handshake(servers, headers=headers)
    assert (outcome.status, outcome.reason) == (403, "web origin not allowed")


@pytest.mark.parametrize(
    "fields",
    [
        b"X-Role: user\r\n admin\r\n",  # obs-fold, RFC 9112 section 5.2
        b"X-Role: user\r\n\tadmin\r\n",
        b"X-Role:\r\n admin\r\n",
        b"X-Role : admin\r\n",
        b" X-Role: admin\r\n",
        b"X-Role\t: admin\r\n",
        b"X-Role: user\nX-Role: admin\r\n",
        b"X-Role: user\rX-Role: admin\r\n",
        b"X-Role: user\0admin\r\n",
        b"X-R\0ole: admin\r\n",
        b"X-R\xf6le: admin\r\n",
        b"Host: other.example\r\n",
        b"host: localhost\r\n",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
    ],
)
def test_ambiguous_field_is_a_400(servers: Servers, fields: bytes) -> None:
    whole = handshake_request("/chat")
    outcome = try_handshake(servers, request=whole[:-2] + fields + b"\r\n")
    assert outcome.status == 400


def test_invalid_utf_8_hides_nothing(servers: Servers) -> None:
    _seen(try_handshake(servers, headers=[("X-Role", "\xff\xfe\x80admin\xc0")]), "role")
    _seen(try_handshake(servers, headers=[("User-Agent", "\xed\xa0\x80SQLMAP")]), "agent")


def test_too_many_cookies_or_offers_are_refused(servers: Servers) -> None:
    many = "; ".join(f"c{number}=" for number in range(199))
    _seen(try_handshake(servers, headers=[("Cookie", f"{many}; role=admin")]), "cookie")
    outcome = try_handshake(servers, headers=[("Cookie", f"{many}; x=y; role=admin")])
    assert (outcome.status, outcome.reason) == (400, "too many cookies")
    for name, status in (("role", 400), ("other", 101)):
        same = "; ".join(f"{name}={number}" for number in range(5))
        assert try_handshake(servers, headers=[("Cookie", same)]).status == status
    outcome = try_handshake(servers, headers=[("Sec-WebSocket-Protocol", ",".join(["a"] * 65))])
    assert (outcome.status, outcome.reason) == (400, "too many elements")
