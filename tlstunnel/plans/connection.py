"""Connect to the servers that take notices, without the threads of asyncio's resolver.

Tested by tests/unit/test_plans_webhook.py.
"""

import asyncio
import os
import socket
import ssl

from tlstunnel.sockets.resolve import resolve
from tlstunnel.tls.policy import apply_to_client_context

ADDRESS_SECONDS = 5.0
"""How long one address of a name may take if there are others."""


async def connect(host: str, port: int) -> socket.socket:
    """Connect to the first address of `host` that accepts, within the deadline of the caller. Raises OSError."""
    loop = asyncio.get_running_loop()
    addresses = await resolve(host, port)
    last: OSError = OSError(f"{host} has no address")
    for position, (family, address) in enumerate(addresses):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(ADDRESS_SECONDS if position < len(addresses) - 1 else None):
                await loop.sock_connect(sock, address)
        except OSError as error:
            sock.close()
            last = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise last


def make_context() -> ssl.SSLContext:
    """Return a context that verifies a server's certificate by the roots of the system. Raises OSError.

    It is not `ssl.create_default_context`, which would write keys to the file that `SSLKEYLOGFILE` names.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    apply_to_client_context(context)
    context.load_default_certs()
    return context


def describe_failure(error: BaseException) -> str:
    """Return why a connection failed, in a few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, OSError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0)
    if isinstance(error, OSError) and error.strerror:  # of the resolver
        return error.strerror
    return str(error) or type(error).__name__
