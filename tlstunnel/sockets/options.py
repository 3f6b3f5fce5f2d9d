"""Options of TCP sockets.

Tested by tests/promises/test_proxy_protocol.py.
"""

import socket

# SO_KEEPALIVE detects a dead peer within 2 minutes if nothing is under way to it. TCP_USER_TIMEOUT would do it for data
# under way, but also resets a peer that is alive and has not read for that long (seen): tunnels look at the
# acknowledgements instead (`Splices`).
KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


def tune(sock: socket.socket) -> None:
    """Set keep-alive 60/15/4 and TCP_NODELAY on a TCP socket. Connections inherit them from a listening socket."""
    set_option = sock.setsockopt
    for option in KEEP_ALIVE:
        set_option(*option)
