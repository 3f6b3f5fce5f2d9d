"""The files of `[admin]`: tokens and certificates, with every problem."""

import hmac
from pathlib import Path

import pytest

from tests.harness import Certificate
from tlstunnel.config.admin import Admin, Token
from tlstunnel.config.problems import Problems
from tlstunnel.serving import admin_files
from tlstunnel.serving.admin_files import LoadedToken, find_token, load_admin_files, make_digest

GOOD = "a" * admin_files.SHORTEST


def token(folder: Path, text: str, name: str = "alice") -> Token:
    file = folder / name
    file.write_text(text)
    return Token(name=name, file=file)


def load(admin: Admin) -> tuple[admin_files.AdminFiles, list[str]]:
    problems = Problems()
    loaded = load_admin_files(admin, problems)
    return loaded, [str(problem) for problem in problems.found]


@pytest.mark.parametrize("text", [GOOD, f"{GOOD}\n", f"  {GOOD}  \r\nmore\n"])
def test_a_token_is_the_first_line(tmp_path: Path, text: str) -> None:
    loaded, problems = load(Admin(tokens=(token(tmp_path, text),)))
    assert problems == []
    assert loaded.tokens == (LoadedToken("alice", "read", make_digest(GOOD)),)
    assert GOOD not in repr(loaded)


@pytest.mark.parametrize("text", ["", "\n", "short", "a" * 513, "with a space " + GOOD, "ü" * 30])
def test_what_is_no_token_is_reported_without_it(tmp_path: Path, text: str) -> None:
    loaded, problems = load(Admin(tokens=(token(tmp_path, text),)))
    assert loaded.tokens == ()
    (problem,) = problems
    assert "admin.tokens[0].file" in problem
    assert "openssl rand" in problem
    assert not text.strip() or text not in problem


def test_the_others_are_used(tmp_path: Path) -> None:
    missing = Token(name="bob", file=tmp_path / "missing")
    carol = token(tmp_path, GOOD, "carol")
    copy = token(tmp_path, GOOD, "copy")
    loaded, problems = load(Admin(tokens=(missing, carol, copy)))
    assert [one.name for one in loaded.tokens] == ["carol"]
    assert "cannot be read: No such file" in problems[0]
    assert "the same token as that of carol" in problems[1]


def test_every_token_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time does not depend on which token it is, or whether it is one."""
    tokens = [LoadedToken(str(number), "read", make_digest(str(number))) for number in range(4)]
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def count(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", count)
    for text, name in (("0", "0"), ("3", "3"), ("4", None), ("", None), ("\udc80", None)):
        compared.clear()
        found = find_token(tokens, text)
        assert (found.name if found is not None else None) == name
        assert compared == [one.digest for one in tokens]


def test_certificates(certificate: Certificate, tmp_path: Path) -> None:
    loaded, problems = load(Admin(cert=certificate.cert, key=certificate.key, client_ca=certificate.ca))
    assert problems == []
    assert loaded.context is not None
    assert loaded.context.cert_store_stats()["x509_ca"] == 1
    assert load(Admin())[0].context is None


def test_certificates_that_cannot_be_used(certificate: Certificate, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("nothing")
    loaded, problems = load(Admin(cert=tmp_path / "bad.pem", key=certificate.key))
    assert problems[0].startswith("admin.cert: ")
    assert loaded.context is not None, "it must not be served without TLS"
    assert loaded.context.get_ca_certs() == []
    loaded, problems = load(Admin(cert=certificate.cert, key=certificate.key, client_ca=tmp_path / "bad.pem"))
    assert problems[0].startswith("admin.client_ca: ")
