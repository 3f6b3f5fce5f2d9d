"""The commands about what is configured, and when it was loaded.

Tested by tests/unit/test_commands.py.
"""

from typing import Any, ClassVar, Literal

import msgspec

from tlstunnel.commands.command import Command


class ConfigurationResult(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration that is served, as in the file, with every default. Secrets are hidden.

    `file` is "" if there is none. `arguments` are those of the command line.
    """

    file: str
    folder: str
    loaded: float
    arguments: dict[str, Any] = {}
    configuration: dict[str, Any] = {}


class Configuration(Command[ConfigurationResult], frozen=True):
    """Report the configuration."""

    name: ClassVar[str] = "configuration"
    result: ClassVar[type[msgspec.Struct]] = ConfigurationResult


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
