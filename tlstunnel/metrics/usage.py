"""What each site has used of one process, for the history.

The counters of `registry` are for people: they have many labels and an upper bound of series. These are a fixed set for
each site, exact for any number of sites, and only what has changed is sent to the parent. All of it belongs to one
thread.

Tested by tests/unit/test_metrics_usage.py.
"""

from collections.abc import Mapping

import msgspec

MOST_SITES = 100_000
"""Sites that are counted, since reloads may rename them for as long as a process runs. Others are not counted."""

MOST_MOVED = 500
"""Sites that are sent at once because only their bytes have changed: a millisecond."""

Values = list[int]
"""The values of `FIELDS`."""

Moved = tuple[int, int, int]
"""The open tunnels of a site, and the bytes that they have moved up and down."""

_NONE: Moved = (0, 0, 0)


class SiteUsage(msgspec.Struct):
    """What one site has used. The bytes are those of tunnels that have ended.

    `tlstunnel.state.history.samples.Counts` says what each field counts. New ones come last.
    """

    handshakes: int = 0
    short: int = 0
    unfinished: int = 0
    invalid: int = 0
    blocked: int = 0
    limited: int = 0
    worker: int = 0
    origin: int = 0
    declined: int = 0
    bytes_up: int = 0
    bytes_down: int = 0

    def to_values(self, moved: Moved) -> Values:
        """Return what is sent, with what the site's open tunnels have moved."""
        tunnels, up, down = moved
        values = [tunnels, *msgspec.structs.astuple(self)]
        values[_BYTES_UP] += up
        values[_BYTES_DOWN] += down
        return values


FIELDS = ("tunnels", *SiteUsage.__struct_fields__)
"""What is sent for each site, in this order: its open tunnels, then totals since the process began."""

_BYTES_UP, _BYTES_DOWN = FIELDS.index("bytes_up"), FIELDS.index("bytes_down")


class Usage:
    """What all sites have used of this process.

    `connections` are open, of at most `most_connections`, which is 0 in a process that has none.
    """

    def __init__(self) -> None:
        self.connections = 0
        self.most_connections = 0
        self._sites: dict[str, SiteUsage] = {}
        self._changed: set[str] = set()
        """Sites of which a connection has begun or ended."""
        self._moved: set[str] = set()
        """Sites whose tunnels have moved something."""
        self._open: Mapping[str, Moved] = {}
        self._compared: Mapping[str, Moved] = {}
        self._ignored = SiteUsage()

    def change(self, site: str) -> SiteUsage:
        """Return what a site has used, to be changed."""
        usage = self._sites.get(site)
        if usage is None:
            if not site or len(self._sites) >= MOST_SITES:
                return self._ignored
            usage = self._sites[site] = SiteUsage()
        self._changed.add(site)
        return usage

    @property
    def is_open(self) -> bool:
        """Whether there was any open tunnel when `note_open` was called."""
        return bool(self._open)

    def note_open(self, sites: Mapping[str, Moved]) -> None:
        """Note the open tunnels of all sites that have any."""
        self._open = sites

    def find_moved(self) -> bool:
        """Find the sites whose open tunnels have moved something since the last call; return whether there are any."""
        before = self._compared
        self._compared = self._open
        self._moved.update(site for site, moved in self._open.items() if before.get(site) != moved)
        return bool(self._moved)

    def take_changes(self) -> tuple[dict[str, Values], bool]:
        """Return the sites that have changed since the last call, and whether there are more for the next call.

        `note_open` must have been called just before. All sites are returned of which a connection has begun or ended,
        and at most `MOST_MOVED` others of those that `find_moved` has found.
        """
        changed, self._changed = self._changed, set()
        self._moved -= changed
        for _ in range(min(len(self._moved), MOST_MOVED)):
            changed.add(self._moved.pop())
        sites, now = self._sites, self._open
        return {site: sites[site].to_values(now.get(site, _NONE)) for site in changed if site in sites}, bool(
            self._moved
        )
