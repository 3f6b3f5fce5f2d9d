"""The configuration file: what it may hold, the defaults, and every problem with its line.

``load`` reads a file; ``decode`` does the rest without I/O. Each subject has a module with its tables, the grammar of
its values and its checks. ``docs/configuration.md`` describes every key.
"""

from pathlib import Path

from tlstunnel.config.certificates import CertificateConfig
from tlstunnel.config.document import parse, read
from tlstunnel.config.durations import Duration, OffOr, Timeout
from tlstunnel.config.edge import WorkerTable, parse_worker_reference
from tlstunnel.config.firewall import (
    Lists,
    ManagedRules,
    Mode,
    Profile,
    RateLimitConfig,
    RuleConfig,
    SiteManagedRules,
    Skippable,
)
from tlstunnel.config.headers import FIELD_NAME, KEPT_FIELD, Headers
from tlstunnel.config.kinds import Reading
from tlstunnel.config.log import Log
from tlstunnel.config.origins import Ejection, Health, OriginConfig, RouteConfig
from tlstunnel.config.problems import MAX_PROBLEMS, render_problems
from tlstunnel.config.server import Config, Limits, Release, Timeouts
from tlstunnel.config.site import WEB_PORTS, SiteConfig
from tlstunnel.config.state import State, StateURL
from tlstunnel.config.tables import TableKind
from tlstunnel.errors import ConfigurationError

__all__ = [
    "FIELD_NAME",
    "KEPT_FIELD",
    "MAX_PROBLEMS",
    "WEB_PORTS",
    "CertificateConfig",
    "Config",
    "Duration",
    "Ejection",
    "Headers",
    "Health",
    "Limits",
    "Lists",
    "Log",
    "ManagedRules",
    "Mode",
    "OffOr",
    "OriginConfig",
    "Profile",
    "RateLimitConfig",
    "Release",
    "RouteConfig",
    "RuleConfig",
    "SiteConfig",
    "SiteManagedRules",
    "Skippable",
    "State",
    "StateURL",
    "Timeout",
    "Timeouts",
    "WorkerTable",
    "decode",
    "load",
    "parse_worker_reference",
    "read",
]


def load(path: Path) -> Config:
    """Read and decode a configuration file. Raises ConfigurationError with every problem."""
    return decode(read(path), path.parent, str(path))


def decode(text: str, folder: Path, source: str) -> Config:
    """Decode the text of a configuration file. Raises ConfigurationError with every problem.

    Each problem is ``SOURCE:LINE: KEY: REASON``. Relative paths start from ``folder``.
    """
    reading = Reading(folder.absolute())
    config = TableKind(Config).read(parse(text, source), (), reading)
    if reading.problems:
        raise ConfigurationError(*render_problems(reading.problems, text, source))
    assert isinstance(config, Config)
    return config
