"""Tunnels end when an operator says so, or at the time that an edge worker has set; the others are not affected."""

import base64
import contextlib
import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_main
from tests.harness import (
    Certificate,
    RawOrigin,
    Record,
    Tunnel,
    client_context,
    connect_tls,
    echo_bytes,
    eventually,
    handshake_request,
    receive_all,
    receive_exactly,
    upgrade,
)
from tests.promises.administered import ALICE, RITA, Admin, write_tokens
from tests.promises.edged import BY_PATH, edged
from tests.promises.listed import Client, clients_of, list_all
from tests.promises.versions import Versions, upgraded
from tests.redis_server import RedisServer
from tlstunnel.errors import ControlError
from tlstunnel.processes.reach import send_command

WORKER = (
    BY_PATH
    + '''
from datetime import UTC, datetime, timedelta


async def tagged(request, env):
    """/tagged/USER/..."""
    return request.forward(tags={"user": request.path.split("/")[2], "kind": "test"})


async def slow(request, env):
    """/slow/USER: it takes as long as a file of that name does not exist."""
    from pathlib import Path
    while not Path(request.path.split("/")[2]).exists():
        await asyncio.sleep(0.01)
    return await tagged(request, env)


async def until(request, env):
    """/until/SECONDS from now; as a datetime, if there is one more word."""
    seconds, *datetimes = request.path.split("/")[2:]
    if datetimes:
        return request.forward(until=datetime.now(UTC) + timedelta(seconds=float(seconds)), tags={"user": "1"})
    return request.forward(until=time.time() + float(seconds))


async def wrong(request, env):
    """/wrong/EXPRESSION, in base64: the arguments of forward."""
    import base64
    arguments = eval(base64.urlsafe_b64decode(request.path.split("/")[2]))
    return request.forward(**arguments)
'''
)

TOP = 'processes = 2\nrelease.drain_over = "0s"'


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(echo_bytes) as origin:
        yield origin


@pytest.fixture(scope="module")
def tunnel(origin: RawOrigin, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    site = 'worker_timeout = "1m"\nworker_on_error = "forward"'
    tokens = write_tokens(tmp_path_factory.mktemp("tokens"))
    top = f'{TOP}\n[admin]\nlisten = "127.0.0.1:0"\n{tokens}'
    with edged(origin.address, certificate, WORKER, top=top, site=site) as tunnel:
        yield tunnel


def end(tunnel: Tunnel, **fields: Any) -> dict[str, Any]:
    return send_command(tunnel.control, {"do": "end tunnels", **fields})


def has_ended(client: Client) -> None:
    """Check that a client gets close_notify and FIN, and nothing else."""
    assert receive_all(client.sock) == b""


def record_at(tunnel: Tunnel, path: str) -> Record:
    return tunnel.wait_record(lambda record: record["event"] == "connection" and record["path"] == path)


@contextlib.contextmanager
def users(tunnel: Tunnel, name: str, count: int = 8) -> Iterator[tuple[list[Client], list[Client]]]:
    """Open tunnels of a user, and of another one."""
    with clients_of(tunnel, count, f"tagged/{name}/") as own, clients_of(tunnel, count, f"tagged/{name}2/") as others:
        yield own, others


def test_all_tunnels_of_a_user_end_within_a_second(tunnel: Tunnel) -> None:
    with users(tunnel, "42") as (own, others):
        assert {one["process"] for one in list_all(tunnel, tag="user=42")} == set(tunnel.pids)
        began = time.monotonic()
        ended = end(tunnel, tag="user=42", why="signed out")
        for client in own:
            has_ended(client)
        assert time.monotonic() - began < 1.0
        assert ended["number"] == len(own)
        assert (ended["announced"], ended["silent"], ended["problem"]) == (False, [], "")
        for client in others:
            client.echo(100)
        assert list_all(tunnel, tag="user=42") == []
        for client in own:
            record = record_at(tunnel, client.path)
            assert (record["ended_by"], record["reason"]) == ("tunnel", "ended by request")
            assert re.fullmatch(r".+ \(uid \d+\)", record["asked_by"])
            assert record["why"] == "signed out"
            assert record["tags"] == {"kind": "test", "user": "42"}


def test_what_was_sent_before_is_delivered(tunnel: Tunnel) -> None:
    with clients_of(tunnel, 1, "tagged/sending/") as (client,):
        client.sock.sendall(bytes(100_000))
        eventually(lambda: list_all(tunnel, tag="user=sending")[0]["down"] == 100_000)
        end(tunnel, tag="user=sending")
        assert receive_all(client.sock) == bytes(100_000)


def test_a_client_that_does_not_stop_sending_is_ended_all_the_same(tunnel: Tunnel) -> None:
    """Not only after `timeouts.close`, which is 30 s."""
    with clients_of(tunnel, 1, "tagged/flooding/") as (client,):
        done = threading.Event()

        def flood() -> None:
            with contextlib.suppress(OSError):
                while not done.is_set():
                    client.sock.sendall(bytes(1000))

        def read() -> None:
            with contextlib.suppress(OSError):
                while client.sock.recv(65_536):
                    pass

        threads = [threading.Thread(target=flood), threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        end(tunnel, tag="user=flooding")
        record = record_at(tunnel, client.path)
        done.set()
        for thread in threads:
            thread.join()
        assert record["reason"] == "ended by request"
        assert time.monotonic() - began < 10


def test_one_tunnel_by_its_id(tunnel: Tunnel) -> None:
    with users(tunnel, "one", 2) as ((first, second), _):
        (found,) = [one for one in list_all(tunnel) if one["path"] == first.path]
        control = ["--control", str(tunnel.control)]
        assert run_main("tunnels", "end", *control, found["id"]).output == "1 tunnel ended\n"
        has_ended(first)
        second.echo(10)
        assert run_main("tunnels", "end", *control, found["id"]).output == "0 tunnels ended\n"


def test_the_same_by_http(tunnel: Tunnel) -> None:
    admin = Admin(tunnel)
    path, wanted = "/api/v1/tunnels/end", {"tag": "user=http", "why": "signed out"}
    with users(tunnel, "http", 3) as ((first, *rest), others):
        listed = admin.get("/api/v1/tunnels?tag=user=http&limit=2")
        assert (listed["total"], len(listed["tunnels"]), listed["tunnels"][0]["path"]) == (3, 2, first.path)
        (last,) = admin.get(f"/api/v1/tunnels?tag=user=http&limit=2&after={listed['next']}")["tunnels"]
        assert last["path"] == rest[-1].path
        for token, status in (("", 401), (RITA, 403)):
            assert admin.ask("POST", path, body=wanted, token=token).status == status
        assert admin.ask("POST", path, body={"site": "localhost"}, token=ALICE).status == 409
        one = admin.ask("DELETE", f"/api/v1/tunnels/{listed['tunnels'][0]['id']}", token=ALICE)
        assert (one.status, one.json["number"]) == (200, 1)
        has_ended(first)
        rest[0].echo(10)
        assert admin.ask("POST", path, body=wanted, token=ALICE).json["number"] == 2
        for client in rest:
            has_ended(client)
        for client in others:
            client.echo(10)
    assert "alice" in record_at(tunnel, rest[0].path)["asked_by"]


def test_all_of_a_site_have_to_be_confirmed(tunnel: Tunnel) -> None:
    control = ["--control", str(tunnel.control)]
    with users(tunnel, "all", 2) as (own, _):
        for wide in ({"site": "localhost"}, {"tag": "kind"}, {"older": 0.01}, {"origin": "x:1"}):
            with pytest.raises(ControlError, match="confirm that they are meant"):
                end(tunnel, **wide)
        with pytest.raises(ControlError, match="give at least one filter"):
            end(tunnel, confirm=True)
        for words in (["--site", "localhost"], ["--tag", "kind"]):
            answered = run_main("tunnels", "end", *control, *words)
            assert answered.exit_code == 1
            assert re.search(r"End \d+ tunnels\? \[y/N\]", answered.output)
        failed = run_main("tunnels", "end", *control, "--site", "localhost", "--json")
        assert (failed.exit_code, json.loads(failed.stdout)["ok"]) == (1, False)
        assert run_main("tunnels", "--site", "localhost", "end", *control, "--tag", "user=none").exit_code == 2
        own[0].echo(10)
        ended = json.loads(
            run_main("tunnels", "end", *control, "--tag", "user", "--site", "localhost", "--yes", "--json").stdout
        )
        assert ended["number"] >= 4
        has_ended(own[0])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tag": "user=1", "why": "x" * 201}, "why is longer than 200 characters"),
        ({"client": "nobody"}, '"nobody" is not a network'),
        ({"tag": "x" * 2000}, "tag is longer than 1024 characters"),
        ({"tag": "user=1", "older": -1}, "older"),
        ({"tag": 5}, "tag"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_means_nothing_is_refused(tunnel: Tunnel, fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ControlError, match=re.escape(problem)):
        end(tunnel, **fields)


def test_why_is_escaped_in_the_log(tunnel: Tunnel) -> None:
    with clients_of(tunnel, 1, "tagged/escaped/") as (client,):
        end(tunnel, tag="user=escaped", why="\x1b[2J\n")
        assert record_at(tunnel, client.path)["why"] == "\\x1b[2J\\n"


def test_a_handshake_that_has_begun_is_caught(tunnel: Tunnel) -> None:
    """The worker has accepted the user already, or is about to, when the command comes."""
    name = f"{tunnel.folder}/{secrets.token_hex(8)}".replace("/", "")
    context = client_context(tunnel)
    with connect_tls(tunnel, context=context) as early:
        path = f"/slow/{name}"
        early.sendall(handshake_request(path))
        eventually(lambda: sum(one["handshakes"] for one in tunnel.status()["processes"]) == 1)
        time.sleep(0.05)
        assert end(tunnel, tag=f"user={name}", why="signed out")["number"] == 0
        # The worker looks for this file in the folder in which the tunnel runs.
        (tunnel.folder / name).touch()
        assert receive_all(early).startswith(b"HTTP/1.1 101 ")
        record = record_at(tunnel, path)
        assert (record["reason"], record["why"]) == ("ended by request", "signed out")
    # Who signs in again afterwards stays.
    with clients_of(tunnel, 1, f"tagged/{name}/") as (later,):
        later.echo(100)


def test_other_tags_of_a_handshake_are_not_caught(tunnel: Tunnel) -> None:
    end(tunnel, tag="user=nobody")
    with clients_of(tunnel, 1, "tagged/somebody/") as (client,):
        client.echo(10)


# --- until ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/until/1.2/", "/until/1.2/datetime"])
def test_a_tunnel_ends_at_its_time(tunnel: Tunnel, path: str) -> None:
    with connect_tls(tunnel) as client:
        began = time.time()
        assert upgrade(client, path.rstrip("/")).status == 101
        (found,) = [one for one in list_all(tunnel) if one["path"] == path.rstrip("/")]
        assert found["until"] == pytest.approx(began + 1.2, abs=1.0)
        client.sendall(b"ping")
        assert receive_exactly(client, 4) == b"ping"
        assert receive_all(client) == b""
        assert time.time() >= began + 1.2
    record = record_at(tunnel, path.rstrip("/"))
    assert (record["ended_by"], record["reason"]) == ("tunnel", "expired")
    assert record["seconds"] < 1.2 + 1.0 + 5.0


def test_a_time_that_is_over_is_refused(tunnel: Tunnel) -> None:
    for seconds in ("-1", "-1e9", "0"):
        with connect_tls(tunnel) as client:
            assert upgrade(client, f"/until/{seconds}").status == 403
    assert record_at(tunnel, "/until/-1")["reason"] == "edge: expired"


WRONG = [
    "{'until': '2026-01-01'}",
    "{'until': datetime.now()}",
    "{'until': True}",
    "{'until': float('nan')}",
    "{'until': 10 ** 400}",
    "{'until': time.time() * 1000}",
    "{'tags': {'user': 42}}",
    "{'tags': {'user': None}}",
    "{'tags': {'user': ''}}",
    "{'tags': {'user': 'x' * 256}}",
    "{'tags': {'user': 'a\\r\\nb'}}",
    "{'tags': {'user': chr(27)}}",
    "{'tags': {'user': chr(0x202e)}}",
    "{'tags': {'user': chr(0xd800)}}",
    "{'tags': {'user=': '1'}}",
    "{'tags': {'': '1'}}",
    "{'tags': {1: '1'}}",
    "{'tags': [('user', '1')]}",
    "{'tags': {str(n): '1' for n in range(9)}}",
    "{'tags': {f'a{n}': '1' for n in range(9)}}",
    "{'tags': {f'a{n}': 'x' * 128 for n in range(4)}}",
]


@pytest.mark.parametrize("arguments", WRONG)
def test_what_a_worker_may_not_say_is_refused(tunnel: Tunnel, arguments: str) -> None:
    """Although `worker_on_error` is "forward": nobody could end the tunnel."""
    with connect_tls(tunnel) as client:
        path = f"/wrong/{base64.urlsafe_b64encode(arguments.encode()).decode()}"
        assert upgrade(client, path).status == 500
    assert record_at(tunnel, path)["reason"] == "edge: worker failed"


def test_tags_with_odd_characters(tunnel: Tunnel) -> None:
    value = "ü=\\\"' <b>{é}"
    arguments = repr({"tags": {"user": value}})
    with connect_tls(tunnel) as client:
        path = f"/wrong/{base64.urlsafe_b64encode(arguments.encode()).decode()}"
        assert upgrade(client, path).status == 101
        (found,) = list_all(tunnel, tag=f"user={value}")
        assert found["tags"] == {"user": value}
        ended = run_main("tunnels", "end", "--control", str(tunnel.control), "--tag", f"user={value}")
        assert ended.output == "1 tunnel ended\n"
        assert receive_all(client) == b""
    assert record_at(tunnel, path)["tags"] == {"user": value}
    assert value not in json.dumps(tunnel.status()["metrics"], ensure_ascii=False)


# --- upgrade, and several machines ------------------------------------------------------------------------------------


def test_tunnels_of_an_earlier_generation_end_too(origin: RawOrigin, certificate: Certificate, tmp_path: Path) -> None:
    versions = Versions(tmp_path / "versions")
    with (
        edged(
            origin.address, certificate, WORKER, top='release.drain_over = "0s"', environment=versions.environment
        ) as tunnel,
        clients_of(tunnel, 2, "tagged/7/") as before,
    ):
        versions.install("2.0.0")
        upgraded(tunnel)
        with clients_of(tunnel, 2, "tagged/7/new") as after:
            assert end(tunnel, tag="user=7")["number"] == 4
            for client in (*before, *after):
                has_ended(client)


@contextlib.contextmanager
def machines(
    origin: RawOrigin, certificate: Certificate, server: RedisServer, count: int = 2
) -> Iterator[list[Tunnel]]:
    """Two tunnels as on two machines, with one server."""
    top = f'{TOP}\n[state]\nurl = "{server.url}"'
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(edged(origin.address, certificate, WORKER, top=top, errors_expected=True))
            for _ in range(count)
        ]


def test_tunnels_of_other_machines_end_too(origin: RawOrigin, certificate: Certificate) -> None:
    """Also after the server was away, after the ledger was killed, and with garbage in the server."""
    with RedisServer() as server, machines(origin, certificate, server) as (here, there):
        began = end_there(here, there, "first")
        assert time.monotonic() - began < 1.0
        assert there.records("ended tags") == []
        fill_with_garbage(server)
        end_there(here, there, "second")
        os.kill(there.status()["ledger"]["process"], signal.SIGKILL)
        end_there(here, there, "third")
        with clients_of(there, 1, "tagged/away/") as (client,):
            server.kill()
            ended = end(here, tag="user=away", why="signed out")
            assert not ended["announced"]
            assert "other machines are told once it does" in ended["problem"]
            client.echo(10)
            server.start()
            has_ended(client)
        # Those who came later are not meant.
        with clients_of(there, 1, "tagged/first/") as (client,):
            end_there(here, there, "fourth")
            client.echo(10)


def end_there(here: Tunnel, there: Tunnel, user: str) -> float:
    """End the tunnels of a user; return when that was asked."""
    with clients_of(there, 4, f"tagged/{user}/") as own, clients_of(there, 2, "tagged/other/") as others:
        began = time.monotonic()
        eventually(lambda: _is_announced(here, user))
        for client in own:
            has_ended(client)
        for client in others:
            client.echo(10)
        record = record_at(there, own[0].path)
        assert record["reason"] == "ended by request"
        assert re.fullmatch(r".+ \(uid \d+\) at .+", record["asked_by"])
        assert record["why"] == f"why {user}"
        return began


def _is_announced(here: Tunnel, user: str) -> bool:
    ended = end(here, tag=f"user={user}", why=f"why {user}")
    assert ended["number"] == 0
    return bool(ended["announced"])


def fill_with_garbage(server: RedisServer) -> None:
    """Write what no machine writes, as whoever can write to the server could."""
    key = "{tlstunnel}:ended"
    now = int(time.time() * 1e6)
    for score in (now, now + 1, "inf", "-inf", "1.5", now + 10**12):
        for text in (b"", b"\x00\xff", b"x" * 100_000, b"e30=", b"!", secrets.token_bytes(100)):
            server.command("ZADD", key, str(score), text)
    for number in range(500):
        forged = {"format": 1, "token": str(number), "instance": "x", "ended": {"tag": f"a{number}", "who": "x"}}
        server.command("ZADD", key, now, base64.urlsafe_b64encode(json.dumps(forged).encode()))
