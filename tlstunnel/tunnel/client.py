"""The client's side of a connection: one object from accept until the socket is closed or spliced.

Tested by tests/unit/test_turn.py.
"""

import socket

from tlstunnel.certificates.clients import ClientRefused
from tlstunnel.sockets.channel import Channel
from tlstunnel.sockets.deadlines import Wakeup
from tlstunnel.tunnel.serving import Serving
from tlstunnel.tunnel.sites import Site


class Client:
    """One connection of a client, whatever requests it sends. The arrival stages fill it in.

    `socket_peer` is the address of the socket's peer, "" for a Unix socket. `peer` is the same, or the address in its
    PROXY header. `trusted` means that the peer is a proxy whose forwarding fields are used. `site` is None until the
    hello has chosen one. `certificate` is the client's, in DER, if the site has an edge worker or its origins get a
    PROXY header with TLS. `certificate_refusal` says why the certificate is not accepted, None if it is.
    """

    __slots__ = (
        "accepted",
        "certificate",
        "certificate_refusal",
        "channel",
        "cipher",
        "ja4",
        "peer",
        "proxied",
        "serving",
        "site",
        "sni",
        "socket_peer",
        "subject",
        "tls_version",
        "trusted",
        "wakeup",
    )

    def __init__(self, serving: Serving, sock: socket.socket, peer: str, accepted: float, *, proxied: bool) -> None:
        self.serving = serving
        self.peer = self.socket_peer = peer
        self.accepted = accepted
        self.proxied = proxied
        self.trusted = not proxied and bool(peer and serving.trusted_proxies) and peer in serving.trusted_proxies
        self.sni = self.ja4 = self.tls_version = self.cipher = ""
        self.subject = ""
        self.certificate_refusal: ClientRefused | None = None
        self.certificate: bytes | None = None
        self.site: Site | None = None
        self.wakeup = Wakeup(serving.loop, accepted + serving.timeouts.tls_handshake)
        serving.deadlines.add(self.wakeup)
        self.channel = Channel(sock, serving.readiness, self.wakeup)

    def __repr__(self) -> str:
        state = self.tls_version or (f"SNI {self.sni}" if self.sni else "no TLS yet")
        return f"<Client {self.peer or 'of a Unix socket'}: {state}>"

    def set_timeout(self, seconds: float) -> None:
        """Let what the connection waits for next take at most `seconds` from now."""
        self.wakeup.deadline = self.serving.loop.time() + seconds

    def release(self) -> None:
        """Watch the connection no longer: neither its deadline nor its socket, which stays open."""
        self.serving.deadlines.discard(self.wakeup)
        self.channel.release()
