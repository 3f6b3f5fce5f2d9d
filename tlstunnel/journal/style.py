"""How records are written: which of their fields, and how much of the addresses of clients.

Everything that shows or stores the address of a client asks `Style.show`: the log, lists of tunnels and of refusals.

Tested by tests/unit/test_journal_style.py.
"""

import ipaddress
from collections.abc import Callable, Collection
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal

from tlstunnel.config.log import LOG_FIELDS

AddressStyle = Literal["full", "prefix", "hash"]

IPV4_PREFIX, IPV6_PREFIX = 24, 48
"""Bits that are shown. 24 and 48 are those of Matomo's and Google Analytics' default for anonymous addresses."""

HASH_BYTES = 8

_REMEMBERED = 4_096


class Style:
    """How the records of a process are written.

    `fields` are the names of those to write, besides `id`; None for all. Of an address, ``prefix`` shows the network,
    and ``hash`` what cannot be turned back into it without `key`: it is the same for the same address and key.
    """

    def __init__(self, fields: Collection[str] | None = None, address: AddressStyle = "full", key: bytes = b"") -> None:
        self._dropped = () if fields is None else tuple(name for name in LOG_FIELDS if name not in fields)
        self._address = address
        self._key = key[:64]
        self.show: Callable[[str], str] = str
        """Return the address of a client as it may be shown or stored. That of a Unix socket is ""."""
        if address == "prefix":
            self.show = lru_cache(_REMEMBERED)(_show_prefix)
        elif address == "hash":
            self.show = lru_cache(_REMEMBERED)(self._show_hash)

    def show_network(self, network: str) -> str:
        """Return a network of clients, or a single address, as it may be shown: a small one says who they are too."""
        address, slash, bits = network.partition("/")
        if self.show is str or not slash:
            return self.show(network)
        if bits == ("128" if ":" in address else "32"):
            return self.show(address)
        if self._address == "hash":
            return self._show_hash(network)
        shown = self.show(address)
        return network if int(bits) <= int(shown.partition("/")[2] or 0) else shown

    def select(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a record without those that are not written."""
        for name in self._dropped:
            facts.pop(name, None)
        return facts

    def _show_hash(self, address: str) -> str:
        if not address:
            return ""
        return f"~{blake2b(address.encode(), key=self._key, digest_size=HASH_BYTES).hexdigest()}"


def _show_prefix(address: str) -> str:
    if not address:
        return ""
    try:
        version = ipaddress.ip_address(address).version
        bits = IPV4_PREFIX if version == 4 else IPV6_PREFIX
        return str(ipaddress.ip_network(f"{address.partition('%')[0]}/{bits}", strict=False))
    except ValueError:
        return "?"


PLAIN = Style()
"""Everything is written."""
