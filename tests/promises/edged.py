"""A tunnel whose site has an edge worker, in a file next to its configuration, and handshakes with it."""

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
    """Call the function that the first segment of the path names, `asis` if it names none."""
    return await globals()[request.path.split("/")[1] or "asis"](request, env)


async def asis(request, env):
    return request
'''
"""The beginning of a worker with many functions."""

FETCH = 'worker = "worker.py:fetch"\n'


def edged(origin: str, certificate: Certificate, code: str, *, top: str = "", site: str = "", **options: Any) -> Tunnel:
    """Start a tunnel with `policy` whose site has this worker; ``options`` are those of `Tunnel`."""
    config = config_for(origin, certificate, top=top, site=FETCH + site)
    tunnel = Tunnel(None, certificate, config=config, **options)
    written(tunnel, code)
    return tunnel


def written(tunnel: Tunnel, code: str, name: str = "worker.py") -> None:
    """Write a worker's code atomically to the file that the configuration names."""
    new = tunnel.folder / f"{name}.new"
    new.write_text(code)
    new.replace(tunnel.folder / name)


def attempt(
    stage: Servers,
    target: str = "/",
    headers: Iterable[Header] = (),
    *,
    ip: str = "127.0.0.1",
    context: ssl.SSLContext | None = None,
    request: bytes | None = None,
) -> Outcome:
    """Request a tunnel, and close it at once if it opens. Check that a refused request reaches no origin."""
    origin, tunnel = stage
    traffic = origin.play(switching_protocols)
    with connect_from(tunnel, ip, context) as client:
        client.sendall(handshake_request(target, headers=headers) if request is None else request)
        answer = read_response(client)
        if answer.status != 101:
            outcome = _refused(tunnel, client, answer)
            assert traffic.connections == 0, "an origin was connected to"
            return outcome
    record = record_of(tunnel, traffic.record(tunnel)["id"])
    assert record["verdict"] == "pass"
    return Outcome(101, answer.headers, "", record, traffic.heads[0])


def reply_json(stage: Servers, target: str, headers: Iterable[Header] = (), **options: Any) -> Any:
    """Return the JSON in a worker's reply."""
    return json.loads(attempt(stage, target, headers, **options).body)


def _refused(tunnel: Tunnel, client: ssl.SSLSocket, answer: Response) -> Outcome:
    body = (answer.leftover + read_until_end(client)).decode()
    record = record_of(tunnel, answer.headers)
    assert (record["status"], record["verdict"], record["ended_by"]) == (answer.status, "refused", "tunnel"), record
    return Outcome(answer.status, answer.headers, body, record, b"")


def reloaded(tunnel: Tunnel, config: str | None = None) -> list[str]:
    """Reload with a signal, which is faster than the command, and return the changes."""
    if config is not None:
        written(tunnel, config, tunnel.file.name)
    return list(_after_hangup(tunnel, "reloaded")["changes"])


def not_reloaded(tunnel: Tunnel, config: str | None = None) -> str:
    """Attempt a reload with a signal that is refused, and return the reason."""
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
