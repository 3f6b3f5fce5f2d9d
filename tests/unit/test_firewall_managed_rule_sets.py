"""The rule set of a site: Debian's CRS, the folder of a release, own rules, and what is refused."""

import re
import shutil
from pathlib import Path

import pytest

from tests.corpus import corpus
from tests.corpus.managed_rules import (
    UNHURRIED,
    categories,
    evaluate_samples,
    own_rules,
    plain_request,
    require_crs,
    rule_ids,
)
from tlstunnel.config import SiteManagedRules
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.managed import rule_sets
from tlstunnel.firewall.managed.messages import RuleSet
from tlstunnel.firewall.managed.profiles import PROFILES
from tlstunnel.firewall.managed.rule_sets import DEBIAN_CRS, DEBIAN_SETUP, build

# Names that differ between versions 3 and 4.
NEW_NAMES = {
    "executing_paranoia_level": "detection_paranoia_level",
    "paranoia_level": "blocking_paranoia_level",
    "inbound_anomaly_score_threshold": "inbound_anomaly_score_threshold",
    "inbound_anomaly_score": "detection_inbound_anomaly_score",
    "anomaly_score_pl": "inbound_anomaly_score_pl",
    "anomaly_score": "blocking_inbound_anomaly_score",
}
_OLD_NAME = re.compile(rf"(?<=tx[.:])({'|'.join(NEW_NAMES)})", re.IGNORECASE)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder like that of a CRS 4 release, with its names of variables, made from Debian's CRS 3."""
    require_crs()
    folder = tmp_path / "coreruleset-4.0.0"
    shutil.copytree(DEBIAN_CRS / "rules", folder / "rules")
    shutil.copy(DEBIAN_SETUP / "crs-setup.conf", folder / "crs-setup.conf.example")
    (folder / "plugins").mkdir()
    for name in ("empty-config.conf", "empty-before.conf", "empty-after.conf"):
        (folder / "plugins" / name).write_text("# nothing\n")
    for path in (folder / "rules").glob("*.conf"):
        text = _OLD_NAME.sub(lambda match: NEW_NAMES[match[1].lower()], path.read_text())
        path.write_text(text.replace(".webinfo/ ", ".webinfo/ .ws/ "))
    return folder


def files(rule_set: RuleSet) -> list[str]:
    return [Path(source.file).name for source in rule_set.sources if source.file]


def sample(target: str, *headers: str) -> corpus.Sample:
    return corpus.Sample("it", "", plain_request(target, "User-Agent: test/1", *headers))


def score(settings: SiteManagedRules, target: str, *headers: str) -> int:
    return evaluate_samples([sample(target, *headers)], settings)["it"].score


def test_debian_files_are_in_order() -> None:
    require_crs()
    found = files(build(SiteManagedRules(owasp_crs=True)))
    assert found[0] == "crs-setup.conf"
    assert found.index("REQUEST-900-EXCLUSION-RULES-BEFORE-CRS.conf") < found.index("REQUEST-901-INITIALIZATION.conf")
    assert found[found.index("REQUEST-901-INITIALIZATION.conf") + 1] == "log4shell.conf"
    assert found[-1] == "RESPONSE-999-EXCLUSION-RULES-AFTER-CRS.conf"
    assert found[-2] == "REQUEST-949-BLOCKING-EVALUATION.conf"
    assert not any(name.startswith("RESPONSE-95") for name in found)


def test_only_equal_settings_have_equal_names() -> None:
    require_crs()
    names = [
        build(settings).name
        for settings in (
            SiteManagedRules(owasp_crs=True),
            SiteManagedRules(owasp_crs=True, paranoia=2),
            SiteManagedRules(owasp_crs=True, exclude=(942100,)),
            SiteManagedRules(owasp_crs=True, profiles=("nextjs",)),
        )
    ]
    assert len(set(names)) == 4
    # Settings that the tunnel itself applies are not part of what is loaded.
    same = SiteManagedRules(owasp_crs=True, mode="log", threshold=10, timeout=UNHURRIED, on_failure="allow")
    assert build(same).name == names[0]


def test_release_folder_evaluates_like_debian(release: Path) -> None:
    attacks = [attack for attack in corpus.attacks() if "Log4Shell" not in attack.name][::4]
    debian = evaluate_samples(attacks, SiteManagedRules(owasp_crs=True, paranoia=2, timeout=UNHURRIED))
    other = evaluate_samples(attacks, SiteManagedRules(owasp_crs=True, paranoia=2, crs=release, timeout=UNHURRIED))
    assert {name: found.score for name, found in other.items()} == {name: found.score for name, found in debian.items()}
    assert {name: rule_ids(found) for name, found in other.items()} == {
        name: rule_ids(found) for name, found in debian.items()
    }


def test_release_folder_is_loaded_with_its_plugins(release: Path) -> None:
    (release / "rules" / "REQUEST-999-WITH-OWN.conf").write_text("# later\n")
    found = files(build(SiteManagedRules(owasp_crs=True, crs=release)))
    assert found[:3] == ["crs-setup.conf.example", "empty-config.conf", "empty-before.conf"]
    assert found[-2:] == ["REQUEST-999-WITH-OWN.conf", "empty-after.conf"]
    (release / "crs-setup.conf").write_text((release / "crs-setup.conf.example").read_text())
    assert files(build(SiteManagedRules(owasp_crs=True, crs=release)))[0] == "crs-setup.conf"


def test_firebase_passes_a_release_that_forbids_the_extension_ws(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SiteManagedRules(owasp_crs=True, crs=release, timeout=UNHURRIED)
    assert score(settings, "/.ws?v=5&ns=demo-default-rtdb") == 0
    assert score(settings, "/x.sql?v=5") >= 5
    monkeypatch.setattr(rule_sets, "_allow_extensions", lambda _: [])
    assert score(settings, "/.ws?v=5&ns=demo-default-rtdb") >= 5


def test_early_blocking_of_the_setup_file_hides_nothing(release: Path) -> None:
    """With a threshold of 1, a score of the first phase would end the evaluation."""
    setup = (release / "crs-setup.conf.example").read_text()
    early = 'SecAction "id:900120,phase:1,nolog,pass,setvar:tx.early_blocking=1,setvar:tx.paranoia_level=4"\n'
    (release / "crs-setup.conf").write_text(setup + early)
    settings = SiteManagedRules(owasp_crs=True, crs=release, timeout=UNHURRIED)
    assert score(settings, "/?x=1%20UNION%20SELECT%20a,b%20FROM%20users--", "Proxy: x") >= 10


@pytest.mark.parametrize("paranoia", [1, 2, 3, 4])
def test_paranoia_follows_the_settings(paranoia: int) -> None:
    require_crs()
    settings = SiteManagedRules(owasp_crs=True, paranoia=paranoia, timeout=UNHURRIED)
    target = (
        "/signalr/connect?connectionData=%5B%7B%22name%22%3A%22chathub%22%7D%2C%7B%22name%22%3A%22orderhub%22%7D%5D"
    )
    assert [found >= 5 for found in (0, 20, 25, 30)][paranoia - 1] == (score(settings, target) >= 5)


def test_every_profile_loads_alone_and_all_together() -> None:
    require_crs()
    for profiles in [*((name,) for name in PROFILES), tuple(PROFILES)]:
        settings = SiteManagedRules(owasp_crs=True, profiles=profiles, timeout=UNHURRIED)  # type: ignore[arg-type]
        assert score(settings, "/?x=<script>alert(1)</script>") >= 5


def test_nextjs_profile(release: Path) -> None:
    """CRS 4 takes the brackets of a page for a shell pattern. CRS 3 does not, so the test adds such a rule."""
    rules = release / "rules" / "REQUEST-932-APPLICATION-ATTACK-RCE.conf"
    rule = (
        "SecRule ARGS \"@rx /\\[[^]]+\\]\" \"id:932999,phase:2,block,log,msg:'Shell pattern',tag:'attack-rce',"
        "severity:'CRITICAL',setvar:'tx.inbound_anomaly_score_pl1=+5'\"\n"
    )
    rules.write_text(rule + rules.read_text())
    handshake = "/_next/webpack-hmr?page=%2Fblog%2F%5Bslug%5D"
    plain = SiteManagedRules(owasp_crs=True, crs=release, timeout=UNHURRIED)
    assert score(plain, handshake) == 5
    nextjs = SiteManagedRules(owasp_crs=True, crs=release, profiles=("nextjs",), timeout=UNHURRIED)
    assert score(nextjs, handshake) == 0
    assert score(nextjs, "/?x=/blog/[slug]") == 5


OWN = """\
SecRule ARGS:x "@streq deny" "id:1001,phase:2,deny,status:429,msg:'denied'"
SecRule ARGS:x "@streq early" "id:1002,phase:1,deny"
SecRule ARGS:x "@streq score" "id:1003,phase:2,pass,log,msg:'scored',severity:2,setvar:tx.anomaly_score_pl1=+7"
SecRule ARGS:x "@streq trusted" "id:1004,phase:1,pass,nolog,ctl:ruleRemoveById=942100"
SecRule ARGS:x "@streq allow" "id:1005,phase:1,allow,nolog"
SecRule ARGS:x "@streq odd" "id:1006,phase:2,deny,status:200"
SecRuleEngine Off
"""


def test_own_rules_with_crs_deny_score_exclude_and_allow(tmp_path: Path) -> None:
    require_crs()
    own = tmp_path / "own.conf"
    own.write_text(OWN)
    settings = SiteManagedRules(owasp_crs=True, rules=str(tmp_path / "*.conf"), timeout=UNHURRIED)
    injection = "&y=1'%20or%20'1'='1"
    requests = {
        "deny": "/?x=deny",
        "early": "/?x=early",
        "score": "/?x=score",
        "trusted": "/?x=trusted" + injection,
        "allow": "/?x=allow" + injection,
        "odd": "/?x=odd",
        "attack": "/?x=other" + injection,
        "ordinary": "/?x=other",
    }
    samples = [corpus.Sample(name, "", plain_request(target, "User-Agent: t")) for name, target in requests.items()]
    found = evaluate_samples(samples, settings)
    statuses = {name: outcome.refusal.status if outcome.refusal else 101 for name, outcome in found.items()}
    assert statuses == {
        "deny": 429,
        "early": 403,
        "score": 403,
        "trusted": 101,
        "allow": 101,
        "odd": 403,
        "attack": 403,
        "ordinary": 101,
    }
    assert found["deny"].denied_by == 1001
    assert categories(found["deny"]) == ("own rule",)
    assert found["score"].score == 7


def test_own_rules_alone_block(tmp_path: Path) -> None:
    require_crs()
    settings = own_rules(tmp_path, 'SecRule ARGS:x "@streq a" "id:7,phase:2,block,msg:\'no\'"\n')
    found = evaluate_samples([sample("/?x=a")], settings)["it"]
    assert found.refusal is not None
    assert found.refusal.status == 403
    assert evaluate_samples([sample("/?x=b")], settings)["it"].refusal is None
    excluded = SiteManagedRules(rules=settings.rules, exclude=(7,), timeout=UNHURRIED)
    assert evaluate_samples([sample("/?x=a")], excluded)["it"].refusal is None


def test_own_rules_may_not_use_ids_of_crs_or_of_the_tunnel(tmp_path: Path) -> None:
    require_crs()
    path = tmp_path / "own.conf"
    for number, taken in ((942100, "REQUEST-942-APPLICATION-ATTACK-SQLI.conf"), (99_900_001, "tlstunnel's own")):
        path.write_text(f'SecAction "id:{number},phase:1,pass"\n')
        with pytest.raises(ConfigurationError, match=f"{path}:1: the id {number} is already used by {taken}"):
            build(SiteManagedRules(owasp_crs=True, rules=str(path)))


def test_missing_files_are_reported_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(settings: SiteManagedRules) -> str:
        with pytest.raises(ConfigurationError) as caught:
            build(settings)
        return str(caught.value)

    assert said(SiteManagedRules()) == 'there are no rules; write owasp_crs = true, or rules = "FILES"'
    assert said(SiteManagedRules(rules=str(tmp_path / "*.conf"))).endswith('*.conf" matches no file')
    folder = tmp_path / "crs"
    assert f'crs: "{folder}" is not a folder' in said(SiteManagedRules(owasp_crs=True, crs=folder))
    (folder / "rules").mkdir(parents=True)
    assert "is not the folder of a CRS release; install Debian's package modsecurity-crs" in said(
        SiteManagedRules(owasp_crs=True, crs=folder)
    )
    (folder / "rules" / "REQUEST-901-INITIALIZATION.conf").write_text("")
    assert "has neither crs-setup.conf nor crs-setup.conf.example" in said(SiteManagedRules(owasp_crs=True, crs=folder))
    monkeypatch.setattr(rule_sets, "DEBIAN_CRS", tmp_path / "none")
    assert "install Debian's package modsecurity-crs, or set crs to the folder" in said(
        SiteManagedRules(owasp_crs=True)
    )


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        build(SiteManagedRules(owasp_crs=True, crs=tmp_path / "crs", rules=str(tmp_path / "*.conf")))
    crs, rules = caught.value.problems
    assert crs.startswith("crs: ")
    assert rules.startswith("rules: ")
