"""The binding: results are those of libmodsecurity, and clients cannot forge them."""

import random
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.corpus.managed_rules import own_rules, require_crs, require_libmodsecurity, subject
from tlstunnel.config import SiteManagedRules
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.managed import modsecurity
from tlstunnel.firewall.managed.messages import Evaluation, Match, RuleSet, RuleSource, Subject
from tlstunnel.firewall.managed.modsecurity import MAX_MATCHES, MAX_TEXT, ModSecurity
from tlstunnel.firewall.managed.rule_sets import build

FORGED = (
    '" ) [file "/usr/share/x.conf"] [line "1"] [id "949110"] [rev ""] [msg "Total Score: 0"] [data ""] [severity "0"]'
)


@pytest.fixture(scope="module")
def library() -> ModSecurity:
    require_libmodsecurity()
    return ModSecurity()


@pytest.fixture(scope="module")
def crs(library: ModSecurity) -> int:
    require_crs()
    return library.load(build(SiteManagedRules(owasp_crs=True)))


def test_evaluation_has_score_rules_and_severity(library: ModSecurity, crs: int) -> None:
    found = library.evaluate(crs, subject("/?x=1'%20or%20'1'='1", "User-Agent: t"))
    assert found.score == 5
    assert [(match.id, match.severity) for match in found.matches] == [(942100, 2)]
    assert found.matches[0].message == "SQL Injection Attack Detected via libinjection"
    assert "found within ARGS:x: 1' or '1'='1" in found.matches[0].data
    assert (found.denied_by, found.status) == (0, 0)


def test_evaluations_are_independent(library: ModSecurity, crs: int) -> None:
    library.evaluate(crs, subject("/?x=<script>alert(1)</script>"))
    assert library.evaluate(crs, subject("/?x=1", "User-Agent: t")) == Evaluation(0)


@pytest.mark.parametrize(
    "target",
    [
        f"/?{quote(FORGED, safe='')}=<script>",
        f"/?x=<script>{quote(FORGED, safe='')}",
        f"/{quote(FORGED, safe='')}?x=<script>",
        f"/?{quote(FORGED, safe='')}=<script>{quote(FORGED, safe='')}",
    ],
)
def test_client_cannot_forge_matches(library: ModSecurity, crs: int, target: str) -> None:
    """The line contains the path and an argument's name and value unescaped, with quotes."""
    found = library.evaluate(crs, subject(target, f"User-Agent: t {FORGED}"))
    assert found.score >= 5
    assert {match.id for match in found.matches} & {941100, 941110}
    assert all(910_000 < match.id < 949_000 for match in found.matches)


def test_denying_rule_is_named_with_its_status(library: ModSecurity, tmp_path: Path) -> None:
    loaded = library.load(
        build(own_rules(tmp_path, 'SecRule ARGS:x "@streq a" "id:12,phase:2,deny,status:451,msg:\'no\',severity:3"\n'))
    )
    found = library.evaluate(loaded, subject("/?x=a"))
    assert found == Evaluation(0, (Match(12, "no", 3, ""),), denied_by=12, status=451)
    assert library.evaluate(loaded, subject("/?x=b")) == Evaluation(0)


def test_redirect_and_drop_deny_too(library: ModSecurity, tmp_path: Path) -> None:
    rules = (
        'SecRule ARGS:x "@streq a" "id:1,phase:1,redirect:https://example.com/,log"\n'
        'SecRule ARGS:x "@streq b" "id:2,phase:1,drop,log"\n'
    )
    loaded = library.load(build(own_rules(tmp_path, rules)))
    assert library.evaluate(loaded, subject("/?x=a")).denied_by == 1
    assert library.evaluate(loaded, subject("/?x=b")).denied_by == 2


def test_evaluation_is_bounded(library: ModSecurity, tmp_path: Path) -> None:
    rule = "SecRule ARGS \"@rx (.*)\" \"id:{0},phase:2,pass,log,msg:'{1}',logdata:'%{{MATCHED_VAR}}'\"\n"
    rules = "".join(rule.format(number, "m" * 1000) for number in range(1, 100))
    loaded = library.load(build(own_rules(tmp_path, rules)))
    target = "/?" + "&".join(f"a{number}={number}{'x' * 100}" for number in range(60))
    found = library.evaluate(loaded, subject(target))
    assert len(found.matches) == MAX_MATCHES
    assert all(len(match.message) <= MAX_TEXT + 3 and len(match.data) <= MAX_TEXT + 3 for match in found.matches)


def test_rule_sets_are_independent(library: ModSecurity, crs: int, tmp_path: Path) -> None:
    own = library.load(build(own_rules(tmp_path, 'SecRule ARGS:x "@streq a" "id:1,phase:2,deny"\n')))
    assert library.evaluate(crs, subject("/?x=a", "User-Agent: t")) == Evaluation(0)
    assert library.evaluate(own, subject("/?x=a")).denied_by == 1
    assert library.evaluate(own, subject("/?x=<script>")) == Evaluation(0)


@pytest.mark.parametrize("ip", ["203.0.113.7", "2001:db8::1", ""])
def test_addresses_reach_the_rules(library: ModSecurity, tmp_path: Path, ip: str) -> None:
    rules = 'SecRule REMOTE_ADDR "@ipMatch 203.0.113.0/24,2001:db8::/32" "id:1,phase:1,deny"\n'
    loaded = library.load(build(own_rules(tmp_path, rules)))
    assert library.evaluate(loaded, subject("/", ip=ip)).denied_by == (1 if ip else 0)


def test_load_error_names_the_file(library: ModSecurity, tmp_path: Path) -> None:
    path = tmp_path / "own.conf"
    path.write_text('SecRule ARGS "@pmFromFile nowhere.txt" "id:1,phase:2,deny"\n')
    with pytest.raises(ConfigurationError) as caught:
        library.load(RuleSet("", (RuleSource(file=str(path)),)))
    assert str(caught.value).startswith(f"{path}: libmodsecurity cannot load it: ")
    assert "nowhere.txt" in str(caught.value)
    assert "/./" not in str(caught.value)
    assert "//" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="tlstunnel's own settings: libmodsecurity cannot load it"):
        library.load(RuleSet("", (RuleSource(text="SecNonsense\n"),)))


def test_missing_library_is_named_with_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modsecurity, "LIBRARY", "libmodsecurity.so.none")
    with pytest.raises(ConfigurationError, match="install Debian's packages libmodsecurity3 and modsecurity-crs"):
        ModSecurity()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    target=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40),
    value=st.binary(max_size=40).map(lambda raw: raw.replace(b"\0", b"")),
)
def test_any_request_is_evaluated(library: ModSecurity, crs: int, target: str, value: bytes) -> None:
    fields = ((b"Host", b"a"), (b"Cookie", value), (b"X-Own", value))
    found = library.evaluate(crs, Subject("203.0.113.7", f"/{target}".encode(), fields))
    assert found.score >= 0
    assert found.denied_by == 0


def test_mark_leads_to_the_same_file_and_cannot_be_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.conf").write_text("x")
    marks = {modsecurity.make_mark() for _ in range(100)}
    assert len(marks) == 100
    for mark in random.sample(sorted(marks), 5):
        assert Path(f"{tmp_path}{mark}/a.conf").read_text() == "x"
