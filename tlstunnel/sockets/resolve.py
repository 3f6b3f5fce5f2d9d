"""Resolve a name in a thread that nothing waits for.

asyncio's own look-up uses the threads of an executor, and a program waits for those when it exits: with a resolver that
did not respond, it took 11 s.
"""

import asyncio
import contextlib
import socket
import threading

MAX_LOOKUPS = 32
"""Look-ups at the same time: a resolver may hang, and an edge worker may derive names from what clients send."""

THREAD_NAME = "resolver"
"""The name of the threads. They hold nothing, so an exit may interrupt them."""

SocketAddress = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes] | str
Address = tuple[socket.AddressFamily, SocketAddress]

_lookups = threading.BoundedSemaphore(MAX_LOOKUPS)


async def resolve(host: str, port: int) -> list[Address]:
    """Return the addresses of `host`, for TCP connections to `port`. Raises OSError."""
    if not _lookups.acquire(blocking=False):
        raise OSError(f"{MAX_LOOKUPS} look-ups are waiting for the resolver already")
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[Address]] = loop.create_future()

    def report(result: list[Address] | OSError) -> None:
        if found.done():
            return
        if isinstance(result, OSError):
            found.set_exception(result)
        else:
            found.set_result(result)

    def look_up() -> None:
        result: list[Address] | OSError
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            result = [(family, address) for family, _, _, _, address in addresses]
        except OSError as error:
            result = error
        except UnicodeError as error:  # a name that IDNA refuses
            result = OSError(str(error))
        finally:
            _lookups.release()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the program exits
            loop.call_soon_threadsafe(report, result)

    try:
        threading.Thread(target=look_up, name=THREAD_NAME, daemon=True).start()
    except RuntimeError as error:  # no more threads
        _lookups.release()
        raise OSError(str(error)) from None
    return await found
