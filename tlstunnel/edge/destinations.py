"""The origins to which a site's worker may send requests: the site's own, and those in ``worker_origins``.

Any other origin is refused, so that a worker that builds an address from what a client sent is not an open relay.
"""

from collections.abc import Iterable, Sequence
from ipaddress import ip_address

from tlstunnel.addresses import Networks, OriginAddress
from tlstunnel.config import OriginConfig
from tlstunnel.handshake.refusal import Refusal
from tlstunnel.journal.events import Reason
from tlstunnel.origins.pool import Pool
from tlstunnel.origins.tls import OriginTLS

MAX_POOLS = 1024
"""Pools kept for the origins that a site's worker has chosen. A worker may take names from what clients send, so the
number needs a bound; the least recently used pool is dropped."""


def refuse_destination(reason: str) -> Refusal:
    """Return the refusal for an origin that the worker may not choose. `reason` goes to the log only."""
    text = "the edge worker chose an origin that is not allowed"
    return Refusal(502, Reason.WORKER_ORIGIN, text, detail=reason)


class Destinations:
    """The origins that a worker may choose. `pools` are those of the site, `allowed` is its ``worker_origins``.

    The other parameters are those of `Pool`.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        allowed: Iterable[str],
        *,
        resolve_every: float = 30.0,
        preface: bytes = b"",
        tls: OriginTLS | None = None,
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
        """Return a pool with the origin at `address`. Raises Refusal (502) if the worker may not choose that origin."""
        if (known := self._chosen.pop(address, None)) is None:
            known = self._make_pool(address)
            if len(self._chosen) >= MAX_POOLS:
                del self._chosen[next(iter(self._chosen))]
        self._chosen[address] = known
        return known

    def _make_pool(self, address: OriginAddress) -> Pool:
        for pool in self._pools:
            if pool.has(address):
                return pool
        config = OriginConfig(address=address)
        host = (address.host or "").partition("%")[0]
        if address.host is None:
            raise refuse_destination(f"{address}: a Unix socket must be one of the site's origins")
        within: Networks | None = None
        if not _is_named(host, self._names):
            if not self._networks or (_is_address(host) and host not in self._networks):
                raise refuse_destination(f"{address}: neither an origin of the site nor in worker_origins")
            within = self._networks
        return Pool((config,), resolve_every=self._resolve_every, preface=self._preface, tls=self._tls, within=within)

    async def close(self) -> None:
        """Stop resolving names."""
        for pool in self._chosen.values():
            await pool.close()


def _is_named(host: str, names: frozenset[str]) -> bool:
    """Return whether `host` matches one of `names`. A wildcard covers one label, as in the names of sites."""
    return host in names or f"*.{host.partition('.')[2]}" in names


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
