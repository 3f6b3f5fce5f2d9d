"""Managed rules over real sockets: the record names what was blocked, and a failing helper affects no tunnel."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus import corpus
from tests.corpus.corpus import Sample
from tests.corpus.managed_rules import require_crs, require_libmodsecurity
from tests.harness import (
    PROGRAM,
    Certificate,
    Tunnel,
    WebsocketsOrigin,
    child_environment,
    connect_tls,
    eventually,
    receive_exactly,
    upgrade,
)
from tests.promises.firewalled import (
    Outcome,
    Servers,
    config_for,
    helpers,
    try_handshake,
    tunnel_to,
    write_rules,
)
from tests.promises.scripted_origin import ScriptedOrigin
from tlstunnel.firewall.managed.categories import name_category

CRS = '[sites.managed_rules]\nowasp_crs = true\ntimeout = "10s"\n'
# So that paths with dot segments reach the managed rules.
LENIENT = f"strict_path = false\n{CRS}"


def _head(sample: Sample) -> bytes:
    request = sample.request
    lines = [b"GET %b HTTP/1.1" % request.target]
    for name, value in request.fields:
        lines.append(b"%b: %b" % (name, b"localhost" if name.lower() == b"host" else value))
    return b"\r\n".join([*lines, b"", b""])


@pytest.fixture(scope="module")
def servers(certificate: Certificate) -> Iterator[Servers]:
    require_crs()
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, site=LENIENT) as tunnel:
        yield origin, tunnel


def _each_category() -> list[Sample]:
    """The first attack of each category."""
    found: dict[str, Sample] = {}
    for attack in corpus.attacks():
        found.setdefault(attack.category, attack)
    return list(found.values())


@pytest.mark.parametrize("attack", _each_category(), ids=lambda attack: attack.name)
def test_an_attack_is_refused_and_its_rules_are_in_the_record(servers: Servers, attack: Sample) -> None:
    outcome = try_handshake(servers, request=_head(attack))
    assert (outcome.status, outcome.reason) == (403, "managed rules")
    managed = outcome.record["managed_rules"]
    assert managed["score"] >= 5
    assert attack.category in {name_category(match["id"]) for match in managed["matches"]}
    assert all(match["message"] for match in managed["matches"])


@pytest.mark.parametrize("sample", corpus.handshakes()[::5], ids=lambda sample: sample.name)
def test_an_ordinary_handshake_passes(servers: Servers, sample: Sample) -> None:
    origin, tunnel = servers
    traffic = origin.play(lambda _: b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", then="end")
    with connect_tls(tunnel) as client:
        client.sendall(_head(sample))
        assert client.recv(65536).startswith(b"HTTP/1.1 404 ")
    # The refusal is the origin's, not the tunnel's.
    assert traffic.record(tunnel)["verdict"] == "pass"


@contextlib.contextmanager
def _with_own_rules(certificate: Certificate, folder: Path, more: str) -> Iterator[Servers]:
    require_libmodsecurity()
    site = f'[sites.managed_rules]\nrules = "{write_rules(folder)}"\n{more}'
    with ScriptedOrigin() as origin, tunnel_to(origin.address, certificate, site=site) as tunnel:
        yield origin, tunnel


def _refused(servers: Servers) -> Outcome:
    outcome = try_handshake(servers, "/?x=bad")
    assert outcome.reason == "managed rules"
    return outcome


def test_killed_helper_is_replaced_and_tunnels_stay_open(certificate: Certificate, tmp_path: Path) -> None:
    require_libmodsecurity()
    site = f'[sites.managed_rules]\nrules = "{write_rules(tmp_path)}"\ntimeout = "10s"\n'
    with (
        WebsocketsOrigin() as origin,
        tunnel_to(origin.address, certificate, site=site) as tunnel,
        connect_tls(tunnel) as client,
        ScriptedOrigin() as other,
    ):
        assert upgrade(client).status == 101
        for _ in range(3):
            (pid,) = eventually(lambda: helpers(tunnel))
            os.kill(pid, signal.SIGKILL)
            _echoes(client)
            # One request may have been sent to the helper that was just killed, and is refused for that.
            eventually(lambda: _refused_by_rules((other, tunnel)))
            assert pid not in helpers(tunnel)
        _echoes(client)


def _refused_by_rules(servers: Servers) -> Outcome | None:
    outcome = try_handshake(servers, "/?x=bad")
    if outcome.reason == "managed rules":
        return outcome
    assert outcome.record["managed_rules"]["failure"] == "helper died"
    return None


def _echoes(client: socket.socket) -> None:
    """One masked text message of the tunnel's client, and its echo."""
    client.sendall(b"\x81\x85\x00\x00\x00\x00hello")
    assert receive_exactly(client, 7) == b"\x81\x05hello"


@pytest.mark.parametrize(("on_failure", "status"), [("block", 503), ("allow", 101)])
def test_a_helper_that_hangs_costs_a_request_its_deadline_at_most(
    certificate: Certificate, tmp_path: Path, on_failure: str, status: int
) -> None:
    more = f'timeout = "250ms"\non_failure = "{on_failure}"\n'
    with _with_own_rules(certificate, tmp_path, more) as servers:
        assert try_handshake(servers, "/?x=good").status == 101
        (pid,) = helpers(servers[1])
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        outcome = try_handshake(servers, "/?x=bad", ip="127.0.0.9")
        assert outcome.status == status
        # The deadline, and the time to notice it; the rest allows for a busy machine.
        assert time.monotonic() - start < 5
        assert outcome.record["managed_rules"]["failure"] in {"late", "waited too long"}
        # Killed and replaced.
        eventually(lambda: pid not in helpers(servers[1]))
        assert _refused(servers).status == 403


def test_address_that_missed_the_deadline_is_skipped_for_a_while(certificate: Certificate, tmp_path: Path) -> None:
    with _with_own_rules(certificate, tmp_path, 'timeout = "250ms"\n') as servers:
        (pid,) = eventually(lambda: helpers(servers[1]))
        os.kill(pid, signal.SIGSTOP)
        late = try_handshake(servers, "/?x=good", ip="127.0.0.9")
        assert late.status == 503
        if late.record["managed_rules"]["failure"] == "late":
            again = try_handshake(servers, "/?x=good", ip="127.0.0.9")
            assert (again.status, again.record["managed_rules"]["failure"]) == (503, "late before")
        assert try_handshake(servers, "/?x=good", ip="127.0.0.10").status == 101


def test_missing_rules_prevent_the_start_and_name_the_packages(certificate: Certificate, tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(config_for("localhost:1", certificate, site=CRS + 'crs = "/nowhere"\n'))
    done = subprocess.run(
        [*PROGRAM, "start", "--config", str(file)],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("tlstunnel: "))
    assert str(file) in line
    assert "/nowhere" in line
    assert "modsecurity-crs" in line
    assert "Traceback" not in done.stderr


def test_no_helper_is_left_behind(certificate: Certificate, tmp_path: Path) -> None:
    require_libmodsecurity()
    site = f'[sites.managed_rules]\nrules = "{write_rules(tmp_path)}"\n'
    with ScriptedOrigin() as origin:
        tunnel: Tunnel = tunnel_to(origin.address, certificate, site=site)
        with tunnel:
            (pid,) = eventually(lambda: helpers(tunnel))
        eventually(lambda: not Path(f"/proc/{pid}").exists())
