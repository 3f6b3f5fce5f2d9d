import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tlstunnel.certificates import describe
from tlstunnel.cli import cli
from tlstunnel.cli.certs import command
from tlstunnel.errors import CertificateError


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_create_prints_what_it_wrote(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    result = run("create", "--dir", folder)
    assert result.exit_code == 0
    for name in ("ca.pem", "localhost.pem", "localhost-key.pem"):
        assert f"{folder / name}  " in result.output
        assert (folder / name).exists()
    assert "(new)" in result.output
    assert f"curl --cacert {folder / 'ca.pem'}" in result.output
    again = run("create", "a.example", "b.example", "--dir", folder)
    assert "(used again)" in again.output
    leaf = describe.read_certificates(folder / "a.example.pem")[0]
    assert describe.describe(leaf).names == (
        "a.example",
        "b.example",
    )


def test_create_puts_the_files_into_certs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("create").exit_code == 0
    assert (tmp_path / "certs" / "localhost-key.pem").exists()


def test_create_needs_force_to_replace(tmp_path: Path) -> None:
    run("create", "--dir", tmp_path)
    before = (tmp_path / "localhost.pem").read_bytes()
    with pytest.raises(CertificateError, match="--force"):
        run("create", "--dir", tmp_path)
    assert (tmp_path / "localhost.pem").read_bytes() == before
    assert run("create", "--dir", tmp_path, "--force").exit_code == 0
    assert (tmp_path / "localhost.pem").read_bytes() != before


def test_create_and_revoke_a_client(tmp_path: Path) -> None:
    result = run("create", "--client", "ann", "--dir", tmp_path)
    assert result.exit_code == 0
    cert, key = tmp_path / "client-ann.pem", tmp_path / "client-ann-key.pem"
    assert f"--cert {cert} --key {key}" in result.output
    assert f"tlstunnel certs revoke {cert}" in result.output
    assert run("revoke", cert, "--dir", tmp_path).output.startswith(f"{tmp_path / 'ca.crl'}  the revocation list")
    assert run("create", "b.example", "--client", "ann", "--dir", tmp_path).exit_code == 2


def test_an_error_is_one_line_and_status_1(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tlstunnel", "certs", "show", tmp_path / "no.pem"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"tlstunnel: {tmp_path / 'no.pem'}: cannot be read: No such file or directory\n"


def test_wrong_usage_is_status_2() -> None:
    assert CliRunner().invoke(cli, ["certs", "show"]).exit_code == 2


def test_show_describes_every_certificate(tmp_path: Path) -> None:
    run("create", "*.example.com", "::1", "--dir", tmp_path)
    path = tmp_path / "_wildcard.example.com.pem"
    leaf, ca = (describe.describe(cert) for cert in describe.read_certificates(path))
    first, second = run("show", path).output.split("\n\n")
    assert first.startswith("certificate 1 of 2\n")
    assert second.startswith("certificate 2 of 2\n")
    lines = first.splitlines()
    assert "  subject  CN=*.example.com" in lines
    assert f"  issuer   {ca.subject}" in lines
    assert "  name     *.example.com" in lines
    assert "  name     ::1" in lines
    assert "  ca       no" in lines
    assert "  ca       yes" in second.splitlines()
    assert "  key      ECDSA P-256" in lines
    assert f"  serial   {leaf.serial}" in lines
    assert f"  sha256   {leaf.sha256}" in lines
    assert "(396 days left)" in first


def test_show_json(tmp_path: Path) -> None:
    run("create", "--dir", tmp_path)
    leaf, ca = json.loads(run("show", "--json", tmp_path / "localhost.pem").output)
    assert leaf["names"] == ["localhost", "127.0.0.1", "::1"]
    assert leaf["days_left"] == 396
    assert datetime.fromisoformat(leaf["not_after"]) - datetime.fromisoformat(leaf["not_before"]) == timedelta(397)
    assert (leaf["is_ca"], ca["is_ca"]) == (False, True)
    assert leaf["issuer"] == ca["subject"]


@pytest.mark.parametrize(
    ("start", "end", "state"),
    [(-9, -2, "(expired, -2 days left)"), (1, 9, "(not valid yet)"), (-1, 9, "(9 days left)")],
)
def test_show_says_whether_it_is_valid(tmp_path: Path, start: int, end: int, state: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC) + timedelta(hours=1)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "evil\x1b[2J\nname")])
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + timedelta(days=start))
        .not_valid_after(now + timedelta(days=end))
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "x.pem"
    path.write_bytes(cert.public_bytes(Encoding.PEM))
    result = run("show", path)
    assert result.exit_code == 0
    assert state in result.output
    assert "  subject  CN=evil\\1B[2J\\0Aname\n" in result.output
