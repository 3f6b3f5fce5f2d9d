"""Options of TCP sockets.

Tested by tests/promises/test_proxy_protocol.py.
"""

import socket

# SO_KEEPALIVE detects a dead peer within 2 minutes; sent data may stay unacknowledged for the same time.
KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 120_000),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


def tune(sock: socket.socket) -> None:
    """Set keep-alive 60/15/4, TCP_USER_TIMEOUT 120 s and TCP_NODELAY on a TCP socket.

    Connections inherit them from a listening socket.
    """
    set_option = sock.setsockopt
    for option in KEEP_ALIVE:
        set_option(*option)
