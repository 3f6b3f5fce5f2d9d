"""``tlstunnel config check``: what it prints, and its exit status."""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from tests.commands import run_main
from tlstunnel.cli import main

SITE = '[[sites]]\norigins = ["localhost:3000"]\n'


def check(*arguments: str) -> Result:
    return run_main("config", "check", *arguments)


def pair(folder: Path, name: str, days: int = 90) -> None:
    """Write a self-signed certificate and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=30)).not_valid_after(now + timedelta(days=days, hours=1))
    names = x509.SubjectAlternativeName([x509.DNSName(f"{name}.example"), x509.DNSName(f"*.{name}.example")])
    builder = builder.add_extension(names, critical=False)
    (folder / f"{name}.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / f"{name}-key.pem").write_bytes(private)


def test_an_empty_file_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tlstunnel.toml").touch()
    result = check()
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "listen    chosen by start",
        "site      none: start chooses the origin",
        "limit     unfinished handshakes: 4096, per process",
        (
            "timeouts  tls_handshake 10s, request 10s, origin_connect 5s, origin_response 30s, idle off, close 30s,"
            " acknowledge 2m"
        ),
        "ok",
    ]
    assert result.stderr == ""


def test_the_summary(tmp_path: Path) -> None:
    pair(tmp_path, "chat")
    file = tmp_path / "t.toml"
    file.write_text(
        'listen = ["127.0.0.1:8443", "[::1]:8443"]\ntimeouts.idle = "15m"\n'
        f'{SITE}names = ["chat.example", "*.chat.example"]\ndefault = true\ncert = "chat.pem"\nkey = "chat-key.pem"\n'
        f'web_origins = ["same"]\n{SITE}names = ["b.example"]\nweb_origins = []\n'
        'plan = "pro"\ncontact = "mailto:ops@b.example"\n'
    )
    result = check(str(file))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "listen    127.0.0.1:8443, [::1]:8443",
        f"site      chat.example, *.chat.example (default) -> localhost:3000, certificate {tmp_path}/chat.pem",
        "site      b.example -> localhost:3000",
        "plan      chat.example: no plan: its usage is measured, and nothing else",
        (
            "plan      b.example: Pro, for 1000 concurrent tunnels, and nothing is cut off above that; the next plan is"
            " Business; notices to mailto:ops@b.example need usage.notices.email; without it they go to the log"
        ),
        "limit     unfinished handshakes: 4096, per process",
        (
            "timeouts  tls_handshake 10s, request 10s, origin_connect 5s, origin_response 30s, idle 15m, close 30s,"
            " acknowledge 2m"
        ),
        "ok",
    ]
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("state", "across"),
    [
        ("", "across all processes of this machine"),
        (
            '[state]\nurl = "valkey://ada:word@counts.example:6379/0"\n',
            "across all machines that use valkey://ada@counts.example:6379/0",
        ),
    ],
)
def test_the_summary_says_what_limits_count_across(tmp_path: Path, state: str, across: str) -> None:
    file = tmp_path / "t.toml"
    file.write_text(
        f'{state}[[rate_limits]]\nname = "all"\nlimit = "1000/minute"\n[[sites]]\nnames = ["a.example"]\n'
        'web_origins = []\norigins = [{ address = "localhost:3001", max_tunnels = 7 }]\n'
        '[[sites.rate_limits]]\nname = "own"\nlimit = "30/minute"\nblock_for = "1m"\nmax_tunnels = 5\n'
        '[[sites.rate_limits]]\nname = "seen"\nmax_tunnels = 9\nmode = "log"\n'
    )
    result = check(str(file))
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line for line in result.stdout.splitlines() if line.startswith("limit ")] == [
        f'limit     "all": 1000/minute, {across}',
        f'limit     "own" of a.example: 30/minute, then blocked for 60s, 5 tunnels, {across}',
        f'limit     "seen" of a.example: 9 tunnels, only logged, {across}',
        f"limit     origin localhost:3001: 7 tunnels, {across}",
        "limit     unfinished handshakes: 4096, per process",
    ]


def test_every_certificate_problem_is_reported(tmp_path: Path) -> None:
    for name in ("good", "a", "b"):
        pair(tmp_path, name)
    file = tmp_path / "t.toml"
    pairs = [("good.pem", "good-key.pem"), ("none.pem", "good-key.pem"), ("a.pem", "b-key.pem")]
    sites = [f'{SITE}names = ["n{index}"]\ncert = "{cert}"\nkey = "{key}"\n' for index, (cert, key) in enumerate(pairs)]
    file.write_text("".join(sites))
    result = check(str(file))
    assert result.exit_code == 1
    assert result.stdout == ""
    missing, unmatched = result.stderr.splitlines()
    assert missing.startswith(f"tlstunnel: {file}:9: sites[1].cert: {tmp_path}/none.pem: ")
    assert unmatched.startswith(f"tlstunnel: {file}:15: sites[2].key: {tmp_path}/b-key.pem: ")


def test_a_certificate_that_expires_soon_is_a_warning(tmp_path: Path) -> None:
    pair(tmp_path, "old", days=3)
    file = tmp_path / "t.toml"
    file.write_text(f'{SITE}cert = "old.pem"\nkey = "old-key.pem"\nweb_origins = ["same"]\n')
    result = check(str(file))
    assert result.exit_code == 0
    assert result.stdout.endswith("\nok\n")
    (warning,) = result.stderr.splitlines()
    assert warning.startswith(f"tlstunnel: {file}: sites[0]: warning: {tmp_path}/old.pem: ")
    assert "the certificate expires on" in warning


def test_each_site_that_any_page_may_connect_to_is_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(
        f'{SITE}names = ["a.example"]\n{SITE}names = ["b.example"]\nweb_origins = ["same"]\n'
        f'{SITE}names = ["c.example"]\nweb_origins_mode = "log"\n'
    )
    result = check(str(file))
    assert result.exit_code == 0
    assert result.stdout.endswith("\nok\n")
    first, third = result.stderr.splitlines()
    assert first.startswith(f"tlstunnel: {file}: sites[0]: warning: without web_origins any web page may connect")
    assert 'write web_origins = ["same"]' in first
    assert third.startswith(f"tlstunnel: {file}: sites[2]: warning: without web_origins ")


SAME = f'{SITE}names = ["chat.example"]\nweb_origins = ["same"]\n'
RULE = 'name = "no admins"\naction = "block"\n'

# what is wrong: the file, and what the one line must say, in this order
WRONG_POLICIES = {
    "a field that is not there": (
        f"{SAME}[[sites.rules]]\n{RULE}when = 'pth == \"/admin\"'\n",
        ("sites[0]", "chat.example", "no admins", "pth", '"path"'),
    ),
    "a function that is not there": (
        f"{SAME}[[sites.rules]]\n{RULE}when = 'in_lst(ip, \"a\")'\n",
        ("sites[0]", "no admins", "in_lst", '"in_list"'),
    ),
    "a list that is not there": (
        f"lists.office = []\n{SAME}[[sites.rules]]\n{RULE}when = 'in_list(ip, \"ofice\")'\n",
        ("sites[0]", "no admins", "ofice", '"office"'),
    ),
    "an invalid pattern": (
        f"{SAME}[[sites.rules]]\n{RULE}when = 'path.regex(\"(\")'\n",
        ("sites[0]", "no admins", "missing )"),
    ),
    "an expression that does not parse": (
        f"{SAME}[[sites.rules]]\n{RULE}when = 'path == '\n",
        ("sites[0]", "no admins"),
    ),
    "a rule of all sites": (f"[[rules]]\n{RULE}when = 'hots == \"a\"'\n{SAME}", ("no admins", "hots", '"host"')),
    "a limit of what is no time": (
        f'{SAME}[[sites.rate_limits]]\nname = "handshakes"\nlimit = "10/10s"\n',
        ("sites[0]", "handshakes", "10 per 10 seconds"),
    ),
    "a condition of a limit": (
        f'{SAME}[[sites.rate_limits]]\nname = "handshakes"\nlimit = "1/hour"\nwhen = "pth"\n',
        ("sites[0]", "handshakes", "pth", '"path"'),
    ),
    "a list of addresses that is not there": (
        f'lists.botnets = []\n{SAME}block_addresses = ["@botnet"]\n',
        ("block_addresses", "botnet", "botnets"),
    ),
    "a file of a list that is not there": (f'lists.botnets = "none.txt"\n{SAME}', ("none.txt", "No such file")),
    "words instead of networks": (
        f'lists.botnets = ["chat"]\n{SAME}block_addresses = ["@botnets"]\n',
        ("botnets", "chat", "not a network"),
    ),
    "managed rules that are not there": (
        f'{SAME}[sites.managed_rules]\nowasp_crs = true\ncrs = "nowhere"\n',
        ("sites[0].managed_rules", "nowhere", "modsecurity-crs"),
    ),
}


@pytest.mark.parametrize(("text", "parts"), WRONG_POLICIES.values(), ids=WRONG_POLICIES.keys())
def test_a_policy_that_cannot_work_is_one_line_and_status_1(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    parts: tuple[str, ...],
) -> None:
    file = tmp_path / "t.toml"
    file.write_text(text)
    monkeypatch.setattr(sys, "argv", ["tlstunnel", "config", "check", str(file)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"tlstunnel: {file}:")
    rest = line.removeprefix(f"tlstunnel: {file}:")
    for part in parts:
        assert part in rest, line
        rest = rest.partition(part)[2]


def test_problems_of_the_policy_and_of_certificates_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(f'{SAME}cert = "none.pem"\nkey = "none.pem"\n[[sites.rules]]\n{RULE}when = \'pth\'\n')
    result = check(str(file))
    assert result.exit_code == 1
    assert result.stdout == ""
    certificate, key, policy = result.stderr.splitlines()
    assert "sites[0].cert: " in certificate
    assert "sites[0].key: " in key
    assert "none.pem" in certificate
    assert "no admins" in policy


def test_a_wrong_file_is_one_line_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tlstunnel.toml").write_text("[timeouts]\nrequest = 10\n")
    monkeypatch.setattr(sys, "argv", ["tlstunnel", "config", "check"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    expected = 'tlstunnel: tlstunnel.toml:2: timeouts.request: expected a duration such as "10s", got 10\n'
    assert capsys.readouterr() == ("", expected)


def locked_pair(folder: Path, name: str, passphrase: bytes) -> None:
    pair(folder, name)
    file = folder / f"{name}-key.pem"
    key = load_pem_private_key(file.read_bytes(), None)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase)))


def test_a_key_with_a_passphrase(tmp_path: Path) -> None:
    """The shipped systemd unit runs `config check` before `start`, which accepts it."""
    locked_pair(tmp_path, "chat", b"secret")
    (tmp_path / "passphrase").write_text("secret\n")
    file = tmp_path / "t.toml"
    file.write_text(f'{SAME}cert = "chat.pem"\nkey = "chat-key.pem"\npassphrase_file = "passphrase"\n')
    result = check(str(file))
    assert result.exit_code == 0
    assert result.stderr == ""


MISSING_FILES = {
    "certificates": ('certificates = [{ cert = "none.pem", key = "none-key.pem" }]', ("cert", "key")),
    "client_ca": ('client_ca = "none.pem"', ("client_ca",)),
    "client_crl": ('client_ca = "none.pem"\nclient_crl = "none.crl"', ("client_ca", "client_crl")),
    "origin_ca": ('origins = ["wss://localhost:3000"]\norigin_ca = "none.pem"', ("origin_ca",)),
    "origin_cert": (
        'origins = ["wss://localhost:3000"]\norigin_cert = "none.pem"\norigin_key = "none-key.pem"',
        ("origin_cert", "origin_key"),
    ),
}


@pytest.mark.parametrize(("text", "keys"), MISSING_FILES.values(), ids=MISSING_FILES.keys())
def test_files_that_do_not_exist(tmp_path: Path, text: str, keys: tuple[str, ...]) -> None:
    file = tmp_path / "t.toml"
    origins = "" if "origins" in text else 'origins = ["localhost:3000"]\n'
    file.write_text(f'[[sites]]\nweb_origins = ["same"]\n{origins}{text}\n')
    result = check(str(file))
    assert result.exit_code == 1
    assert result.stdout == ""
    for line, key in zip(result.stderr.splitlines(), keys, strict=True):
        assert f"{key}: {tmp_path}/none" in line
        assert line.endswith("No such file or directory")
