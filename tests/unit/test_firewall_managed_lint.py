"""Faulty rules of users that libmodsecurity would load silently, and that would never match."""

import ctypes
from pathlib import Path

import pytest

from tests.corpus.managed_rules import require_crs
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.managed import lint
from tlstunnel.firewall.managed.rule_sets import DEBIAN_CRS

RULE = 'SecRule ARGS "@rx evil" "id:1,phase:2,deny"\n'


def fault(folder: Path, text: str | bytes, known: dict[int, str] | None = None) -> str:
    """Return the problems of a file, without its path."""
    path = folder / "own.conf"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError) as caught:
        lint.check([path], known or {})
    assert str(caught.value).startswith(f"{path}:")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}:")


@pytest.mark.parametrize(
    "text",
    [
        "",
        '# a comment with "a quote\n\n   # and another\n',
        RULE,
        RULE.replace("\n", "\r\n"),
        'SecRule ARGS:x "evil" "id:1,phase:2,deny"\n',
        'SecRule ARGS:x "!@rx ^[a-z]+$" "id:1,phase:2,deny"\n',
        'SecRule ARGS:x "! @streq a" "id:1,phase:2,deny"\n',
        'SecRule ARGS|!ARGS:y "@PmFromFile words.txt" \\\n    "id:1,\\\n    phase:2,\\\n    deny"\n',
        "SecRule ARGS \"@rx a\\\"b\" \"id:1,phase:2,deny,msg:'it \\'is\\', so',logdata:'%{MATCHED_VAR}'\"\n",
        'SecRule ARGS "@rx (?<name>a)(?=b)(?>c)\\p{L}" "id:1,phase:2,deny"\n',
        'SecRule ARGS "@rx ^%{tx.pattern}(" "id:1,phase:2,deny"\n',
        'SecRule ARGS "@eq 1" "id:1,phase:2,deny,chain"\n  SecRule ARGS "@eq 2" "chain"\n  SecRule ARGS "@eq 3"\n',
        "SecAction \"id:1,phase:1,pass,nolog,setvar:tx.a=1,setvar:'tx.b=a,b'\"\n",
        "SecRuleRemoveById 942100 942110\nSecMarker END\n",
        "SecRule ARGS @detectSQLi id:1,phase:2,deny\n",
    ],
)
def test_good_rules_pass(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.conf"
    path.write_bytes(text.encode())
    lint.check([path], {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RULE + 'SecRule ARGS "@rx a(b" "id:2,phase:2,deny"\n', '2: the regular expression "a(b" does not compile'),
        ('SecRule ARGS "[z-a]" "id:2,phase:2,deny"\n', '1: the regular expression "[z-a]" does not compile'),
        ('SecRule ARGS "!@rx *" "id:2,phase:2,deny"\n', "quantifier does not follow a repeatable item at character 0"),
        ('SecRule ARGS "@contians a" "id:1,deny"\n', '1: there is no operator "@contians"; did you mean @contains?'),
        ('SecRule ARGS "@zzzzzz a" "id:1,deny"\n', "see the ModSecurity reference manual"),
        ('\n\nSecRule ARGS "@rx a "id:1,phase:2,deny"\n', "3: a quote is not closed"),
        ('SecRule ARGS "@rx a" "id:1,phase:2,deny\n' + RULE, "1: a quote is not closed"),
        ('SecRule ARGS "@rx a" "id:1,msg:\'a,deny"\n', '1: a quote is not closed at "msg:\'a,deny"'),
        ('SecRule ARGS "@rx a" "id:1,phase:2,deny,chain"\n', "1: the chain has no next rule"),
        ('SecRule ARGS "@eq 1" "id:1,chain"\nSecRule ARGS "@eq 2" "chain"\n', "2: the chain has no next rule"),
        ('SecRule ARGS "@eq 1" "id:1,chain"\nSecAction "id:2,pass"\n', "1: the chain has no next rule"),
        ('SecRule ARGS "@rx a" "phase:2,deny"\n', "1: the rule has no id"),
        ('SecRule ARGS "@rx a"\n', "1: the rule has no id"),
        ('SecRule ARGS "@rx a" "id:0,deny"\n', "1: the rule has no id"),
        ('SecRule ARGS "@rx a" "id:one,deny"\n', "1: the rule has no id"),
        ('SecAction "phase:1,pass"\n', "1: the rule has no id"),
        (RULE + "\n" + RULE, "3: the id 1 is already used by "),
        ('SecRule ARGS "@rx a" "id:942100,deny"\n', "1: the id 942100 is already used by CRS"),
        ("SecRule ARGS\n", "1: expected SecRule VARIABLES"),
        ('SecRule ARGS "@rx a" "id:1,deny" "x"\n', "1: expected SecRule VARIABLES"),
        ("SecRemoteRules key https://rules.example/\n", "1: secremoterules: rules cannot be fetched"),
        ("Include other.conf\n", "1: include: included files are not checked"),
        ('SecRule REMOTE_ADDR "@rbl rbl.example" "id:1,deny"\n', "1: @rbl: a rule cannot ask the network"),
        ('SecRule ARGS "@inspectFile /x.lua" "id:1,deny"\n', "1: @inspectFile: rules cannot run programs"),
        ('SecRule ARGS "@rx a" "id:1,phase:2,exec:/bin/true"\n', "1: exec: rules cannot run programs"),
        (RULE.rstrip(), "1: the last line has no newline; add one"),
        (b"# \xff\n", " the file is not UTF-8"),
        (b"#" * (lint.MAX_FILE + 1), f" has more than {lint.MAX_FILE} bytes"),
    ],
)
def test_fault_is_named_with_its_line(text: str | bytes, said: str, tmp_path: Path) -> None:
    assert said in fault(tmp_path, text, {942100: "CRS"})


def test_id_of_another_file_is_named_with_its_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a.conf", tmp_path / "b.conf"
    first.write_text("\n" + RULE)
    second.write_text(RULE)
    with pytest.raises(ConfigurationError, match=f"{second}:1: the id 1 is already used by {first}:2; choose another"):
        lint.check([first, second], {})


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        lint.check([tmp_path / "none.conf"], {})


def test_missing_library_is_named_with_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    lint._load_pcre2.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    (tmp_path / "own.conf").write_text('SecRule ARGS "@rx only here" "id:1,deny"\n')
    with pytest.raises(ConfigurationError, match="install Debian's package libmodsecurity3"):
        lint.check([tmp_path / "own.conf"], {})


def test_crs_has_no_faults() -> None:
    """5 000 lines by experts: a fault found there would be a fault of the check."""
    require_crs()
    files = sorted((DEBIAN_CRS / "rules").glob("REQUEST-*.conf"))
    lint.check([file for file in files if "IP-REPUTATION" not in file.name], {})  # that one asks the DNS


def test_all_faults_of_all_files_are_reported(tmp_path: Path) -> None:
    first, second = tmp_path / "a.conf", tmp_path / "b.conf"
    first.write_text('SecRule ARGS "@nothing x" "id:1,phase:1,deny"\nSecRemoteRules x y\n')
    second.write_text('SecRule ARGS "@rx (" "id:2,phase:1,deny,chain"\nSecRule ARGS "@rx x" "t:none"\n')
    with pytest.raises(ConfigurationError) as caught:
        lint.check([first, second], {})
    assert [problem.partition(": ")[0] for problem in caught.value.problems] == [
        f"{first}:1",
        f"{first}:2",
        f"{second}:1",
    ]
