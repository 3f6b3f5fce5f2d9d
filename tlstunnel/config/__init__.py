"""The configuration file: what it may hold, the defaults, and every problem with its line.

``load`` reads a file; ``decode`` does the rest without I/O. Each subject has a module with its tables, the grammar of
its values and its checks. ``docs/configuration.md`` describes every key.
"""

from pathlib import Path

from tlstunnel.config.certificates import CertificateConfig
from tlstunnel.config.document import find_lines, parse, read, render_path
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
from tlstunnel.config.kinds import Problem, Reading
from tlstunnel.config.origins import Ejection, Health, OriginConfig, RouteConfig
from tlstunnel.config.server import Config, Limits, Log, Release, Timeouts
from tlstunnel.config.site import WEB_PORTS, SiteConfig
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
    "Timeout",
    "Timeouts",
    "WorkerTable",
    "decode",
    "load",
    "parse_worker_reference",
    "read",
]

MAX_PROBLEMS = 50
"""How many problems of a file are reported. More have one cause, and finding their lines takes time."""


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
        raise ConfigurationError(*_render_problems(reading.problems, text, source))
    assert isinstance(config, Config)
    return config


def _render_problems(problems: list[Problem], text: str, source: str) -> list[str]:
    reported = problems[:MAX_PROBLEMS]
    lines = find_lines(text, [problem.place for problem in reported])
    found = sorted(zip(lines, reported, strict=True), key=lambda pair: pair[0])
    rendered = [f"{source}:{line}: {_render_problem(problem)}" for line, problem in found]
    rest = len(problems) - len(reported)
    return [*rendered, f"{source}: {rest} more problems"] if rest else rendered


def _render_problem(problem: Problem) -> str:
    key = render_path(problem.path)
    return f"{key}: {problem.reason}" if key else problem.reason
