"""What several processes and machines count together."""

from pathlib import Path

import pytest

from tlstunnel.config import decode
from tlstunnel.config.together import counts_together, keeps_history, list_limits, shares_notices

SITE = "[[sites]]\norigins = ['localhost:1']\n"
FULL = "{ address = 'localhost:2', max_tunnels = 5 }"
LIMIT = "name = 'a'\nlimit = '1/minute'\n"


@pytest.mark.parametrize(
    ("text", "limits", "together"),
    [
        (SITE, [], False),
        (f"[[rate_limits]]\n{LIMIT}{SITE}", [("rate_limits", 0)], True),
        (f"{SITE}[[sites.rate_limits]]\n{LIMIT}", [("sites", 0, "rate_limits", 0)], True),
        (f"[[sites]]\norigins = [{FULL}]", [("sites", 0, "origins", 0, "max_tunnels")], True),
        (
            f"{SITE}[[sites.routes]]\npath = '/a'\norigins = ['localhost:1', {FULL}]",
            [("sites", 0, "routes", 0, "origins", 1, "max_tunnels")],
            True,
        ),
        ("[[sites]]\norigins = ['localhost:1', 'localhost:2']", [], True),
        (f"{SITE}balance = 'least_tunnels'", [], False),
    ],
)
def test_what_is_counted_together(text: str, limits: list[tuple[str | int, ...]], together: bool) -> None:
    config = decode(text, Path(), "t.toml")
    assert list(list_limits(config)) == limits
    assert counts_together(config) == together


@pytest.mark.parametrize(
    ("text", "environ", "kept"),
    [
        (SITE, {}, False),
        (SITE, {"STATE_DIRECTORY": ""}, False),
        (SITE, {"STATE_DIRECTORY": "/var/lib/tlstunnel"}, True),
        (f"[state]\ndir = '/var/lib/tlstunnel'\n{SITE}", {}, True),
        (f"[usage]\ntolerance = 20\n{SITE}", {}, True),
        (f"{SITE}plan = 'pro'", {}, True),
        (f"{SITE}guideline = 5", {}, True),
    ],
)
def test_when_a_history_is_kept(text: str, environ: dict[str, str], kept: bool) -> None:
    assert keeps_history(decode(text, Path(), "t.toml"), environ) == kept


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        (f"{SITE}guideline = 5", False),
        (f"state.url = 'valkey://localhost'\n{SITE}", False),
        (f"state.url = 'valkey://localhost'\n{SITE}guideline = 5", True),
        (f"state.url = 'valkey://localhost'\n{SITE}plan = 'free'", True),
    ],
)
def test_whether_one_of_several_machines_has_to_send(text: str, shared: bool) -> None:
    assert shares_notices(decode(text, Path(), "t.toml")) == shared
