"""`tlstunnel firewall explain`: the result of every check and rule, and the verdict."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from click.testing import CliRunner, Result

from tests.corpus.managed_rules import require_crs
from tlstunnel.cli import main
from tlstunnel.cli.firewall import command

POLICY = """
trusted_proxies = ["10.0.0.0/8"]
block_addresses = ["203.0.113.0/24"]
lists.rooms = ["/attic"]

[[rules]]
name = "no admins"
when = 'path.startsWith("/admin")'
action = "block"

[[sites]]
names = ["chat.example", "*.chat.example"]
origins = ["localhost:3000"]
block_addresses = ["198.51.100.7"]
web_origins = ["same"]

[[sites.rules]]
name = "rooms"
when = 'in_list(path, "rooms") && "debug" in query'
action = "log"

[[sites.rules]]
name = "a header"
when = 'headers["x-key"] == "1"'
action = "allow"

[[sites.routes]]
path = "/ws/"
origins = ["localhost:3002", "unix:/run/ws.sock"]

[[sites.rate_limits]]
name = "each"
limit = "1/hour"

[[sites]]
names = ["other.example"]
origins = ["localhost:3001"]
web_origins = []
"""


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    yield
    structlog.reset_defaults()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "t.toml"
    file.write_text(POLICY)
    return file


def explain(file: Path, request: str, *options: str) -> Result:
    return CliRunner().invoke(command, ["explain", request, "--config", str(file), *options])


def explain_json(file: Path, request: str, *options: str) -> dict[str, Any]:
    result = explain(file, request, "--json", *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def lines(file: Path, request: str, *options: str) -> list[str]:
    result = explain(file, request, *options)
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_every_check_of_a_request_that_passes(file: Path) -> None:
    found = lines(file, "GET /attic/?debug=1", "--header", "Origin: https://chat.example")
    assert [re.sub(r"headers={.*}", "headers={...}", line) for line in found] == [
        "site chat.example",
        "target the path is /attic/",
        "addresses of all sites allowed",
        "addresses of the site allowed",
        "web origin https://chat.example is allowed",
        "rules no rule decided",
        "no admins: not matched (block); path='/attic/'",
        "rooms: not matched (log); path='/attic/', query={'debug': ['1']}",
        'a header: failed: there is no key "x-key" (allow); headers={...}',
        "rate limits within all limits",
        "each: within the limit; ip=127.0.0.1",
        "managed rules nothing to check",
        "verdict pass",
        "origins localhost:3000",
    ]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ((), "web origin no Origin field, so the client is not a web page: allowed"),
        (("--header", "Origin: https://chat.example"), "web origin https://chat.example is allowed"),
        (("--header", "Origin: null"), "web origin pages of this web origin may not connect"),
        (("--header", "Origin: null", "--plain"), "web origin not checked: only handshakes are"),
    ],
)
def test_the_web_origin(file: Path, options: tuple[str, ...], shown: str) -> None:
    file.write_text(POLICY.replace('names = ["chat', 'http = "pass"\nnames = ["chat'))
    assert shown in lines(file, "GET /", *options)


def test_the_route_and_its_origins(file: Path, tmp_path: Path) -> None:
    assert lines(file, "GET /%77s/a")[-2:] == ["route /ws/", "origins localhost:3002, unix:/run/ws.sock"]
    found = explain_json(file, "GET /ws/")
    assert (found["route"], found["origins"]) == ("/ws/", ["localhost:3002", "unix:/run/ws.sock"])
    found = explain_json(file, "GET /ws")
    assert (found["route"], found["origins"], found["worker"]) == ("", ["localhost:3000"], "")
    (tmp_path / "worker.py").write_text("async def fetch(request, env):\n    return request\n")
    file.write_text(POLICY.replace('names = ["chat', 'worker = "worker.py:fetch"\nnames = ["chat'))
    assert lines(file, "GET /")[-1].endswith("worker.py:fetch, which may choose another origin, or refuse")


def test_checks_that_were_not_reached_are_marked(file: Path) -> None:
    found = lines(file, "GET /", "--header", "Origin: https://evil.example")
    assert found[-5:-1] == [
        "rules not reached",
        "rate limits not reached",
        "managed rules not reached",
        "verdict 403 Forbidden: web origin not allowed",
    ]


@pytest.mark.parametrize(
    ("request_line", "options", "status", "reason", "checks"),
    [
        ("GET /%2e%2fx", (), 400, "ambiguous target", ["target"]),
        (
            "GET /",
            ("--ip", "203.0.113.9"),
            403,
            "address blocked",
            ["target", "addresses of all sites", "addresses of the site", "web origin"],
        ),
        (
            "GET /",
            ("--ip", "198.51.100.7"),
            403,
            "address blocked",
            ["target", "addresses of all sites", "addresses of the site", "web origin"],
        ),
        ("GET /%61dmin", (), 403, "rule", ["rules"]),
        ("POST /", (), 405, "method", []),
        ("GET /", ("--header", "Host: unknown.example"), 421, "misdirected", []),
    ],
)
def test_each_refusal_in_json(  # noqa: PLR0917
    file: Path, request_line: str, options: tuple[str, ...], status: int, reason: str, checks: list[str]
) -> None:
    found = explain_json(file, request_line, *options)
    assert (found["verdict"], found["status"]) == ("refused", status)
    assert found["reason"].startswith(reason), found
    assert [check["name"] for check in found["checks"]][-len(checks) or 99 :] == checks


def test_a_rule_that_matches_is_named_with_the_values_it_read(file: Path) -> None:
    found = explain_json(file, "GET /attic?debug=a&debug=b", "--header", "X-Key: 1")
    (rules,) = (check for check in found["checks"] if check["name"] == "rules")
    assert [entry["rule"] for entry in rules["entries"]] == ["no admins", "rooms", "a header"]
    assert [entry["result"] for entry in rules["entries"]] == ["not matched", "matched", "matched"]
    assert rules["entries"][1]["values"] == {"path": "/attic", "query": {"debug": ["a", "b"]}}
    assert (found["verdict"], found["rule"]) == ("pass", "a header")


def test_the_host_field_chooses_the_site(file: Path) -> None:
    assert explain_json(file, "GET /", "--header", "Host: a.chat.example:8443")["site"] == "chat.example"
    found = explain_json(file, "GET /", "--header", "Host: other.example", "--header", "Origin: https://x.example")
    assert (found["site"], found["reason"]) == ("other.example", "web origin not allowed")


def test_parts_of_the_request_are_escaped(file: Path) -> None:
    result = explain(file, "GET /%1b[31m", "--header", "X-Key: \x1b")
    assert "\x1b" not in result.stdout


def test_managed_rules_with_their_score(tmp_path: Path) -> None:
    require_crs()
    file = tmp_path / "t.toml"
    file.write_text(
        '[[sites]]\nnames = ["chat.example"]\norigins = ["localhost:3000"]\n'
        '[sites.managed_rules]\nowasp_crs = true\ntimeout = "10s"\n'
    )
    attack = "GET /?id=1%27%20UNION%20SELECT%20password%20FROM%20users--"
    found = lines(file, attack)
    (place,) = (number for number, line in enumerate(found) if line.startswith("managed rules score "))
    assert any(line.endswith("SQL Injection Attack Detected via libinjection") for line in found[place:])
    assert "SQL injection" in found[place + 1]
    assert found[-2] == "verdict 403 Forbidden: managed rules"
    (check,) = (check for check in explain_json(file, attack)["checks"] if check["name"] == "managed rules")
    assert all(entry["id"] and entry["message"] for entry in check["entries"])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["GET /", "--config", "none.toml"], 1, "none.toml"),
        (["GET /", "--config", "{empty}"], 1, "no [[sites]]"),
        (["GET /", "--config", "{wrong}"], 1, 'did you mean "path"?'),
        (["GET", "--config", "{file}"], 2, "a method and a target"),
        (["GET /", "--config", "{file}", "--header", "nonsense"], 2, "'nonsense' is not a header field"),
        (["GET /", "--config", "{file}", "--ip", "300.1.1.1"], 2, "'300.1.1.1' is not an IP address"),
    ],
)
def test_errors_of_the_request_or_the_configuration(  # noqa: PLR0917
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    (tmp_path / "empty.toml").write_text("")
    (tmp_path / "wrong.toml").write_text(POLICY.replace("path.startsWith", "pth.startsWith"))
    places = {"file": file, "empty": tmp_path / "empty.toml", "wrong": tmp_path / "wrong.toml"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["tlstunnel", "firewall", "explain", *(text.format(**places) for text in arguments)]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    assert caught.value.code == status
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err
