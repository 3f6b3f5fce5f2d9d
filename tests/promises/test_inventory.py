"""A running tunnel says how its sites and origins do, and why it refused whom."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    connect_tcp,
    connect_tls,
    echo_bytes,
    eventually,
    receive_all,
    receive_exactly,
    upgrade,
)
from tests.promises.firewalled import config_for
from tlstunnel.errors import ControlError
from tlstunnel.processes.reach import send_command


def ask(tunnel: Tunnel, do: str, **fields: object) -> Any:
    return send_command(tunnel.control, {"do": do, **fields})


def find_site(tunnel: Tunnel, **figures: int) -> Any:
    """Return the only site once it has these figures: the parent has them a second later."""
    (site,) = ask(tunnel, "sites")["sites"]
    return site if figures.items() <= site.items() else None


@pytest.fixture(scope="module")
def dead() -> Iterator[str]:
    """The address of an origin that refuses connections."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture(scope="module")
def tunnel(certificate: Certificate, dead: str) -> Iterator[Tunnel]:
    site = f"""
    http = "pass"
    [[sites.rules]]
    name = "never"
    when = 'path == "/never"'
    action = "block"
    [[sites.rules]]
    name = "tried"
    when = 'path == "/down/x"'
    action = "block"
    mode = "log"
    [[sites.routes]]
    path = "/down/"
    origins = ["{dead}"]
    """
    with (
        RawOrigin(echo_bytes) as origin,
        Tunnel(
            None, certificate, config=config_for(origin.address, certificate, site=site), arguments=("--processes", "2")
        ) as tunnel,
    ):
        yield tunnel


def test_sites_have_exact_figures(tunnel: Tunnel) -> None:
    with connect_tls(tunnel) as client:
        assert upgrade(client).status == 101
        client.sendall(b"four")
        assert receive_exactly(client, 4) == b"four"
        site = eventually(lambda: find_site(tunnel, tunnels=1))
    assert site["names"] == ["localhost"]
    assert site["origins"] == 2
    assert site["certificate_days"] > 0
    eventually(lambda: find_site(tunnel, tunnels=0, bytes_up=4, bytes_down=4))


def test_an_unknown_site_is_an_error(tunnel: Tunnel) -> None:
    for command in ("sites", "origins"):
        with pytest.raises(ControlError, match="there is no site"):
            ask(tunnel, command, site="other.test")


def test_an_origin_that_refuses_connections_is_down(tunnel: Tunnel, dead: str) -> None:
    refused = 0

    def find_unhealthy() -> list[Any]:
        nonlocal refused
        with connect_tls(tunnel) as client:
            refused += 1
            assert upgrade(client, path="/down/").status == 502
        return list(ask(tunnel, "origins", unhealthy=True)["origins"])

    (origin,) = eventually(find_unhealthy)
    assert (origin["address"], origin["route"], origin["state"]) == (dead, "/down/", "down")
    assert origin["problem"].endswith("Connection refused")
    assert origin["failures"] == refused
    listed = ask(tunnel, "origins", site="localhost", limit=1)
    assert listed["total"] == 2
    assert listed["origins"][0]["state"] == "healthy"


def test_a_refusal_says_what_every_stage_decided(tunnel: Tunnel) -> None:
    with connect_tls(tunnel) as client:
        refused = upgrade(client, path="/never")
    (refusal,) = eventually(lambda: ask(tunnel, "refusals", id=refused.headers["X-Request-Id"])["refusals"])
    assert refusal["record"]["reason"] == "rule: never"
    decisions = {stage["stage"]: stage["decision"] for stage in refusal["stages"]}
    assert (decisions["request"], decisions["firewall: rules"]) == ("passed", "refused")
    assert decisions["edge"] == decisions["origin"] == "not reached"
    assert "rules" in refusal["advice"]
    assert refusal["document"].startswith("docs/firewall.md")


def test_a_rule_that_only_logs_is_named(tunnel: Tunnel) -> None:
    with connect_tls(tunnel) as client:
        upgrade(client, path="/down/x")
    (refusal,) = eventually(
        lambda: [one for one in ask(tunnel, "refusals")["refusals"] if one["record"]["path"] == "/down/x"]
    )
    assert [stage["decision"] for stage in refusal["stages"] if stage["stage"] == "firewall: rules"] == ["logged"]
    assert [stage["decision"] for stage in refusal["stages"] if stage["stage"] == "origin"] == ["refused"]


def test_failures_before_tls_are_there_too(tunnel: Tunnel) -> None:
    with connect_tcp(tunnel) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        receive_all(client)
    found = eventually(lambda: ask(tunnel, "refusals", reason="hello: plain HTTP")["refusals"])
    assert found[0]["record"]["event"] == "no TLS handshake"
    assert found[0]["id"]
    assert ask(tunnel, "refusals", client="192.0.2.99")["refusals"] == []


def test_the_latest_refusals_come_first(tunnel: Tunnel) -> None:
    for _ in range(3):
        with connect_tls(tunnel) as client:
            upgrade(client, path="/never")
    found = eventually(lambda: (r := ask(tunnel, "refusals", site="localhost", limit=3)["refusals"])[2:] and r)
    assert [one["at"] for one in found] == sorted((one["at"] for one in found), reverse=True)


def test_certificates_are_described(tunnel: Tunnel, certificate: Certificate) -> None:
    (found,) = ask(tunnel, "certificates")["certificates"]
    assert found["file"] == str(certificate.cert)
    assert found["sites"] == ["localhost"]
    assert "localhost" in found["names"]
    assert found["days"] > 0


def test_the_configuration_is_shown_with_its_sources(tunnel: Tunnel) -> None:
    shown = ask(tunnel, "configuration", site="localhost")
    assert shown["file"] == str(tunnel.file)
    assert shown["configuration"]["timeouts"]["request"] == "10s"
    assert shown["configuration"]["sites"][0]["names"] == ["localhost"]
    assert shown["sources"]["sites[0].names"] == "file"
    assert shown["sources"]["processes"] == "command line"
    assert shown["arguments"]["processes"] == 2
    assert shown["loaded"] > 0


def test_loads_say_who_and_what(tunnel: Tunnel) -> None:
    before = tunnel.file.read_text()
    tunnel.reload(before.replace("[[sites]]", '[timeouts]\nidle = "1h"\n[[sites]]', 1))
    tunnel.file.write_text("listen = 1\n")
    tunnel.reload(status=1)
    tunnel.file.write_text(before)
    failed, reloaded, started = ask(tunnel, "loads")["loads"]
    assert started["what"] == "start"
    assert (reloaded["changes"], reloaded["problems"]) == (["timeouts.idle: off -> 60m"], [])
    assert "uid" in reloaded["who"]
    assert any("listen" in problem for problem in failed["problems"])
    assert failed["changes"] == []


def test_the_status_command_shows_tables(tunnel: Tunnel) -> None:
    assert tunnel.run_command("status", "--sites")[1].startswith("localhost")
    assert any(line.split()[0] == "localhost/down/" for line in tunnel.run_command("status", "--origins"))
    assert "localhost" in tunnel.run_command("status", "--certificates")[1]
    assert '"sites"' in tunnel.run_command("status", "--sites", "--json")[-1]


def test_records_are_for_the_admin_process_only(tunnel: Tunnel) -> None:
    with pytest.raises(ControlError, match="unknown command"):
        ask(tunnel, "watch records")
