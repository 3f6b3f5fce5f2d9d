"""The admin address outlives reloads, upgrades and the death of its process, and tunnels need it for nothing."""

import json
import os
import signal
import socket
import stat
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.harness import TIMEOUT, Certificate, RawOrigin, Tunnel, connect_tls, eventually, upgrade
from tests.promises.administered import ALICE, Admin, administered, config_of, read_reply
from tests.promises.counted import hold
from tests.promises.versions import Versions, upgraded

WATCH = {"TLSTUNNEL_WATCH": "0.1,60,90,90"}
"""No process is reported as silent on a busy machine."""


def admin_pid(tunnel: Tunnel) -> int | None:
    admin = tunnel.status()["admin"]
    return int(admin["process"]) if admin is not None else None


def ask_unix(path: Path, request: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(path))
        sock.sendall(request.encode())
        return read_reply(sock).body


def test_without_a_plan_and_without_a_file(tmp_path: Path) -> None:
    environment = {**WATCH, "XDG_STATE_HOME": str(tmp_path)}
    with Tunnel(arguments=["--admin=127.0.0.1:0"], environment=environment) as tunnel:
        admin = Admin(tunnel)
        assert [record["address"] for record in tunnel.records("admin address")] == [admin.url]
        assert f"dashboard: {admin.url}" in tunnel.run_command("status")
        assert admin.get("/api/v1/status")["dashboard"] == admin.url
        assert admin.get("/api/v1/usage")["assessments"] == []
        reply = admin.ask("POST", "/api/v1/reload", body={})
        assert (reply.status, "openssl rand" in reply.json["error"]) == (401, True)


def test_without_it_there_is_no_admin_process(certificate: Certificate, tmp_path: Path) -> None:
    with administered(certificate, tmp_path, admin="none", environment=WATCH) as tunnel:
        assert (tunnel.status()["dashboard"], tunnel.status()["admin"]) == ("", None)


def test_reloads_move_add_and_remove_it(certificate: Certificate, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    with administered(certificate, tmp_path, environment=WATCH) as tunnel:
        admin = Admin(tunnel)
        port = admin.port
        assert admin.get("/healthz")["alive"]

        tunnel.reload(config_of(certificate, tmp_path, admin='hosts = ["other.example"]'))
        assert admin.port == port, "the same address has the same socket"
        eventually(lambda: admin.ask("GET", "/api/v1/session", host="other.example").status == 200)

        tunnel.reload(config_of(certificate, tmp_path, admin=f'listen = "unix:{path}"'))
        assert tunnel.status()["dashboard"] == f"unix:{path}"
        who = eventually(lambda: ask_unix(path, "GET /api/v1/session HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert f"uid {os.getuid()}".encode() in who
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        request = f"POST /api/v1/reload HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ALICE}\r\n\r\n"
        assert b"changes" in ask_unix(path, request)
        assert tunnel.records("action")[-1]["who"] == f"token alice (uid {os.getuid()})"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5).close()

        tunnel.reload(config_of(certificate, tmp_path, admin="none"))
        assert tunnel.status()["dashboard"] == ""
        assert not path.exists()
        eventually(lambda: admin_pid(tunnel) is None)

        tunnel.reload(config_of(certificate, tmp_path))
        assert eventually(lambda: admin.get("/readyz"))["ready"]


def test_a_port_that_another_program_has(certificate: Certificate, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with administered(certificate, tmp_path, admin=f'listen = "127.0.0.1:{port}"', environment=WATCH) as tunnel:
            (warning,) = tunnel.records("no admin address")
            assert f"cannot listen on 127.0.0.1:{port}: it is in use by another program" in warning["reason"]
            assert "--admin" in warning["reason"]
            assert "tried again" in warning["hint"]
            status = tunnel.status()
            assert (status["dashboard"], status["dashboard_problem"]) == ("", warning["reason"])
            assert any(line.startswith("no dashboard: ") for line in tunnel.run_command("status"))
            other.close()
            tunnel.wait_records(event="admin address")
            assert Admin(tunnel).get("/readyz")["ready"]
            assert tunnel.status()["dashboard_problem"] == ""
            assert len(tunnel.records("no admin address")) == 1


def test_without_a_place_for_the_state(certificate: Certificate, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = config_of(certificate, tmp_path).replace(str(tmp_path / "state"), str(tmp_path / "file"))
    with Tunnel(None, certificate, config=config, environment=WATCH) as tunnel:
        admin = Admin(tunnel)
        assert admin.get("/readyz")["ready"]
        assert admin.get("/api/v1/status")["version"]
        assert admin.ask("GET", "/api/v1/history").status == 503
        assert admin.ask("GET", "/api/v1/notices").status == 409


def test_files_that_cannot_be_used_are_errors(certificate: Certificate, tmp_path: Path) -> None:
    with administered(certificate, tmp_path, environment=WATCH) as tunnel:
        good = tunnel.file.read_text()
        said = tunnel.reload(good.replace(str(tmp_path / "rita"), str(tmp_path / "missing")), status=1)
        assert "admin.tokens[1].file" in said[0]
        assert "cannot be read" in said[0]
        assert Admin(tunnel).get("/api/v1/session", token=ALICE)["access"] == "full"
        # A token that was replaced is used after a reload, and ends the sessions of the one before.
        cookie, _, _ = Admin(tunnel).log_in()
        (tmp_path / "alice").write_text("b" * 30)
        tunnel.reload(good)
        eventually(lambda: Admin(tunnel).ask("GET", "/api/v1/session", token="b" * 30).status == 200)
        assert Admin(tunnel).ask("GET", "/api/v1/session", token=ALICE).status == 401
        assert not Admin(tunnel).get("/api/v1/session", headers={"Cookie": cookie})["logged_in"]


def test_it_survives_an_upgrade_and_a_kill(certificate: Certificate, tmp_path: Path) -> None:
    versions = Versions(tmp_path / "versions")
    with (
        RawOrigin(hold) as origin,
        administered(
            certificate,
            tmp_path,
            origin=origin.address,
            environment={**versions.environment, **WATCH},
            errors_expected=True,  # that a process was killed
        ) as tunnel,
        connect_tls(tunnel) as sock,
    ):
        assert upgrade(sock).status == 101
        admin = Admin(tunnel)
        port, first = admin.port, admin_pid(tunnel)
        versions.install("2.0.0")
        with connect(f"ws://{admin.host}/api/v1/live", proxy=None) as watcher:
            watcher.send('{"watch": ["overview"]}')
            watcher.recv(timeout=TIMEOUT)
            upgraded(tunnel)
            with pytest.raises(ConnectionClosed):
                any(watcher.recv(timeout=TIMEOUT) is None for _ in range(1_000))
        with connect(f"ws://{admin.host}/api/v1/live", proxy=None) as watcher:  # as the page does
            watcher.send('{"watch": ["overview"]}')
            assert json.loads(watcher.recv(timeout=TIMEOUT))["overview"]["generation"] == 2
        # Connections wait in the backlog until the next process is there.
        assert admin.get("/healthz")["alive"]
        assert admin.get("/api/v1/status")["version"] == "2.0.0"
        assert admin.port == port
        second = eventually(lambda: admin_pid(tunnel))
        assert second not in {None, first}

        assert second is not None
        os.kill(second, signal.SIGKILL)
        eventually(lambda: admin_pid(tunnel) not in {None, second})
        assert admin.get("/readyz")["ready"]
        assert admin.port == port
        sock.sendall(b"x")  # the tunnel has noticed nothing
        assert tunnel.status()["metrics"]["tlstunnel_tunnels"][0]["value"] == 1
