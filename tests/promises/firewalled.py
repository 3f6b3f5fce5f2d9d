"""A tunnel with a policy in front of an origin that records what reaches it, and a client that tries handshakes."""

import http.client
import socket
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tests.harness import (
    TIMEOUT,
    Certificate,
    Header,
    Record,
    Response,
    Tunnel,
    client_context,
    handshake_request,
    read_response,
    receive_all,
    switching_protocols,
)
from tests.promises.scripted_origin import ScriptedOrigin, record_of

Servers = tuple[ScriptedOrigin, Tunnel]


def config_for(origin: str, certificate: Certificate, *, top: str = "", site: str = "") -> str:
    """Return a configuration with the site localhost. `top` comes before it, `site` in it, keys before tables."""
    return (
        f'listen = ["127.0.0.1:0"]\n{top}\n[[sites]]\nnames = ["localhost"]\norigins = ["{origin}"]\n'
        f'cert = "{certificate.cert}"\nkey = "{certificate.key}"\n{site}\n'
    )


def tunnel_to(origin: str, certificate: Certificate, *, top: str = "", site: str = "") -> Tunnel:
    """Return a tunnel with the configuration of `config_for`."""
    return Tunnel(None, certificate, config=config_for(origin, certificate, top=top, site=site))


class Outcome(NamedTuple):
    """The outcome of a handshake. `head` is the request as it reached the origin, b"" if none did."""

    status: int
    headers: http.client.HTTPMessage
    body: str
    record: Record
    head: bytes

    @property
    def reason(self) -> str:
        """The reason of a refusal, in its record."""
        return str(self.record["reason"])

    @property
    def target(self) -> bytes:
        """The target of the request that reached the origin."""
        return self.head.split(b" ", 2)[1]


def connect_from(tunnel: Tunnel, ip: str, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
    """Connect from this address of 127.0.0.0/8: each is another client to the tunnel."""
    plain = socket.create_connection(("127.0.0.1", tunnel.port), TIMEOUT, source_address=(ip, 0))
    try:
        return (context or client_context(tunnel)).wrap_socket(
            plain, server_hostname="localhost", suppress_ragged_eofs=False
        )
    except BaseException:
        plain.close()
        raise


def try_handshake(
    servers: Servers,
    target: str = "/chat",
    headers: Iterable[Header] = (),
    *,
    ip: str = "127.0.0.1",
    request: bytes | None = None,
) -> Outcome:
    """Try to open a tunnel, and close it at once if it opens. Checks what all refusals have in common."""
    origin, tunnel = servers
    traffic = origin.play(switching_protocols)
    with connect_from(tunnel, ip) as client:
        client.sendall(handshake_request(target, headers=headers) if request is None else request)
        answer = read_response(client)
        if answer.status != 101:
            outcome = read_refusal(tunnel, client, answer)
            assert traffic.connections == 0, "an origin was connected to"
            return outcome
    record = traffic.record(tunnel)
    assert record["verdict"] == "pass"
    return Outcome(101, answer.headers, "", record, traffic.heads[0])


def read_refusal(tunnel: Tunnel, client: ssl.SSLSocket, answer: Response) -> Outcome:
    """Read the rest of a refusal: its id must be in the body and the log, and the log must have its status."""
    body = (answer.leftover + receive_all(client)).decode()
    record = record_of(tunnel, answer.headers)
    assert record["id"] in body
    assert (record["status"], record["verdict"], record["ended_by"]) == (answer.status, "refused", "tunnel"), record
    assert record["origin"] == ""
    return Outcome(answer.status, answer.headers, body, record, b"")


def write_rules(folder: Path) -> Path:
    """Write own managed rules, which load faster than a core rule set: ``x=bad`` is refused."""
    path = folder / "own.conf"
    path.write_text('SecRule ARGS:x "@streq bad" "id:1001,phase:2,deny,status:403,msg:\'bad x\'"\n')
    return path


def helpers(tunnel: Tunnel) -> list[int]:
    """Return the processes that evaluate managed rules: the children of the tunnel's children."""
    return [child for loader in children(tunnel.pid) for child in children(loader)]


def children(pid: int) -> list[int]:
    """Return the children of all threads of the process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found
