"""The files with secrets and passwords."""

import base64
import subprocess
from pathlib import Path

import pytest

from tests.harness import REPOSITORY
from tlstunnel.errors import ConfigurationError
from tlstunnel.plans.credentials import derive_secret, load_password, load_secrets

SECRET = bytes(range(32))


def encode(secret: bytes) -> str:
    return f"whsec_{base64.b64encode(secret).decode()}"


def test_secrets_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{encode(SECRET)}\n\n{encode(b'n' * 24)}\n")
    assert load_secrets(path) == (SECRET, b"n" * 24)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected 1 to 4 secrets, one a line, got 0"),
        (f"{encode(SECRET)}\n" * 5, "expected 1 to 4 secrets, one a line, got 5"),
        (base64.b64encode(SECRET).decode(), "line 1: expected a secret: whsec_ and 24 to 64 bytes in base64; for one"),
        (f"{encode(SECRET)}\nwhsec_%%%%", "line 2: expected a secret"),
        (encode(b"n" * 23), "line 1: expected a secret"),
        (encode(b"n" * 65), "line 1: expected a secret"),
    ],
)
def test_what_is_no_secret_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as raised:
        load_secrets(path)
    assert str(raised.value).startswith(f"{path}: {reason}")
    assert "%%%%" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="secret: cannot be read: No such file or directory"):
        load_secrets(tmp_path / "secret")


@pytest.mark.parametrize("secret", [SECRET, b"\0" * 24, bytes(range(192, 256))])
def test_the_secret_of_a_contact_is_what_the_document_computes(tmp_path: Path, secret: bytes) -> None:
    lines = iter((REPOSITORY / "docs" / "plans.md").read_text().splitlines())
    recipe = [next(line for line in lines if line.startswith("    key=")), next(lines), next(lines)]
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "webhook").write_text(f"{encode(secret)}\n{encode(b'n' * 24)}\n")
    run = subprocess.run(["bash", "-c", "\n".join(recipe)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == f"{encode(derive_secret(secret, 'https://owner.example/notices'))}\n"
    assert run.stderr == ""


def test_a_new_secret_is_what_the_document_makes(tmp_path: Path) -> None:
    document = (REPOSITORY / "docs" / "plans.md").read_text().splitlines()
    recipe = next(line for line in document if line.startswith('    echo "whsec_$(openssl rand'))
    (tmp_path / "secrets").mkdir()
    subprocess.run(["bash", "-c", recipe], cwd=tmp_path, check=True)
    assert len(load_secrets(tmp_path / "secrets" / "webhook")[0]) == 32


@pytest.mark.parametrize("text", ["p@ss wörd\n", "p@ss wörd\r\nmore\n", "p@ss wörd"])
def test_the_first_line_is_the_password(tmp_path: Path, text: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(text.encode())
    assert load_password(path) == "p@ss wörd"


def test_a_file_without_a_password_is_named(tmp_path: Path) -> None:
    path = tmp_path / "password"
    for content, reason in ((b"\nx", "the first line, which should be the password, is empty"), (b"\xff", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError) as raised:
            load_password(path)
        assert str(raised.value) == f"{path}: {reason}"
    path.unlink()
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        load_password(path)
