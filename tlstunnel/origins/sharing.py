"""What the processes that use the same origins share: counts of tunnels, by keys, and ejections, by announcements.

A key stands for an origin of one pool, as limits do: the same origin of two sites is counted twice, with one process as
with several. An origin on this machine (a Unix socket, a loopback address) is another one on each machine.
"""

import math
import socket
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from ipaddress import ip_address

import msgspec

from tlstunnel.addresses import OriginAddress

EJECTION = "ejection"
"""The topic of announcements about members that were ejected, or restored."""


class Ejected(msgspec.Struct, frozen=True):
    """A member of a pool, by their keys, is ejected for so many seconds; with 0 it is restored."""

    pool: str
    member: str
    seconds: float

    def encode(self) -> str:
        """Return the text of the announcement."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def decode(cls, text: str) -> "Ejected | None":
        """Return what `encode` encoded, None if it is something else, as from a later release."""
        try:
            found = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError:
            return None
        return found if 0.0 <= found.seconds < math.inf else None


def make_key(kind: str, *parts: str) -> str:
    """Return a short key that is the same for the same parts, and for no others."""
    framed = b"".join(
        b"%d:%b" % (len(part), part) for part in (part.encode("utf-8", "surrogateescape") for part in parts)
    )
    return f"{kind}/{blake2b(framed, digest_size=16).hexdigest()}"


def list_parts(address: OriginAddress) -> Iterable[str]:
    """Return what tells an origin apart from those of other addresses, and on other machines."""
    return (str(address), _get_machine()) if _is_local(address) else (str(address),)


def _is_local(address: OriginAddress) -> bool:
    if address.host is None:
        return True
    try:
        return ip_address(address.host).is_loopback
    except ValueError:
        return address.host == "localhost" or address.host.endswith(".localhost")


@lru_cache(maxsize=1)
def _get_machine() -> str:
    return socket.gethostname()
