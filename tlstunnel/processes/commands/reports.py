"""Reports of the parent about sites, origins and refused connections, from what serving processes answer.

Tested by tests/promises/test_inventory.py.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from tlstunnel.addresses import quoted
from tlstunnel.commands.configuration import MOST_SITES, Configuration, ConfigurationResult, LoadsResult
from tlstunnel.commands.configuration import Loads as LoadsCommand
from tlstunnel.commands.records import Refusal, Refusals, RefusalsResult, Watched, WatchRecords
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
from tlstunnel.config import Config
from tlstunnel.errors import ControlError
from tlstunnel.inventory.advice import find_advice
from tlstunnel.inventory.configuration import find_sources, list_arguments, render_configuration
from tlstunnel.inventory.origins import is_unhealthy, merge_origins
from tlstunnel.inventory.sites import OriginEntry, SiteIndex
from tlstunnel.inventory.stages import Checks, describe_stages
from tlstunnel.processes.commands.inquiry import Answered, ask_serving
from tlstunnel.processes.fleet import Fleet
from tlstunnel.processes.loads import Loads

ASKED_AT_ONCE = 250
"""Sites that a serving process is asked about at once: it takes a few milliseconds."""

MOST_REFUSALS = 1_000


class Reports:
    """Reports of the `fleet`'s sites, origins and refused connections, and of its configuration and its `loads`."""

    def __init__(self, fleet: Fleet, loads: Loads) -> None:
        self._fleet = fleet
        self._loads = loads
        self._indexed: tuple[Config, SiteIndex] | None = None
        self._indexing = asyncio.Lock()

    async def report_sites(self, command: Sites, who: str) -> SitesResult:
        """Report the sites. Raises ControlError."""
        index = await self._index()
        if command.site:
            self._find(index, command.site)
        usage, now = self._fleet.usage, time.time()
        throttled = {rule.site for rule in self._fleet.overseer.rules}
        total, sites = index.select(command, usage.sites, throttled)
        known = await self._ask_about_sites([site.names[0] for site in sites], who)
        return SitesResult(
            now=now, since=round(now - usage.age, 3), total=total, sites=[_complete(site, known) for site in sites]
        )

    async def report_origins(self, command: Origins, who: str) -> OriginsResult:
        """Report the origins. Raises ControlError."""
        index = await self._index()
        name = self._find(index, command.site) if command.site else ""
        entries: Sequence[OriginEntry] = [one for one in index.origins if name in {"", one.site}]
        silent: set[int] = set()
        if command.unhealthy:
            suspects = await ask_serving(self._fleet, Origins(unhealthy=True, sites=(name,) if name else ()), who)
            silent.update(suspects.silent)
            found = {OriginEntry(one.site, one.route, one.address) for one in _list_origins(suspects)}
            entries = [one for one in entries if one in found]
        else:
            first = max(command.offset, 0)
            total = len(entries)
            entries = entries[first : first + min(max(command.limit, 0), MOST_LISTED)]
        reports = await self._ask_about_origins(entries, who, silent)
        origins = merge_origins(entries, [reports])
        if command.unhealthy:
            origins = [one for one in origins if is_unhealthy(one)]
            total = len(origins)
            first = max(command.offset, 0)
            origins = origins[first : first + min(max(command.limit, 0), MOST_LISTED)]
        return OriginsResult(now=time.time(), total=total, origins=origins, silent=sorted(silent))

    async def report_certificates(self, command: Certificates, who: str) -> CertificatesResult:
        """Report the certificates, as one of the serving processes has them. Raises ControlError."""
        index = await self._index()
        site = self._find(index, command.site) if command.site else ""
        answered = await ask_serving(self._fleet, replace(command, site=site), who, most=1)
        for _, result in answered.results:
            assert isinstance(result, CertificatesResult)
            return result
        raise ControlError("no process serves at the moment; try again")

    async def report_configuration(self, command: Configuration, _: str) -> ConfigurationResult:
        """Report the configuration. Raises ControlError."""
        fleet = self._fleet
        startup = fleet.startup
        sites = startup.config.sites
        first = max(command.offset, 0)
        last = first + min(max(command.limit, 0), MOST_SITES)
        if command.site:
            name = self._find(await self._index(), command.site)
            first = next(number for number, site in enumerate(sites) if site.names[0] == name)
            last = first + 1
        invocation = startup.invocation
        page = sites[first:last]
        overridden = fleet.list_overridden()
        rendered = await asyncio.to_thread(render_configuration, startup.config, page)
        sources = await asyncio.to_thread(find_sources, startup.text, overridden, range(first, first + len(page)))
        return ConfigurationResult(
            file=str(invocation.folder / invocation.file) if invocation.file is not None else "",
            folder=str(invocation.folder),
            loaded=self._loads.loaded,
            arguments=list_arguments(invocation) | fleet.list_options(),
            configuration=rendered,
            sources=sources,
            sites_total=len(sites),
            offset=first,
        )

    async def report_loads(self, _: LoadsCommand, __: str) -> LoadsResult:
        """Report when the configuration was read."""
        return LoadsResult(self._loads.list_latest())

    async def report_refusals(self, command: Refusals, who: str) -> RefusalsResult:
        """Report the latest refusals. Raises ControlError."""
        index = await self._index()
        limit = min(max(command.limit, 0), MOST_REFUSALS)
        site = (index.find(command.site) or command.site) if command.site else ""
        answered = await ask_serving(self._fleet, replace(command, site=site, limit=limit), who)
        refusals = [
            one for _, result in answered.results if isinstance(result, RefusalsResult) for one in result.refusals
        ]
        refusals.sort(key=lambda one: -one.at)
        config = self._fleet.config
        sites = {one.names[0]: one for one in config.sites}
        checks: dict[str, Checks] = {}
        explained = []
        for refusal in refusals[:limit]:
            name = refusal.record.get("site", "")
            if name in sites and name not in checks:
                checks[name] = Checks.of(sites[name], config)
            explained.append(explain_refusal(refusal, checks.get(name)))
        return RefusalsResult(now=time.time(), refusals=explained, silent=answered.silent)

    async def watch_records(self, command: WatchRecords, who: str) -> Watched:
        """Have serving processes send their records. Raises ControlError."""
        answered = await ask_serving(self._fleet, command, who)
        return Watched(processes=len(answered.results))

    async def _index(self) -> SiteIndex:
        """Return the sites of the configuration. They are prepared in a thread, because that may take a moment."""
        async with self._indexing:
            config = self._fleet.config
            if self._indexed is None or self._indexed[0] is not config:
                self._indexed = config, await asyncio.to_thread(SiteIndex, config)
            return self._indexed[1]

    @staticmethod
    def _find(index: SiteIndex, name: str) -> str:
        found = index.find(name)
        if found is None:
            raise ControlError(f"there is no site {quoted(name)}; tlstunnel status --sites lists them")
        return found

    async def _ask_about_sites(self, names: Sequence[str], who: str) -> Mapping[str, SiteStatus]:
        """Return what one of the serving processes knows of these sites; nothing if none responds."""
        known: dict[str, SiteStatus] = {}
        for start in range(0, len(names), ASKED_AT_ONCE):
            request = Sites(sites=tuple(names[start : start + ASKED_AT_ONCE]))
            with contextlib.suppress(ControlError):
                answered = await ask_serving(self._fleet, request, who, most=1)
                for _, result in answered.results:
                    assert isinstance(result, SitesResult)
                    known.update((site.names[0], site) for site in result.sites)
        return known

    async def _ask_about_origins(
        self, entries: Iterable[OriginEntry], who: str, silent: set[int]
    ) -> list[OriginStatus]:
        names = list(dict.fromkeys(entry.site for entry in entries))
        found: list[OriginStatus] = []
        for start in range(0, len(names), ASKED_AT_ONCE):
            answered = await ask_serving(self._fleet, Origins(sites=tuple(names[start : start + ASKED_AT_ONCE])), who)
            silent.update(answered.silent)
            found += _list_origins(answered)
        return found


def explain_refusal(refusal: Refusal, checks: Checks | None) -> Refusal:
    """Return a refusal with what every stage decided, and what to do about it."""
    advice = find_advice(str(refusal.record.get("reason", "")))
    return replace(
        refusal,
        stages=describe_stages(refusal.record, checks),
        advice=advice.text if advice is not None else "",
        document=advice.document if advice is not None else "",
    )


def _complete(site: SiteStatus, known: Mapping[str, SiteStatus]) -> SiteStatus:
    one = known.get(site.names[0])
    return site if one is None else replace(site, ejected=one.ejected, certificate_days=one.certificate_days)


def _list_origins(answered: Answered) -> list[OriginStatus]:
    return [one for _, result in answered.results if isinstance(result, OriginsResult) for one in result.origins]
