"""Expressions: what they accept, errors, and that no request makes them raise or slow."""

import dataclasses
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.handshakes import FIELDS, RICH_FIELDS, Field, request
from tests.harness import assert_below
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.cookies import MAX_COOKIES
from tlstunnel.firewall.expressions import (
    MAX_EXPRESSION,
    EvaluationError,
    ExpressionError,
    Expressions,
)
from tlstunnel.firewall.facts import FIELDS as NAMES
from tlstunnel.firewall.facts import MAX_QUERY_VALUES, Facts, gather
from tlstunnel.firewall.lists import NamedLists
from tlstunnel.handshake.connection import Connection
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.handshake.request import RequestReader

CONNECTION = Connection(
    ip="192.0.2.1",
    tls_version="TLSv1.3",
    tls_cipher="TLS_AES_128_GCM_SHA256",
    tls_sni="chat.example.com",
    tls_ja4="t13d",
    client_subject="CN=a",
    site="*",
)
LISTS = NamedLists({"office": ["198.51.100.0/24", "alice"], "botnets": ["192.0.2.0/24"]})


def facts(target: bytes = b"/", *added: Field, ip: str = "192.0.2.1", now: float = 1_767_225_600.0) -> Facts:
    found = RequestReader().feed(request((*FIELDS, *added), b"GET %b HTTP/1.1" % target))
    assert found is not None
    connection = dataclasses.replace(CONNECTION, ip=ip)
    return gather(found, connection, strict_path=False, now=now)


def evaluated(text: str, seen: Facts) -> bool:
    expressions = Expressions(LISTS)
    expression = expressions.compile(text)
    return expression.evaluate(expressions.scope([expression]).context(seen))


def refusal(text: str) -> str:
    with pytest.raises(ExpressionError) as caught:
        Expressions(LISTS).compile(text)
    message = str(caught.value)
    assert isinstance(caught.value, ConfigurationError)
    assert message == f"line {caught.value.line}, column {caught.value.column}: {caught.value.reason}"
    assert len(message.splitlines()) == 1
    return message


SEEN = facts(
    b"/Admin//x/../users?room=1&room=2&q=%27+or+1",
    (b"X-Token", b"abc"),
    (b"Cookie", b"theme=dark; a-b=1"),
    (b"Origin", b"https://chat.example.com"),
    (b"User-Agent", b"curl/8.0"),
    (b"Sec-WebSocket-Protocol", b"mqtt, v2"),
    (b"Sec-WebSocket-Extensions", b"permessage-deflate"),
    (b"X-Latin", b"caf\xe9"),
)


@pytest.mark.parametrize(
    "text",
    [
        # Each field.
        'ip == "192.0.2.1"',
        'method == "GET"',
        'host == "chat.example.com"',
        'path == "/Admin/users"',
        'raw_path == "/Admin//x/../users"',
        'query["room"] == ["1", "2"] && query["room"][1] == "2" && query.room[0] == "1" && size(query) == 2',
        'query["q"][0] == "\' or 1"',
        'headers["x-token"] == "abc" && "x-token" in headers && headers.host == "chat.example.com"',
        'headers["x-latin"] == "caf\u00e9"',
        'cookies["theme"] == "dark" && cookies["a-b"] == "1" && !("b" in cookies) && has(cookies.theme)',
        'origin == "https://chat.example.com"',
        'user_agent.startsWith("curl/")',
        '"mqtt" in subprotocols && subprotocols[1] == "v2"',
        'extensions == ["permessage-deflate"]',
        'tls_version == "TLSv1.3" && tls_cipher == "TLS_AES_128_GCM_SHA256"',
        'tls_sni == host && tls_ja4 == "t13d" && client_subject == "CN=a" && site == "*"',
        'now == timestamp("2026-01-01T00:00:00Z") && now.getHours() < 8 && now.getFullYear() == 2026',
        'now - timestamp("2025-12-31T00:00:00Z") > duration("23h")',
        # Functions.
        'ip_in(ip, "10.0.0.0/8", "192.0.2.0/24") && !ip_in(ip, "10.0.0.0/8")',
        'in_list(ip, "botnets") && !in_list(ip, "office") && in_list("alice", "office") && !in_list("", "office")',
        'path.regex("^/[Aa]dmin/") && !path.regex("^admin") && path.regex("(?i)USERS$")',
        'path.regex(r"\\bAdmin\\b") && headers["x-latin"].regex("^caf\u00e9$")',
        'path.lower() == "/admin/users" && path.lower().regex("admin") && "\u00c4".lower() == "\u00e4"',
        # The language.
        'path.startsWith("/Admin") ? ip != "" : false',
        'path in ["/a", "/Admin/users"] && path.contains("min") && path.endsWith("users")',
        'headers.exists(name, name.startsWith("x-") && headers[name] == "abc")',
        'query.exists(k, query[k].exists(v, v.contains("or")))',
        '["/a", "/Admin"].exists(p, path.startsWith(p)) && ["a", "b"].all(x, ["c"].exists(y, x != y))',
        'cookies.filter(name, name == "theme").size() == 1 && [1, 2].map(x, x * 2) == [2, 4]',
        '["a", "b"].exists_one(x, x == "a") && query.all(k, size(k) > 0)',
        'int(query["room"][0]) + 1 == 2 && double("1.5") > 1.0 && string(1) == "1"',
        "true // a comment with unknown names\n&& !false",
        'size("""a"b""" + \'\'\'c\'d\'\'\') == 6 && "a\\"b".contains("\\"") && r"\\d" == "\\\\d" && "in" == "in"',
        "{'a': 1}['a'] == 1 && 0x1F == 31 && 1.5e3 == 1500.0 && null == null",
    ],
)
def test_true_expressions(text: str) -> None:
    assert evaluated(text, SEEN) is True
    assert evaluated(f"!({text}\n)", SEEN) is False


def test_every_field_is_known() -> None:
    for name in NAMES:
        expression = Expressions().compile(f"{name} == {name}")
        assert expression.fields == {name}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Syntax.
        ("", "line 1, column 1: not CEL: mismatched input '<EOF>'"),
        ('path == "', "line 1, column 9: not CEL: "),
        ("path ==\n host)", "line 2, column 6: not CEL: "),
        ("path == 'a' and true", "line 1, column 13: not CEL: "),
        ("path\x00", "line 1, column 5: not CEL: "),
        ('headers.?x.orValue("")', "line 1, column 8: not CEL: unsupported syntax '.?'"),
        ("(" * 1000 + "true" + ")" * 1000, "not CEL: "),
        ("true " + "|| true" * MAX_EXPRESSION, f"the expression has more than {MAX_EXPRESSION} bytes"),
        # Names, also where an evaluation would hide them.
        ("pth == '/'", 'line 1, column 1: there is no field "pth"; did you mean "path"?'),
        ("true || pth == '/'", 'line 1, column 9: there is no field "pth"; did you mean "path"?'),
        ("true\n  || false\n  || hosts == 'a'", 'line 3, column 6: there is no field "hosts"; did you mean "host"?'),
        ("zzz", 'line 1, column 1: there is no field "zzz"; known are client_subject, cookies, extensions, headers'),
        ("http.host == 'a'", 'there is no field "http"'),
        (".path == ''", 'line 1, column 2: only headers, query and cookies have members, such as "path"'),
        ("path.lenght == 1", 'line 1, column 6: only headers, query and cookies have members, such as "lenght"'),
        ("headers.exists(n, true) && n == 'a'", 'line 1, column 28: there is no field "n"'),
        ("query.exists(key, ky == 'a')", 'line 1, column 19: there is no field "ky"; did you mean "key"?'),
        ("Request{path: 'a'} == 1", 'line 1, column 1: there is no field "Request"'),
        ("type(path) == string", 'line 1, column 1: there is no function "type"'),
        ("headers['X-Token'] == 'a'", 'line 1, column 9: write header names in lower case: "x-token"'),
        ("'X-Token' in headers", 'line 1, column 1: write header names in lower case: "x-token"'),
        ("has(headers.Host)", 'line 1, column 13: write header names in lower case: "host"'),
        ("headers.exists(path, path == 'a')", 'line 1, column 16: "path" is a field; give the variable another name'),
        # Functions and methods.
        ("true || ip_inn(ip, '10.0.0.0/8')", 'line 1, column 9: there is no function "ip_inn"; did you mean "ip_in"?'),
        ("path.startWith('/')", 'line 1, column 6: there is no method "startWith"; did you mean "startsWith"?'),
        ("path.matches('a')", 'line 1, column 6: there is no method "matches"; write value.regex("pattern"), whose'),
        ("path.lowerAscii() == 'a'", 'there is no method "lowerAscii"; write value.lower()'),
        ("header('x') == 'a'", 'there is no function "header"; write headers["name"]'),
        ("startsWith(path, '/')", "line 1, column 1: write value.startsWith(...)"),
        ("lower(path) == '/'", "line 1, column 1: write value.lower(...)"),
        ("ip.ip_in('10.0.0.0/8')", "line 1, column 4: write ip_in(...), with the value inside"),
        ("all(headers, h, true)", "line 1, column 1: write value.all(...)"),
        ("cel.bind(x, path, x == 'a')", 'there is no field "cel"'),
        ("path.bind(x, path, x == 'a')", 'there is no method "bind"'),
        ("path.eval()", 'there is no method "eval"; '),
        # Literals.
        ("path.regex('(')", 'line 1, column 12: the pattern "(" is not valid in RE2: missing ): ('),
        ("true || path.regex('a**')", "the pattern \"a**\" is not valid in RE2: bad repetition operator: **"),
        ("path.regex('(?=a)')", "is not valid in RE2: invalid perl operator: (?="),
        ("path.regex('((a{100}){10}){10}')", "the pattern"),
        ("path.regex('a{999}b{999}')", 'the pattern "a{999}b{999}" is too large; use a named list'),
        ("path.regex(host)", 'line 1, column 6: write value.regex("pattern"); the quoted parts must be literals'),
        ("path.regex('a' + 'b')", "write value.regex"),
        ("path.regex()", "write value.regex"),
        ("path.regex('a', 'b')", "write value.regex"),
        ("path.regex(b'a')", "line 1, column 12: bytes are not supported; write a string, without the b"),
        ("ip_in(ip, '10.0.0.0/33')", 'line 1, column 11: "10.0.0.0/33" is not a network'),
        ("ip_in(ip, '10.0.0.0/8', '10.0.0.1/8')", '"10.0.0.1/8" has bits set after the /8'),
        ("ip_in(ip)", 'line 1, column 1: write ip_in(ip, "10.0.0.0/8", ...)'),
        ("ip_in(ip, ip)", "write ip_in("),
        ("ip_in(ip, ['10.0.0.0/8'])", "write ip_in("),
        ("in_list(ip, 'botnet')", 'line 1, column 13: there is no list "botnet"; did you mean "botnets"?'),
        ("in_list(ip, 'zzz')", 'there is no list "zzz"; lists = { NAME = ... } at the top of the file defines one'),
        ("in_list(ip, 'office', 'botnets')", 'write in_list(value, "name")'),
        ("in_list(ip, host)", 'write in_list(value, "name")'),
        # Types.
        ("path", "line 1, column 1: the result is a string, not true or false"),
        ("size(path)", "the result is a number, not true or false"),
        ("query", "the result is a map, not true or false"),
        ("path > 5", "line 1, column 1: "),
        ("path + 1 == 'a'", "Unsupported operation: string + int"),
        ("headers.lower() == 'a'", "lower takes a string, not a map"),
        ("in_list(subprotocols, 'office')", "in_list takes a string, not a list"),
        ("ip_in(headers, '10.0.0.0/8')", "ip_in takes a string, not a map"),
        ("now.regex('a')", "regex takes a string, not a datetime"),
        # Expressions that could be slow.
        (
            "headers.exists(a, headers.exists(b, a == b))",
            "line 1, column 27: these comprehensions could take more than 2000 steps; iterate over query[x]",
        ),
        ("query.exists(a, cookies.exists(b, a == b))", "could take more than 2000 steps"),
        ("query.exists(a, query['x'].exists(b, a == b))", "could take more than 2000 steps"),
        ("query.exists(a, query[a].exists(b, query[a].exists(c, b == c)))", "could take more than 2000 steps"),
        ("headers.exists(a, query[a].exists(b, a == b))", "could take more than 2000 steps"),
        ("query.exists(a, query[a + 'x'].exists(b, a == b))", "could take more than 2000 steps"),
        ("[" + "1, " * 2000 + "1].exists(x, x == 2)", "could take more than 2000 steps"),
        ("[" + "1, " * 50 + "1].exists(x, [" + "1, " * 50 + "1].exists(y, x == y))", "could take more than 2000 steps"),
        ("query.exists(a, query.map(b, b).size() > 1)", "line 1, column 23: map cannot be nested in another"),
        ("query.exists(a, query[a].filter(b, true).size() > 1)", "filter cannot be nested in another comprehension"),
    ],
)  # fmt: skip
def test_invalid_expressions(text: str, message: str) -> None:
    assert message in refusal(text)


def test_expression_that_reads_a_missing_key_loads() -> None:
    for text in ('headers["x-a"] == "1"', 'query["a"][3] == "1"', 'int(cookies["n"]) > 3', "int(path) > 3"):
        Expressions().compile(text)


@pytest.mark.parametrize(
    ("text", "seen", "reason"),
    [
        ('headers["x-a"] == "1"', facts(), 'there is no key "x-a"'),
        ('cookies.a == "1"', facts(), 'there is no key "a"'),
        ('query["a"][1] == "1"', facts(b"/?a=1"), "index out of bounds"),
        ('query["a"][int(query["n"][0])] == "1"', facts(b"/?a=1&n=-9223372036854775808"), "index out of bounds"),
        ('int(query["n"][0]) > 3', facts(b"/?n=99999999999999999999"), "number too large"),
        ('int(query["n"][0]) + 1 > 3', facts(b"/?n=9223372036854775807"), "Arithmetic overflow"),
        ('1 / int(query["n"][0]) > 3', facts(b"/?n=0"), "division by zero"),
        ('timestamp(query["t"][0]) < now', facts(b"/?t=yesterday%1b[2J"), "Function 'timestamp' error"),
        ('timestamp(query["t"][0]) + duration("9999999h") < now', facts(b"/?t=9999-12-31T23:59:59Z"), "overflow"),
        ('double(query["n"][0]) > 1.0', facts(b"/?n=nan"), "No such overload"),
        ('headers[query["h"][0]] == "a"', facts(b"/?h=" + b"%1b" * 200), "no such key"),
        ('query["a"]', facts(b"/?a=1"), "the result is a list, not true or false"),
        ('in_list(query["a"], "office")', facts(b"/?a=1"), "in_list takes a string, not a list"),
    ],
)
def test_failures_caused_by_a_request(text: str, seen: Facts, reason: str) -> None:
    with pytest.raises(EvaluationError) as caught:
        evaluated(text, seen)
    message = str(caught.value)
    assert reason in message
    assert message.isprintable()
    assert len(message) < 1000


def test_library_does_not_log_a_failing_function(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(EvaluationError):
        evaluated('in_list(query["a"], "office")', facts(b"/?a=secret"))
    assert caplog.records == []


def test_condition_never_raises() -> None:
    failures: list[str] = []
    holds = Expressions().condition('headers["x-a"] == "1"', failures.append)
    assert holds(facts(b"/", (b"X-A", b"1")))
    assert not holds(facts(b"/", (b"X-A", b"2")))
    assert failures == []
    assert not holds(facts())
    assert failures == ['there is no key "x-a"']
    assert not Expressions().condition('headers["x-a"] == "1"')(facts())


def test_changed_list_applies_at_once(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("")
    lists = NamedLists({"a": str(file)})
    holds = Expressions(lists).condition('in_list(ip, "a")')
    assert not holds(facts())
    file.write_text("192.0.2.0/24\n")
    lists.refresh()
    assert holds(facts())


def test_only_used_fields_are_passed_to_the_library() -> None:
    expressions = Expressions(LISTS)
    found = [expressions.compile(text) for text in ('path == "/"', 'in_list(host, "office")', "true")]
    assert [expression.fields for expression in found] == [{"path"}, {"host"}, frozenset()]
    context = expressions.scope(found).context(facts())
    assert set(context.variables) == {"path", "host"}
    assert set(context.functions) == {"in_list"}


# Time.


@pytest.mark.alone
def test_the_slowest_expressions_on_the_largest_requests() -> None:
    """Measured: 7 ms for the slowest, a list of ten words in each of 200 cookies. A fault would take seconds."""
    query = b"&".join(b"a%d=%d" % (n, n) for n in range(MAX_QUERY_VALUES))
    cookies = b";".join(b"c%d=%d" % (n, n) for n in range(MAX_COOKIES))
    seen = facts(b"/?" + query, (b"Cookie", cookies), *((b"X-%d" % n, b"v" * 80) for n in range(90)))
    for text in (
        '["a","b","c","d","e","f","g","h","i","j"].exists(n, cookies.exists(c, (c + n).regex("(?i)x[0-9]+y")))',
        'cookies.filter(c, c != "").size() > 0',
        "cookies.map(c, c + raw_path).size() > 0",
        'query.exists(k, query[k].exists(v, v.regex("(?i)x[0-9]+y")))',
        'headers.exists(h, headers[h].regex("(?i)union.*select"))',
    ):
        expressions = Expressions(LISTS)
        expression = expressions.compile(text)
        context = expressions.scope([expression]).context(seen)
        expression.evaluate(context)
        assert_below(0.1, lambda: _seconds_of(lambda: expression.evaluate(context)))  # noqa: B023


def test_a_rule_reads_no_field_of_which_servers_read_different_ones() -> None:
    repeated = facts(b"/", (b"X-Key", b"banned"), (b"x-key", b"good"), (b"X-Other", b"a"))
    for text in ('headers["x-key"] == "banned"', 'headers.exists(n, headers[n] == "banned")'):
        with pytest.raises(Refusal) as caught:
            Expressions().condition(text)(repeated)
        assert (caught.value.status, caught.value.reason) == (400, "repeated field")
    for text in ('headers["x-other"] == "a"', '"x-key" in headers', 'headers.exists(n, n == "x-key")'):
        assert Expressions().condition(text)(repeated)


@pytest.mark.parametrize("name", [b"X_Key", b"x.key"])
def test_a_rule_reads_no_field_that_a_client_spells_like_cgi(name: bytes) -> None:
    seen = facts(b"/", (name, b"banned"))
    for text in ('headers["x-key"] == "banned"', '!("x-key" in headers) || headers["x-key"] == "good"'):
        with pytest.raises(Refusal, match="repeated field"):
            Expressions().condition(text)(seen)
    assert Expressions().condition(f'headers["{name.decode().lower()}"] == "banned"')(seen)
    assert Expressions().condition('!("x-other" in headers)')(seen)


def test_lists_may_be_repeated() -> None:
    names = (b"X-Forwarded-For", b"Accept-Language", b"User-Agent", b"Sec-WebSocket-Protocol")
    seen = facts(b"/", *((name, value) for name in names for value in (b"a", b"b")))
    for name in names:
        assert Expressions().condition(f'headers["{name.decode().lower()}"].contains("a, b")')(seen)


# Two cookies with four values each, which are 16 combinations.
FOUR_TIMES_FOUR = b"; ".join(b"%c=%d" % (name, value) for name in b"ab" for value in range(4))


def test_values_of_cookies_do_not_multiply_what_a_pattern_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    expressions = Expressions()
    searched: list[bytes] = []
    pattern = "[ab]*a[ab]{30}c"
    condition = expressions.condition(f'cookies.a == "x" || cookies.b == "x" || user_agent.regex("{pattern}")')
    monkeypatch.setitem(expressions._patterns, pattern, searched.append)
    assert not condition(facts(b"/", (b"User-Agent", b"ab" * 7000), (b"Cookie", FOUR_TIMES_FOUR)))
    assert len(searched) == 1


@pytest.mark.parametrize(
    ("text", "cookies", "evaluates"),
    [
        ('cookies.exists(n, cookies[n] == "x")', 30, True),
        ('cookies.exists(n, cookies[n] == "x")', 180, False),
        ('cookies.exists(n, ["c","d","e","f","g"].exists(k, cookies[n] == k))', 10, True),
        ('cookies.exists(n, ["c","d","e","f","g"].exists(k, cookies[n] == k))', 30, False),
        ('cookies.a == "x" || cookies.b == "x"', 180, True),
    ],
)
def test_values_of_cookies_do_not_multiply_the_steps_of_a_request(text: str, cookies: int, evaluates: bool) -> None:
    sent = b"; ".join([FOUR_TIMES_FOUR, *(b"c%d=1" % n for n in range(cookies))])
    condition = Expressions().condition(text)
    if evaluates:
        assert not condition(facts(b"/", (b"Cookie", sent)))
    else:
        with pytest.raises(Refusal, match="too many cookies"):
            condition(facts(b"/", (b"Cookie", sent)))


@pytest.mark.alone
def test_regular_expressions_have_no_slow_inputs() -> None:
    """A backtracking engine would not finish."""
    holds = Expressions().condition('user_agent.regex("^(([a-z])+.)+[A-Z]([a-z])+$") || user_agent.regex("(x+x+)+y")')
    seen = facts(b"/", (b"User-Agent", b"x" * 15_000))
    assert not holds(seen)
    assert_below(0.5, lambda: _seconds_of(lambda: holds(seen)))


def _seconds_of(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


# Any expression and any request.

MARKS = "true ( ) [ ] { } . , == && || ! in ? : + - ' \" r' ''' b'' \\ // 1 0x exists( x map(x, regex(' ip_in( has("
words = st.sampled_from([*NAMES, *MARKS.split(), '"a"', "\n"])


@given(text=st.one_of(st.text(max_size=30), st.lists(words, max_size=12).map("".join), st.lists(words).map(" ".join)))
@example(text="''''''")
@example(text="[].exists(")
@example(text="{}")
def test_no_text_raises_another_exception(text: str) -> None:
    expressions = Expressions(LISTS)
    try:
        expression = expressions.compile(text)
    except ExpressionError as error:
        message = str(error)
    else:
        message = ""
        assert expression.fields <= set(NAMES)
    assert re.match(r"line [0-9]+, column [0-9]+: .", message) or not message
    assert len(message.splitlines()) <= 1


targets = st.binary(max_size=40).map(lambda data: b"/?" + bytes(33 + b % 94 for b in data).replace(b"#", b""))
values = st.binary(max_size=30).map(lambda data: bytes(b for b in data if b >= 32 and b != 127).strip(b" "))
TEXTS = (
    'path.startsWith("/a") || raw_path.lower() == "/"',
    'query.exists(k, query[k].exists(v, v.regex("[0-9]") && int(v) > 3))',
    'headers["x-a"].size() > 3 && in_list(headers["x-a"], "office") || ip_in(headers["x-a"], "10.0.0.0/8")',
    'cookies["a"] == "b" || timestamp(cookies["t"]) < now',
    'subprotocols[0] == "mqtt" || extensions.exists(e, e.lower().contains("deflate"))',
    'double(user_agent) > 1.0 || duration(user_agent) > duration("1h") || origin.endsWith(host)',
    'query["i"][int(query["n"][0]) + 1] == string(int(query["m"][0]) * 3 / int(query["d"][0]))',
)
COMPILED = Expressions(LISTS)
ALL = [COMPILED.compile(text) for text in TEXTS]
SCOPE = COMPILED.scope(ALL)


@given(
    target=targets,
    added=st.lists(st.tuples(st.sampled_from([b"X-A", b"Cookie", b"User-Agent", b"Origin"]), values), max_size=5),
)
@example(target=b"/?n=1&i=1&i=2&i=3&m=9223372036854775807&d=0", added=[])
def test_no_request_raises_another_exception(target: bytes, added: list[Field]) -> None:
    try:
        context = SCOPE.context(facts(target, *added))
    except Refusal:
        return
    reasons: list[str] = []
    for expression in ALL:
        try:
            found = expression.evaluate(context)
        except EvaluationError as error:
            reasons.append(str(error))
        else:
            assert found in (True, False)
    assert all(map(str.isprintable, reasons))


def test_request_of_a_browser_is_evaluated() -> None:
    found = RequestReader().feed(request(RICH_FIELDS))
    assert found is not None
    assert evaluated(
        '"x-private" in headers && "chat" in subprotocols', gather(found, CONNECTION, strict_path=True, now=0)
    )
