"""The commands about what is configured, and when it was loaded.

Tested by tests/unit/test_commands.py.
"""

from typing import Any, ClassVar, Literal

import msgspec

from tlstunnel.commands.command import Command

MOST_SITES = 100
"""Sites in one result."""


class ConfigurationResult(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration that is served, as in the file, with every default. Secrets are hidden.

    `file` is "" if there is none. `arguments` are those of the command line. Of `sites_total` sites, those of the page
    are there, from the number `offset` on. `sources` says where values come from, by the path of their key, such as
    "timeouts.idle" or "sites[0].names"; a key that it does not have has its default.
    """

    file: str
    folder: str
    loaded: float
    arguments: dict[str, Any] = {}
    configuration: dict[str, Any] = {}
    sources: dict[str, Literal["file", "command line"]] = {}
    sites_total: int = 0
    offset: int = 0


class Configuration(Command[ConfigurationResult], frozen=True, kw_only=True):
    """Report the configuration, with a page of its sites, or with the one that has the name `site`."""

    name: ClassVar[str] = "configuration"
    result: ClassVar[type[msgspec.Struct]] = ConfigurationResult

    site: str = ""
    limit: int = MOST_SITES
    offset: int = 0


class LoadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A time at which the configuration was read. `changes` has a line for each change, `problems` is empty on success.

    `who` is "" for a signal and for the first start.
    """

    at: float
    what: Literal["start", "reload", "upgrade"]
    generation: int
    version: str
    file: str = ""
    who: str = ""
    changes: list[str] = []
    problems: list[str] = []


class LoadsResult(msgspec.Struct, frozen=True):
    """The latest loads, the latest first."""

    loads: list[LoadStatus]


class Loads(Command[LoadsResult], frozen=True):
    """Report when the configuration was read, and what changed each time."""

    name: ClassVar[str] = "loads"
    result: ClassVar[type[msgspec.Struct]] = LoadsResult
