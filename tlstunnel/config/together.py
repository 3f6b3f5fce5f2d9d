"""What several processes and machines count together, and whether its history is kept.

Tested by tests/unit/test_config_together.py.
"""

from collections.abc import Iterator, Mapping

from tlstunnel.config.document import KeyPath
from tlstunnel.config.origins import RouteConfig
from tlstunnel.config.server import Config
from tlstunnel.config.site import SiteConfig
from tlstunnel.config.usage import Usage


def list_pools(config: Config) -> Iterator[tuple[KeyPath, SiteConfig | RouteConfig]]:
    """Yield every table with origins, and its path."""
    for number, site in enumerate(config.sites):
        yield from list_pools_of(("sites", number), site)


def list_pools_of(path: KeyPath, site: SiteConfig) -> Iterator[tuple[KeyPath, SiteConfig | RouteConfig]]:
    """Yield the tables with origins of the site at `path`, and their paths."""
    yield path, site
    yield from (((*path, "routes", index), route) for index, route in enumerate(site.routes))


def list_limits(config: Config) -> Iterator[KeyPath]:
    """Yield the path of every rate limit, and of every origin's ``max_tunnels``."""
    yield from (("rate_limits", index) for index, _ in enumerate(config.rate_limits))
    for number, site in enumerate(config.sites):
        yield from (("sites", number, "rate_limits", index) for index, _ in enumerate(site.rate_limits))
    for place, table in list_pools(config):
        for index, origin in enumerate(table.origins):
            if origin.max_tunnels is not None:
                yield (*place, "origins", index, "max_tunnels")


def keeps_history(config: Config, environ: Mapping[str, str]) -> bool:
    """Return whether usage is kept over time: somebody has given a folder for it, or says what it is for.

    The dashboard shows it.
    """
    return (
        config.state.dir is not None
        or bool(environ.get("STATE_DIRECTORY"))
        or config.usage != Usage()
        or config.admin is not None
        or any(site.plan is not None or site.guideline is not None for site in config.sites)
    )


def shares_notices(config: Config) -> bool:
    """Return whether other machines may make the same notices, so that one has to be elected that sends them."""
    return config.state.url is not None and any(
        site.plan is not None or site.guideline is not None for site in config.sites
    )


def counts_together(config: Config) -> bool:
    """Return whether there is something to count together: a limit, or several origins, which may be ejected.

    The addresses of an origin's name are not known here, so a single name is no reason to count together.
    """
    return any(True for _ in list_limits(config)) or any(len(table.origins) > 1 for _, table in list_pools(config))
