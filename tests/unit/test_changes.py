"""The changes that a reload reports."""

from pathlib import Path

import pytest

from tlstunnel.config import Config, decode
from tlstunnel.serving.changes import describe_changes

SITE = '[[sites]]\norigins = ["localhost:3000"]\n'


def read(text: str) -> Config:
    return decode(text, Path("/etc/tlstunnel"), "t.toml")


def site(name: str, more: str = "") -> str:
    return f'{SITE}names = ["{name}"]\n{more}\n'


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("", "", []),
        ('[timeouts]\nidle = "60s"\n', '[timeouts]\nidle = "1m"\n', []),
        (
            'listen = ["127.0.0.1:1", "127.0.0.1:2"]\n',
            'listen = ["127.0.0.1:2", "[::1]:3"]\n',
            ["listen: [::1]:3 added", "listen: 127.0.0.1:1 removed"],
        ),
        ("", '[timeouts]\nidle = "15m"\n', ["timeouts.idle: off -> 15m"]),
        ("", "[limits]\nunfinished_handshakes = 10\n", ["limits.unfinished_handshakes: 4096 -> 10"]),
        ("", "[managed_rules]\nprocesses = 2\n", ["managed_rules.processes: 1 -> 2"]),
        ("", '[log]\nformat = "json"\n', ["log.format: text -> json; this takes effect at the next start"]),
        ("", 'trusted_proxies = ["10.0.0.0/8"]\n', ["trusted_proxies: changed"]),
        ("", "drain_removed = true\n", ["drain_removed: changed"]),
        ("", site("a.example"), ["site a.example: added"]),
        (site("a.example"), "", ["site a.example: removed"]),
        (site("a.example") + site("b.example"), site("b.example") + site("a.example"), []),
        (
            site("a.example"),
            site("a.example", 'cert = "a.pem"\nkey = "a-key.pem"\ndefault = true'),
            ["site a.example: changed: default, cert, key"],
        ),
    ],
)
def test_lines(old: str, new: str, lines: list[str]) -> None:
    assert describe_changes(read(old), read(new)) == lines


def test_texts_of_rules_and_addresses_are_not_reported() -> None:
    rule = '[[sites.rules]]\nname = "token"\nwhen = \'header("x") == "s3cret"\'\naction = "block"\n'
    old = read(f'lists = {{ a = ["10.0.0.1"] }}\n{site("a.example")}')
    new = read(f'lists = {{ a = ["10.0.0.2"] }}\n{site("a.example", rule)}')
    assert describe_changes(old, new) == ["lists: changed", "site a.example: changed: rules"]
