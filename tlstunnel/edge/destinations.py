"""Where a site's worker may send: to the site's own origins, and to what ``worker_origins`` allows. No open relay."""

from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING

from tlstunnel.addresses import Networks, OriginAddress
from tlstunnel.config import OriginConfig
from tlstunnel.origins.pool import Pool, forbidden

if TYPE_CHECKING:
    from tlstunnel.origins.tls import OriginTLS

MOST_POOLS = 1024
"""Origins that a worker has chosen and whose addresses are kept, of each site: a worker may take a name from what the
client sent. The least recently used goes."""


class Destinations:
    """Where a worker may send. `pools` are the site's, `allowed` its ``worker_origins``."""

    def __init__(
        self,
        pools: Sequence[Pool],
        allowed: Iterable[str],
        *,
        resolve_every: float = 30.0,
        preface: bytes = b"",
        tls: "OriginTLS | None" = None,
    ) -> None:
        self._pools = pools
        allowed = tuple(allowed)
        self._networks = Networks.parse(text for text in allowed if "/" in text)
        self._names = frozenset(text for text in allowed if "/" not in text)
        self._resolve_every = resolve_every
        self._preface = preface
        self._tls = tls
        self._chosen: dict[OriginAddress, Pool] = {}

    def pool(self, address: OriginAddress) -> Pool:
        """A pool that has the origin at `address`. Raises Refusal (502): it is none of those allowed."""
        if (known := self._chosen.pop(address, None)) is None:
            known = self._made(address)
            if len(self._chosen) >= MOST_POOLS:
                del self._chosen[next(iter(self._chosen))]
        self._chosen[address] = known
        return known

    def _made(self, address: OriginAddress) -> Pool:
        for pool in self._pools:
            if pool.has(address):
                return pool
        config = OriginConfig(address=address)
        host = (address.host or "").partition("%")[0]
        if address.host is None:
            raise forbidden(f"{address}: a Unix socket has to be one of the site's origins")
        within: Networks | None = None
        if not _named(host, self._names):
            if not self._networks or (_is_address(host) and host not in self._networks):
                raise forbidden(f"{address}: neither an origin of the site nor in worker_origins")
            within = self._networks
        return Pool((config,), resolve_every=self._resolve_every, preface=self._preface, tls=self._tls, within=within)

    async def close(self) -> None:
        """End the look-ups of names."""
        for pool in self._chosen.values():
            await pool.close()


def _named(host: str, names: frozenset[str]) -> bool:
    """Whether `host` is one of the names. A wildcard covers one label, as in the names of sites."""
    return host in names or f"*.{host.partition('.')[2]}" in names


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
