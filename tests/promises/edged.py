"""A tunnel whose site has an edge worker, in a file beside its configuration, asked one handshake after another."""

import json
import signal
import ssl
from collections.abc import Iterable
from typing import Any

from tests.harness import (
    Certificate,
    Header,
    Record,
    Response,
    Tunnel,
    eventually,
    handshake_request,
    read_response,
    switching_protocols,
)
from tests.promises.firewalled import Outcome, Servers, config_for, connect_from
from tests.promises.scripted_origin import record_of
from tests.promises.wire import read_until_end

BY_PATH = '''
import asyncio, json, sys, time
from tlstunnel.edge import Reply, WorkerRequest


async def fetch(request, env):
    """The function that the first segment of the path names, "asis" for none."""
    return await globals()[request.path.split("/")[1] or "asis"](request, env)


async def asis(request, env):
    return request
'''
"""What a worker of many functions begins with."""

FETCH = 'worker = "worker.py:fetch"\n'


def edged(origin: str, certificate: Certificate, code: str, *, top: str = "", site: str = "", **options: Any) -> Tunnel:
    """A tunnel with `policy` whose site has this worker; ``options`` are `Tunnel`'s."""
    config = config_for(origin, certificate, top=top, site=FETCH + site)
    tunnel = Tunnel(None, certificate, config=config, **options)
    written(tunnel, code)
    return tunnel


def written(tunnel: Tunnel, code: str, name: str = "worker.py") -> None:
    """Put a worker's code where the configuration looks for it, in one step."""
    new = tunnel.folder / f"{name}.new"
    new.write_text(code)
    new.replace(tunnel.folder / name)


def asked(
    stage: Servers,
    target: str = "/",
    headers: Iterable[Header] = (),
    *,
    ip: str = "127.0.0.1",
    context: ssl.SSLContext | None = None,
    request: bytes | None = None,
) -> Outcome:
    """Ask for a tunnel, and end it at once where there is one. A refusal reaches no origin: that is checked here."""
    origin, tunnel = stage
    traffic = origin.play(switching_protocols)
    with connect_from(tunnel, ip, context) as client:
        client.sendall(handshake_request(target, headers=headers) if request is None else request)
        answer = read_response(client)
        if answer.status != 101:
            outcome = _refused(tunnel, client, answer)
            assert traffic.connections == 0, "an origin was asked"
            return outcome
    record = record_of(tunnel, traffic.record(tunnel)["id"])
    assert record["verdict"] == "pass"
    return Outcome(101, answer.headers, "", record, traffic.heads[0])


def told(stage: Servers, target: str, headers: Iterable[Header] = (), **options: Any) -> Any:
    """What a worker says in JSON, in a refusal."""
    return json.loads(asked(stage, target, headers, **options).body)


def _refused(tunnel: Tunnel, client: ssl.SSLSocket, answer: Response) -> Outcome:
    body = (answer.leftover + read_until_end(client)).decode()
    record = record_of(tunnel, answer.headers)
    assert (record["status"], record["verdict"], record["ended_by"]) == (answer.status, "refused", "tunnel"), record
    return Outcome(answer.status, answer.headers, body, record, b"")


def reloaded(tunnel: Tunnel, config: str | None = None) -> list[str]:
    """Reload it by a signal, which takes less time than the command; give the changes."""
    if config is not None:
        written(tunnel, config, tunnel.file.name)
    return list(_after_hangup(tunnel, "reloaded")["changes"])


def not_reloaded(tunnel: Tunnel, config: str | None = None) -> str:
    """Try to reload it by a signal, in vain; give the reason."""
    if config is not None:
        written(tunnel, config, tunnel.file.name)
    return str(_after_hangup(tunnel, "not reloaded")["reason"])


def _after_hangup(tunnel: Tunnel, event: str) -> Record:
    ended = ("reloaded", "not reloaded")
    seen = len([record for record in tunnel.records() if record["event"] in ended])
    tunnel.send_signal(signal.SIGHUP)
    eventually(lambda: len([record for record in tunnel.records() if record["event"] in ended]) > seen)
    record = [record for record in tunnel.records() if record["event"] in ended][-1]
    assert record["event"] == event, record
    return record
