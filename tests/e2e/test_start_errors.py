"""Errors that prevent `tlstunnel start` are one line, name their place, and have no traceback."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.harness import PROGRAM, Certificate, child_environment


def _start(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return _run(folder, "start", *arguments)


def _run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        cwd=folder,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _refused(folder: Path, *arguments: str | Path) -> str:
    """Start it in ``folder``, check what all refusals have in common, and return the line with the reason."""
    done = _start(folder, *arguments)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("tlstunnel: ")]
    assert len(said) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == said[0]
    return said[0]


def _pair(cert: Path, key: Path) -> list[str]:
    return ["localhost:3000", "--listen", "127.0.0.1:0", "--cert", str(cert), "--key", str(key)]


def test_a_missing_certificate(certificate: Certificate, tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    assert str(absent) in _refused(tmp_path, *_pair(absent, certificate.key))


def test_a_missing_key(certificate: Certificate, tmp_path: Path) -> None:
    absent = tmp_path / "absent-key.pem"
    assert str(absent) in _refused(tmp_path, *_pair(certificate.cert, absent))


def test_a_file_that_is_not_a_certificate(certificate: Certificate, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("this is no certificate\n")
    assert str(nonsense) in _refused(tmp_path, *_pair(nonsense, certificate.key))


def test_a_file_that_is_not_a_key(certificate: Certificate, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense-key.pem"
    nonsense.write_text("this is no key\n")
    assert str(nonsense) in _refused(tmp_path, *_pair(certificate.cert, nonsense))


def test_a_key_of_another_certificate(certificate: Certificate, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    subprocess.run([*PROGRAM, "certs", "create", "other", "--dir", str(tmp_path)], check=True, capture_output=True)
    said = _refused(tmp_path, *_pair(certificate.cert, tmp_path / "other-key.pem"))
    assert other.exists()
    assert str(tmp_path / "other-key.pem") in said
    assert "match" in said


@pytest.mark.parametrize("which", ["cert", "key"])
def test_an_unreadable_file(certificate: Certificate, tmp_path: Path, which: str) -> None:
    """A folder in its place: unlike a file without permissions, root cannot read it either."""
    folder = tmp_path / "folder.pem"
    folder.mkdir()
    files = {"cert": certificate.cert, "key": certificate.key} | {which: folder}
    assert str(folder) in _refused(tmp_path, *_pair(files["cert"], files["key"]))


def test_a_port_in_use(certificate: Certificate, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = _refused(
            tmp_path, "--listen", address, "--cert", certificate.cert, "--key", certificate.key, "localhost:3000"
        )
    assert address in said
    assert "in use" in said


def test_an_address_of_another_machine(certificate: Certificate, tmp_path: Path) -> None:
    # 192.0.2.0/24 is for documentation (RFC 5737): no machine has it.
    said = _refused(
        tmp_path, "--listen", "192.0.2.1:0", "--cert", certificate.cert, "--key", certificate.key, "localhost:3000"
    )
    assert "192.0.2.1" in said


def test_a_unix_socket_in_a_missing_folder(certificate: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "absent" / "tunnel.sock"
    said = _refused(
        tmp_path, "--listen", f"unix:{path}", "--cert", certificate.cert, "--key", certificate.key, "localhost:3000"
    )
    assert str(path) in said


def _refused_config(folder: Path, text: str) -> str:
    path = folder / "tunnel.toml"
    path.write_text(text)
    said = _refused(folder, "--config", path)
    assert "tunnel.toml" in said
    return said


def _site(certificate: Certificate) -> str:
    cert, key = json.dumps(str(certificate.cert)), json.dumps(str(certificate.key))
    return f'[[sites]]\ncert = {cert}\nkey = {key}\norigins = ["localhost:3000"]\n'


def test_a_missing_configuration_file(tmp_path: Path) -> None:
    assert "absent.toml" in _refused(tmp_path, "--config", tmp_path / "absent.toml")


def test_a_configuration_that_is_not_toml(tmp_path: Path) -> None:
    _refused_config(tmp_path, "listen = [\n")


def test_a_configuration_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "binary.toml" in _refused(tmp_path, "--config", tmp_path / "binary.toml")


def test_an_unknown_key_names_the_nearest(certificate: Certificate, tmp_path: Path) -> None:
    said = _refused_config(tmp_path, f'lissten = ["127.0.0.1:0"]\n{_site(certificate)}')
    assert "lissten" in said
    assert "`listen`" in said or "'listen'" in said or '"listen"' in said


def test_a_wrong_value_names_its_place(certificate: Certificate, tmp_path: Path) -> None:
    said = _refused_config(tmp_path, f'listen = ["127.0.0.1:0"]\n[timeouts]\nrequest = "soon"\n{_site(certificate)}')
    assert "timeouts.request" in said
    assert "soon" in said


def test_a_certificate_named_in_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "tunnel.toml"
    path.write_text('[[sites]]\ncert = "absent.pem"\nkey = "absent-key.pem"\norigins = ["localhost:3000"]\n')
    done = _start(tmp_path, "--config", path)
    assert done.returncode == 1, done
    first, second = (line for line in done.stderr.splitlines() if line.startswith("tlstunnel: "))
    assert f"{path}:2: sites[0].cert: {tmp_path / 'absent.pem'}: " in first
    assert f"{path}:3: sites[0].key: {tmp_path / 'absent-key.pem'}: " in second


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["http://localhost:3000"], "http://localhost:3000"),
        (["localhost"], "localhost"),
        (["--listen", "8443", "localhost:3000"], "8443"),
        (["--cert", "cert.pem", "localhost:3000"], "--key"),
        (["--log-format", "xml"], "xml"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], named: str) -> None:
    """The command line itself is wrong: status 2, and the usage."""
    done = _start(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: tlstunnel start ")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert named in last
    assert list(tmp_path.iterdir()) == []


def test_origin_and_sites_together(certificate: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "tunnel.toml"
    path.write_text(_site(certificate))
    done = _start(tmp_path, "--config", path, "localhost:3000")
    assert done.returncode == 2
    assert "ORIGIN" in done.stderr.splitlines()[-1]


def test_a_policy_that_cannot_work(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(
        '[[sites]]\norigins = ["localhost:3000"]\n'
        '[[sites.rules]]\nname = "no admins"\naction = "block"\nwhen = \'pth == "/admin"\'\n'
    )
    said = _refused(tmp_path, "--config", file)
    assert said.startswith(f"tlstunnel: {file}:3: sites[0].rules[0]: ")
    assert '"no admins"' in said
    assert 'did you mean "path"?' in said


def test_the_file_in_this_folder_is_used_unless_an_origin_is_given(certificate: Certificate, tmp_path: Path) -> None:
    file = tmp_path / "tlstunnel.toml"
    file.write_text("nonsense = 1\n")
    assert 'tlstunnel.toml:1: unknown key "nonsense"' in _refused(tmp_path)
    absent = tmp_path / "absent.pem"
    assert str(absent) in _refused(tmp_path, *_pair(absent, certificate.key))
    file.write_text("listen = []\n")
    busy = socket.create_server(("127.0.0.1", 0))
    with busy:
        done = _start(tmp_path, "--listen", f"127.0.0.1:{busy.getsockname()[1]}", "--log-format", "json")
    first = json.loads(done.stderr.splitlines()[0])
    assert (first["event"], first["file"]) == ("configuration file", str(file))


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_can_write_is_not_used_by_itself(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "tlstunnel.toml"
    file.write_text("nonsense = 1\n")
    file.chmod(mode)
    said = _refused(tmp_path)
    assert said.endswith(
        "tlstunnel.toml: is not used unless you name it on the command line,"
        " because other users can write it (chmod go-w)"
    )
    assert "unknown key" in _refused(tmp_path, "--config", file)


@pytest.mark.parametrize("mode", [0o775, 0o1777])
def test_a_file_in_a_folder_that_others_can_write_is_not_used_by_itself(tmp_path: Path, mode: int) -> None:
    """It may be a link of theirs to a file of this user or root, and name workers of theirs beside the link."""
    own, shared = tmp_path / "own.toml", tmp_path / "shared"
    own.write_text('[[sites]]\nnames = ["*"]\norigins = ["127.0.0.1:1"]\nworker = "theirs.py:fetch"\n')
    shared.mkdir()
    shared.chmod(mode)
    (shared / "theirs.py").write_text("print('executed')\n")
    (shared / "tlstunnel.toml").symlink_to(own)
    for command in (["start"], ["config", "check"]):
        done = _run(shared, *command)
        assert done.stderr.endswith("because other users can write its folder (chmod go-w)\n")
        assert done.stdout == ""
    assert _run(shared, "config", "check", "tlstunnel.toml").stdout == "executed\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_a_file_of_another_user_is_not_used_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "tlstunnel.toml"
    file.write_text("nonsense = 1\n")
    os.chown(file, 65_534, -1)
    assert "because it belongs to another user" in _refused(tmp_path)
