"""Options of TCP sockets."""

import socket

# What SO_KEEPALIVE needs to notice a dead origin within 2 minutes, and how long sent data may stay unacknowledged.
_NAMED = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 120_000))
KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _NAMED if hasattr(socket, name)),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


def tune(sock: socket.socket) -> None:
    """Set keep-alive 60/15/4, TCP_USER_TIMEOUT 120 s and TCP_NODELAY on a TCP socket, as far as the system has them.

    On a listening socket: what it accepts inherits them.
    """
    set_option = sock.setsockopt
    for option in KEEP_ALIVE:
        set_option(*option)
