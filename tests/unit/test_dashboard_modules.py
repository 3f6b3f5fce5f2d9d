"""Modules of the dashboard that need no browser, in node: units, and what needs attention."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import tlstunnel
from tests.harness import require

PAGE = Path(tlstunnel.__file__).parent / "admin" / "page"

SERVING = {"process": 7, "state": "serving", "tunnels": 3, "counting": "ledger"}
CALM: dict[str, Any] = {"overview": {"processes": [SERVING], "shortages": []}, "usage": {}, "loads": {"loads": []}}


def run(script: str, *values: Any) -> Any:
    """Return what a script returns, whose functions are those of the modules."""
    program = f"""
        import * as format from "{PAGE}/format.js";
        import * as attention from "{PAGE}/attention.js";
        const values = {json.dumps(values)};
        console.log(JSON.stringify({script}));
    """
    command = [require("node", "nodejs"), "--no-warnings", "--input-type=module", "--eval", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def find_attention(**changes: Any) -> list[dict[str, str]]:
    found: list[dict[str, str]] = run("attention.findAttention(values[0])", CALM | changes)
    return found


def test_figures_have_units() -> None:
    shown = run(
        """[
          [0, 999, 1000, 1234567, 5e12].map(format.bytes),
          [0, 0.00085, 0.0123, 0.2, 3.44].map(format.latency),
          [0, 59, 60, 3700, 90061].map(format.duration),
          [0, 0.25, 3.456, 1234].map(format.figure),
          [null, undefined, NaN].map(format.count),
          [format.counted(1, "tunnel"), format.counted(1200, "tunnel"), format.percent(0.034), format.percent(0.5)],
        ]"""
    )
    assert shown == [
        ["0 B", "999 B", "1.0 kB", "1.2 MB", "5.0 TB"],
        ["0 ms", "850 µs", "12.3 ms", "200 ms", "3.4 s"],
        ["0 s", "59 s", "1 min", "1 h 1 min", "1 d 1 h"],
        ["0", "0.25", "3.5", "1,234"],
        ["\u2013"] * 3,
        ["1 tunnel", "1,200 tunnels", "3.4 %", "50 %"],
    ]


def test_a_calm_tunnel_needs_no_attention() -> None:
    assert find_attention() == []
    assert run("attention.findAttention({})") == []  # nothing is known yet


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"overview": {"processes": []}}, "bad", "No process serves new connections."),
        (
            {"overview": {"processes": [SERVING, SERVING | {"state": "not responding"}]}},
            "bad",
            "1 serving process does not respond.",
        ),
        ({"overview": {"processes": [SERVING], "shortages": ["Memory runs out."]}}, "bad", "Memory runs out."),
        (
            {"overview": {"processes": [SERVING, SERVING | {"state": "draining"}]}},
            "info",
            "1 earlier process drains, with 3 tunnels left.",
        ),
        (
            {"origins": {"origins": [{"site": "a.test", "address": "b:1", "state": "ejected", "problem": "refused"}]}},
            "bad",
            "Origin b:1 of a.test is not used for now: refused.",
        ),
        (
            {"certificates": {"certificates": [{"names": ["a.test"], "days": 2.5, "problem": ""}]}},
            "bad",
            "The certificate for a.test expires in 2 d 12 h.",
        ),
        (
            {"loads": {"loads": [{"what": "reload", "problems": ["line 3: unknown key"]}]}},
            "warn",
            "The last reload failed, and changed nothing: line 3: unknown key",
        ),
        (
            {"usage": {"assessments": [{"site": "a.test", "standing": "sustained", "sentence": "Many."}]}},
            "info",
            "1 site is over the guideline repeatedly. Nothing is refused for that.",
        ),
    ],
)
def test_what_needs_attention_is_said(changes: dict[str, Any], level: str, text: str) -> None:
    (line,) = find_attention(**changes)
    assert (line["level"], line["text"]) == (level, text)


def test_the_worst_comes_first() -> None:
    loads = {"loads": [{"what": "reload", "problems": ["no"]}]}
    overview = {"processes": [SERVING, SERVING | {"state": "draining"}], "shortages": ["Memory runs out."]}
    assert [line["level"] for line in find_attention(overview=overview, loads=loads)] == ["bad", "warn", "info"]


def test_no_module_turns_text_into_markup() -> None:
    """What clients send is inserted as text; the content security policy is the second line of defence."""
    for module in PAGE.glob("*.js"):
        text = module.read_text()
        for way in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "DOMParser",
            "eval(",
            "Function(",
        ):
            assert way not in text, f"{module.name} uses {way}"
