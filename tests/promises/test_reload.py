"""A reload applies to new connections, affects no open tunnel, and changes nothing if there is a problem."""

import json
import signal
import socket
import ssl
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    PROGRAM,
    TIMEOUT,
    Certificate,
    Tunnel,
    WebsocketsOrigin,
    child_environment,
    client_context,
    connect_tls,
    eventually,
    receive_exactly,
    upgrade,
)
from tests.promises.firewalled import config_for, try_handshake, tunnel_to
from tests.promises.scripted_origin import ScriptedOrigin
from tests.promises.wire import has_ended, read_until_end


@pytest.fixture(scope="module")
def origin() -> Iterator[WebsocketsOrigin]:
    with WebsocketsOrigin() as origin:
        yield origin


def _echo(client: socket.socket, text: bytes = b"hello") -> None:
    client.sendall(b"\x81" + bytes([0x80 | len(text)]) + b"\0\0\0\0" + text)
    assert receive_exactly(client, 2 + len(text)) == b"\x81" + bytes([len(text)]) + text


def _status(tunnel: Tunnel, path: str = "/", port: int | None = None) -> int:
    plain = socket.create_connection(("127.0.0.1", port or tunnel.port), TIMEOUT)
    with client_context(tunnel).wrap_socket(plain, server_hostname="localhost") as client:
        status = upgrade(client, path).status
        if status != 101:
            read_until_end(client)
        return status


@pytest.fixture(scope="module")
def untouched(origin: WebsocketsOrigin, certificate: Certificate) -> Iterator[Tunnel]:
    """A tunnel that no test changes; at the end it still has the same configuration."""
    with tunnel_to(origin.address, certificate, site=RULE) as tunnel:
        text = tunnel.file.read_text()
        yield tunnel
        assert tunnel.reload(text) == ["nothing has changed"]


RULE = '[[sites.rules]]\nname = "closed"\nwhen = \'path == "/closed"\'\naction = "block"\nstatus = 404\n'


def test_new_connections_use_the_new_configuration_and_tunnels_stay(
    origin: WebsocketsOrigin, certificate: Certificate
) -> None:
    before = config_for(origin.address, certificate)
    with tunnel_to(origin.address, certificate) as tunnel, connect_tls(tunnel) as client:
        assert upgrade(client, "/closed").status == 101
        assert tunnel.reload(before + RULE) == ["site localhost: changed: rules"]
        assert _status(tunnel, "/closed") == 404
        _echo(client)
        assert tunnel.reload() == ["nothing has changed"]
        assert tunnel.reload(before) == ["site localhost: changed: rules"]
        assert _status(tunnel, "/closed") == 101
        _echo(client)
    changes = [record["changes"] for record in tunnel.records("reloaded")]
    assert changes == [["site localhost: changed: rules"], [], ["site localhost: changed: rules"]]


def test_sighup_is_a_reload(origin: WebsocketsOrigin, certificate: Certificate) -> None:
    with tunnel_to(origin.address, certificate) as tunnel:
        tunnel.file.write_text(config_for(origin.address, certificate) + RULE)
        tunnel.send_signal(signal.SIGHUP)
        tunnel.wait_records(1, "reloaded")
        assert _status(tunnel, "/closed") == 404


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("nonsense", "not TOML"),
        ('[[sites.rules]]\nname = "x"\nwhen = "pth"\naction = "block"\n', 'did you mean "path"?'),
        (
            '[[sites]]\nnames = ["b.example"]\norigins = ["localhost:1"]\ncert = "none.pem"\nkey = "none.pem"\n',
            "none.pem",
        ),
    ],
)
def test_a_problem_changes_nothing_and_is_reported(
    origin: WebsocketsOrigin, certificate: Certificate, untouched: Tunnel, more: str, said: str
) -> None:
    before = config_for(origin.address, certificate)
    earlier = len(untouched.records("not reloaded"))
    with connect_tls(untouched) as client:
        assert upgrade(client).status == 101
        lines = untouched.reload(before + more, status=1)
        assert lines[0].startswith("tlstunnel: nothing was changed: ")
        for line in lines:  # one for each problem
            assert said in line
            assert str(untouched.file) in line
        assert len(lines) == (2 if said == "none.pem" else 1)
        (record,) = untouched.records("not reloaded")[earlier:]
        assert said in record["reason"]
        assert _status(untouched, "/closed") == 404
        _echo(client)


def test_a_port_that_is_taken_changes_nothing(origin: WebsocketsOrigin, certificate: Certificate) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, tunnel_to(origin.address, certificate, site=RULE) as tunnel:
        there = f"127.0.0.1:{taken.getsockname()[1]}"
        text = config_for(origin.address, certificate).replace('["127.0.0.1:0"]', f'["127.0.0.1:0", "{there}"]')
        (line,) = tunnel.reload(text, status=1)
        assert there in line
        assert "in use" in line
        assert _status(tunnel, "/closed") == 404


def test_listeners_come_and_go_and_their_tunnels_stay(origin: WebsocketsOrigin, certificate: Certificate) -> None:
    with tunnel_to(origin.address, certificate) as tunnel, connect_tls(tunnel) as client:
        assert upgrade(client).status == 101
        old = tunnel.port
        text = config_for(origin.address, certificate).replace('["127.0.0.1:0"]', '["localhost:0"]')
        assert tunnel.reload(text) == ["listen: localhost:0 added", "listen: 127.0.0.1:0 removed"]
        eventually(lambda: len(tunnel.addresses) == 2)
        new = int(tunnel.addresses[1].rpartition(":")[2])
        host = tunnel.addresses[1].rpartition(":")[0].strip("[]")
        with socket.create_connection((host, new), TIMEOUT) as plain:
            assert plain.getpeername()[1] == new
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", old), TIMEOUT)
        _echo(client)


def test_a_listener_is_narrowed_and_widened(origin: WebsocketsOrigin, certificate: Certificate) -> None:
    """Its port stays, and no connection is refused meanwhile."""
    text = config_for(origin.address, certificate)
    with tunnel_to(origin.address, certificate) as tunnel, connect_tls(tunnel) as client:
        assert upgrade(client).status == 101
        for host, reachable in (("0.0.0.0", True), ("127.0.0.1", False), ("0.0.0.0", True)):
            wanted = f"{host}:{tunnel.port}"
            assert f"listen: {wanted} added" in tunnel.reload(text.replace("127.0.0.1:0", wanted))
            assert _status(tunnel, "/") == 101
            with socket.socket() as other:
                assert (other.connect_ex(("127.0.0.2", tunnel.port)) == 0) is reachable
        _echo(client)


def _two(origin: WebsocketsOrigin, certificate: Certificate, top: str = "") -> str:
    other = f'[[sites]]\nnames = ["other.example"]\norigins = ["{origin.address}"]\n'
    pair = f'cert = "{certificate.cert}"\nkey = "{certificate.key}"\n'
    return config_for(origin.address, certificate, top=top) + other + pair


@pytest.mark.parametrize("drain_removed", [False, True])
def test_tunnels_of_a_site_that_is_gone(
    origin: WebsocketsOrigin, certificate: Certificate, *, drain_removed: bool
) -> None:
    top = f"drain_removed = {str(drain_removed).lower()}"
    with Tunnel(None, certificate, config=_two(origin, certificate, top)) as tunnel, connect_tls(tunnel) as stays:
        assert upgrade(stays).status == 101
        plain = socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(plain, server_hostname="other.example") as goes:
            assert upgrade(goes, host="other.example").status == 101
            changed = tunnel.reload(config_for(origin.address, certificate, top=top))
            assert changed == ["site other.example: removed"]
            with (
                pytest.raises(ssl.SSLError, match=r"(?i)unrecognized.name"),
                context.wrap_socket(
                    socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT), server_hostname="other.example"
                ),
            ):
                pass
            if drain_removed:
                assert has_ended(goes)
                tunnel.wait_record(lambda record: record.get("reason") == "site removed")
            else:
                _echo(goes)
        _echo(stays)


def test_rate_limits_keep_their_counts(certificate: Certificate) -> None:
    site = (
        '[[sites.rate_limits]]\nname = "two"\nlimit = "2/day"\nstrategy = "moving"\n'
        '[[sites.rate_limits]]\nname = "open"\nmax_tunnels = 1\nkey = ["header:x-user"]\n'
    )
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, site=site) as tunnel:
        assert try_handshake((origin, tunnel)).status == 101
        assert tunnel.reload(config_for(origin.address, certificate, site=site + RULE)) == [
            "site localhost: changed: rules"
        ]
        assert try_handshake((origin, tunnel)).status == 101
        assert try_handshake((origin, tunnel)).reason == "rate limit: two"


def test_simultaneous_reloads_run_one_after_the_other(origin: WebsocketsOrigin, certificate: Certificate) -> None:
    with tunnel_to(origin.address, certificate) as tunnel:
        found: list[list[str]] = []
        threads = [threading.Thread(target=lambda: found.append(tunnel.reload())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [["nothing has changed"]] * 4
        assert len(tunnel.wait_records(4, "reloaded")) == 4


# --- the control socket ----------------------------------------------------------------------------------------------


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        env=child_environment() | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_control_socket_is_private_and_removed_at_the_end(certificate: Certificate, tmp_path: Path) -> None:
    with Tunnel("localhost:1", certificate) as tunnel:
        path = tunnel.control
        assert path == tunnel.folder / "run" / f"control-{tunnel.port}.sock"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert _command("reload", RUNTIME_DIRECTORY=str(path.parent)).stdout == "nothing has changed\n"
        answer = json.loads(_command("reload", "--json", "--control", str(path)).stdout)
        assert answer == {"ok": True, "changes": []}
        tunnel.stop()
        assert not path.exists()
    missing = _command("reload", "--control", str(path))
    assert missing.returncode == 1
    assert str(path) in missing.stderr
    alone = _command("reload", RUNTIME_DIRECTORY=str(tmp_path))
    assert alone.returncode == 1
    assert str(tmp_path) in alone.stderr


def test_several_tunnels_are_listed(certificate: Certificate, tmp_path: Path) -> None:
    environment = {"RUNTIME_DIRECTORY": str(tmp_path)}
    with (
        Tunnel("localhost:1", certificate, environment=environment) as one,
        Tunnel("localhost:1", certificate, environment=environment) as two,
    ):
        done = _command("reload", **environment)
        assert done.returncode == 1
        assert str(one.control) in done.stderr
        assert str(two.control) in done.stderr


def test_a_second_tunnel_cannot_take_it_but_that_of_a_dead_one_is_replaced(
    certificate: Certificate, tmp_path: Path
) -> None:
    path = tmp_path / "c.sock"
    arguments = ["--control", str(path)]
    first = Tunnel("localhost:1", certificate, arguments=arguments)
    first.__enter__()
    second = _command("start", "localhost:1", "--listen", "127.0.0.1:0", *arguments)
    assert second.returncode == 1
    assert f"tlstunnel: {path}: another tunnel has this control socket" in second.stderr
    assert first.reload() == ["nothing has changed"]
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    with pytest.raises(AssertionError, match="exited with -9"):
        first.__exit__(None, None, None)
    assert path.exists()
    with Tunnel("localhost:1", certificate, arguments=arguments) as third:
        assert third.reload() == ["nothing has changed"]


def test_a_tunnel_gets_the_control_socket_of_one_that_drains(
    origin: WebsocketsOrigin, certificate: Certificate, tmp_path: Path
) -> None:
    """It is started on the same port while the other one still has tunnels."""
    environment = {"RUNTIME_DIRECTORY": str(tmp_path)}
    with Tunnel(origin.address, certificate, environment=environment) as first, connect_tls(first) as client:
        assert upgrade(client).status == 101
        first.send_signal(signal.SIGTERM)
        first.wait_record(lambda record: record["event"] == "draining")
        listen = (f"127.0.0.1:{first.port}",)
        with Tunnel(origin.address, certificate, listen=listen, environment=environment) as second:
            (record,) = second.records("no control socket")
            assert "another tunnel has this control socket" in record["reason"]
            client.close()
            got = second.wait_record(lambda record: record["event"] == "control socket")
            done = _command("reload", **environment)
            assert done.stdout == "nothing has changed\n"
            assert done.stderr == f"using {got['control']}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"reload\n", "expected one JSON object"),
        (b"[]\n", "an object with"),
        (b'{"do": 5}\n', "an object with"),
        (b'{"do": "relaod"}\n', 'did you mean "reload"?'),
        (b'{"do": "sing a song"}\n', "the commands are ack"),
        (b"[" * 60_000 + b"\n", "expected one JSON object"),
        (b"x" * 70_000 + b"\n", "expected one JSON object"),
    ],
)
def test_invalid_requests_are_refused(untouched: Tunnel, line: bytes, said: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(str(untouched.control))
        sock.sendall(line)
        answer = json.loads(sock.makefile("rb").readline())
    assert answer["ok"] is False
    assert said in answer["error"]
