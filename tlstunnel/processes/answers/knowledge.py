"""Reports what only a serving process knows: its sites, its origins, and the connections that it has refused.

It looks at some sites at a time: there may be ten thousand, and the loop serves tunnels.

Tested by tests/promises/test_inventory.py.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice

from tlstunnel.commands.command import AnyCommand
from tlstunnel.commands.records import Refusal, Refusals, RefusalsResult
from tlstunnel.commands.sites import (
    MOST_LISTED,
    Certificates,
    CertificatesResult,
    Origins,
    OriginsResult,
    OriginStatus,
    Sites,
    SitesResult,
    SiteStatus,
)
from tlstunnel.inventory.certificates import CertificateIndex, describe_certificate, find_complaints
from tlstunnel.inventory.origins import describe_origins, is_unhealthy
from tlstunnel.journal.journal import Journal
from tlstunnel.journal.kept import Kept
from tlstunnel.processes.answers.dispatch import Answer
from tlstunnel.tunnel.sites import Site
from tlstunnel.tunnel.sites import Sites as ServedSites
from tlstunnel.tunnel.slices import Slices

TURN = 100
"""Sites that are looked at before tunnels continue: a millisecond."""

MOST_ORIGINS = 10_000
"""Unhealthy origins that are reported."""


class Knowledge:
    """Answers for a serving process. `get_sites` returns the sites that it serves, `journal` is its journal."""

    def __init__(self, get_sites: Callable[[], ServedSites], journal: Journal) -> None:
        self._get_sites = get_sites
        self._journal = journal

    @property
    def answers(self) -> Mapping[type[AnyCommand], Answer]:
        """What is answered, by the type of the command."""
        return {
            Sites: self._report_sites,
            Origins: self._report_origins,
            Certificates: self._report_certificates,
            Refusals: self._report_refusals,
        }

    async def _report_sites(self, command: Sites, _: str) -> SitesResult:
        """Report what only serving processes know of the sites that the command lists."""
        now = time.time()
        found = []
        for number, site in enumerate(self._find(command.sites)):
            if number % TURN == TURN - 1:
                await asyncio.sleep(0)
            found.append(_describe_site(site, now))
        return SitesResult(now=now, since=now, total=len(found), sites=found)

    async def _report_origins(self, command: Origins, _: str) -> OriginsResult:
        now = time.time()
        offset = now - asyncio.get_running_loop().time()
        found: list[OriginStatus] = []
        for number, site in enumerate(self._find(command.sites) if command.sites else self._get_sites()):
            if number % TURN == TURN - 1:
                await asyncio.sleep(0)
            found += (one for one in describe_origins(site, offset) if not command.unhealthy or is_unhealthy(one))
            if len(found) >= MOST_ORIGINS:
                break
        return OriginsResult(now=now, total=len(found), origins=found)

    async def _report_certificates(self, command: Certificates, _: str) -> CertificatesResult:
        sites = self._get_sites()
        slices = Slices()
        index = CertificateIndex()
        for site in self._find((command.site,)) if command.site else sites:
            index.add(site)
            if slices.is_over:
                await slices.pause()
        now = datetime.now(UTC)
        served = index.list_by_end()
        first = max(command.offset, 0)
        complaints = find_complaints((source.value, source.complaint) for source in sites.certificates.sources())
        found = []
        for one in served[first : first + min(max(command.limit, 0), MOST_LISTED)]:
            found.append(describe_certificate(one, complaints.get(id(one.pair), ""), now))
            if slices.is_over:
                await slices.pause()
        return CertificatesResult(now=now.timestamp(), total=len(served), certificates=found)

    def _find(self, names: tuple[str, ...]) -> Iterator[Site]:
        sites = self._get_sites()
        return (site for name in names if (site := sites.find(name)) is not None)

    async def _report_refusals(self, command: Refusals, _: str) -> RefusalsResult:
        kept = (one for one in self._journal.kept if _is_wanted(one, command, self._journal.style.show))
        return RefusalsResult(
            now=time.time(),
            refusals=[_describe_refusal(one, self._journal.style.show) for one in islice(kept, max(command.limit, 0))],
        )


def _describe_site(site: Site, now: float) -> SiteStatus:
    ends = [pair.validity.end.timestamp() for pair in site.served.pairs]
    return SiteStatus(
        names=[site.name],
        ejected=sum(
            condition.state in {"ejected", "trial", "down"}
            for _, pool in site.pools
            for condition in pool.list_conditions()
        ),
        certificate_days=round((min(ends) - now) / 86_400, 2) if ends else None,
    )


def _is_wanted(kept: Kept, command: Refusals, show: Callable[[str], str]) -> bool:
    record = kept.record
    return (
        command.id in {"", record.id}
        and command.site in {"", record.site}
        and (record.reason == command.reason or record.reason.startswith(command.reason))
        and command.client in {"", record.client, show(record.client)}
    )


def _describe_refusal(kept: Kept, show: Callable[[str], str]) -> Refusal:
    record = kept.record
    return Refusal(
        id=record.id,
        at=round(kept.at, 3),
        process=os.getpid(),
        record={"event": str(kept.event), **record.all_facts(show)},
    )
