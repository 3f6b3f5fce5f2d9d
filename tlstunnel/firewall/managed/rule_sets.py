"""Build the rule set of a site: which files a helper loads, in which order, with which settings between them.

There are two layouts: Debian's, with settings in ``/etc``, and the folder of a release of CRS 3 or 4, with
``crs-setup.conf`` or its ``.example``, ``rules/``, and ``plugins/`` from version 4 on.
"""

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from tlstunnel.addresses import quoted
from tlstunnel.config import SiteManagedRules
from tlstunnel.config.problems import InvalidConfiguration, Problem, Problems
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.managed import lint
from tlstunnel.firewall.managed.messages import RuleSet, RuleSource
from tlstunnel.firewall.managed.profiles import DEFAULTS, PROFILES

DEBIAN_CRS = Path("/usr/share/modsecurity-crs")
DEBIAN_SETUP = Path("/etc/modsecurity/crs")

OWN_IDS = range(99_900_000, 99_900_100)
"""The ids of the tunnel's own rules, which rules of users cannot have."""

_LOG4SHELL = Path(__file__).with_name("log4shell.conf")
_LOG4SHELL_OF_CRS = 944150

_ENGINE = """\
SecRuleEngine On
SecResponseBodyAccess Off
SecAuditEngine Off
SecArgumentsLimit 64
"""
# Not DetectionOnly: a user's rule can deny or allow only when the engine is on. The first of repeated directives
# counts, so no later file can turn the engine off.

_DEFAULT_ACTIONS = """\
SecDefaultAction "phase:1,log,noauditlog,deny,status:403"
SecDefaultAction "phase:2,log,noauditlog,deny,status:403"
"""

_EXTENSIONS = re.compile(r"setvar:'?tx\.restricted_extensions=([^'\"]*)'?", re.IGNORECASE)
_ID = re.compile(r"^[^#\n]*?\bid:'?([0-9]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class _Crs:
    """The files of a CRS release that concern requests, in loading order."""

    setup: tuple[Path, ...]
    before: tuple[Path, ...]
    initialization: Path
    rules: tuple[Path, ...]
    after: tuple[Path, ...]

    def files(self) -> tuple[Path, ...]:
        return (*self.setup, *self.before, self.initialization, *self.rules, *self.after)


def build(settings: SiteManagedRules) -> RuleSet:
    """Build the rule set for a site's settings.

    Reads the folder of CRS and checks the user's rules. Raises InvalidConfiguration with all problems.
    """
    problems = Problems()
    crs: _Crs | None = None
    own: tuple[Path, ...] = ()
    if settings.owasp_crs:
        with problems.collect():
            crs = _find_crs(settings.crs)
    if settings.rules is not None:
        with problems.collect("rules"):
            own = _find_own_files(settings.rules)
    if not settings.owasp_crs and settings.rules is None:
        problems.add('there are no rules; write owasp_crs = true, or rules = "FILES"')
    known: dict[int, str] = {}
    with problems.collect():
        known = _read_ids(crs) if crs else {}
    with problems.collect("rules"):
        lint.check(own, known | dict.fromkeys(OWN_IDS, "tlstunnel's own settings"))
    problems.raise_found()
    ours = () if _LOG4SHELL_OF_CRS in known else (_LOG4SHELL,)
    sources = tuple(_list_sources(settings, crs, ours, own))
    digest = blake2b("\0".join(f"{source.text}\0{source.file}" for source in sources).encode(), digest_size=16)
    return RuleSet(digest.hexdigest(), sources)


def _list_sources(
    settings: SiteManagedRules, crs: _Crs | None, ours: tuple[Path, ...], own: tuple[Path, ...]
) -> Iterator[RuleSource]:
    yield RuleSource(text=_ENGINE)
    exclusions = [f"SecRuleRemoveById {number}" for number in sorted(set(settings.exclude))]
    if crs is None:
        yield RuleSource(text=_DEFAULT_ACTIONS + _join_lines(exclusions))
        yield from _file_sources(own)
        return
    yield from _file_sources(crs.setup)
    for name in dict.fromkeys(settings.profiles):
        exclusions += PROFILES[name]
    yield RuleSource(
        text=_join_lines([_set_variables(settings.paranoia), *_allow_extensions(crs), *DEFAULTS, *exclusions])
    )
    yield from _file_sources(crs.before)
    # The user's rules come after CRS's variables and before its rules, where they can exclude, deny and score.
    yield from _file_sources((crs.initialization, *ours, *own, *crs.rules, *crs.after))


def _join_lines(directives: Iterable[str]) -> str:
    """Join lines, the last with a newline too: without it, libmodsecurity's parser fails in the next file."""
    return "".join(f"{directive}\n" for directive in directives)


def _file_sources(paths: tuple[Path, ...]) -> Iterator[RuleSource]:
    return (RuleSource(file=str(path)) for path in paths)


def _set_variables(paranoia: int) -> str:
    """Return the action that sets CRS's variables, by their names in version 3 and 4. Unknown names have no effect.

    With a threshold of 1, CRS reports every score, and the tunnel applies the site's threshold. Early blocking would
    end the evaluation with the score of the first phase.
    """
    variables = {
        "paranoia_level": paranoia,
        "executing_paranoia_level": paranoia,
        "blocking_paranoia_level": paranoia,
        "detection_paranoia_level": paranoia,
        "inbound_anomaly_score_threshold": 1,
        "early_blocking": 0,
        "blocking_early": 0,
        "sampling_percentage": 100,
        "real_ip": "%{REMOTE_ADDR}",  # in CRS 3 a rule sets it, which DEFAULTS removes
    }
    actions = ",".join(f"setvar:tx.{name}={value}" for name, value in variables.items())
    return f'SecAction "id:{OWN_IDS[0]},phase:1,pass,nolog,t:none,{actions}"'


def _allow_extensions(crs: _Crs) -> list[str]:
    """Allow the extension ``.ws``, which Firebase uses and CRS 4 forbids, unless the setup file sets its own list."""
    default = _EXTENSIONS.search(_read_text(crs.initialization))
    if default is None or ".ws/" not in default[1]:
        return []
    extensions = " ".join(extension for extension in default[1].split() if extension != ".ws/")
    actions = f"id:{OWN_IDS[1]},phase:1,pass,nolog,t:none,setvar:'tx.restricted_extensions={extensions}'"
    return [f'SecRule &TX:restricted_extensions "@eq 0" "{actions}"']


def _find_crs(folder: Path | None) -> _Crs:
    hint = "install Debian's package modsecurity-crs, or set crs to the folder of a CRS release"
    if folder is None:
        folder = DEBIAN_CRS
        if not folder.is_dir():
            raise ConfigurationError(f"OWASP CRS is not at {folder}; {hint}")
    if not folder.is_dir():
        raise _folder_problem(f"{quoted(str(folder))} is not a folder; {hint}")
    initialization = folder / "rules" / "REQUEST-901-INITIALIZATION.conf"
    if not initialization.is_file():
        raise _folder_problem(
            f"{quoted(str(folder))} has no rules/REQUEST-901-INITIALIZATION.conf, so it is not the folder of a CRS"
            f" release; {hint}"
        )
    debian = folder == DEBIAN_CRS
    candidates = [folder / "crs-setup.conf", folder / "crs-setup.conf.example"]
    if debian:
        candidates.insert(0, DEBIAN_SETUP / "crs-setup.conf")
    setup = next((path for path in candidates if path.is_file()), None)
    if setup is None:
        raise _folder_problem(f"{quoted(str(folder))} has neither crs-setup.conf nor crs-setup.conf.example")
    rules = sorted((folder / "rules").glob("REQUEST-*.conf"))
    # A tunnel never evaluates responses, but the last file of their rules is the place for exclusions.
    after = sorted((folder / "rules").glob("RESPONSE-999-*.conf"))
    if debian:
        rules = [*sorted(DEBIAN_SETUP.glob("REQUEST-9*.conf")), *rules]
        after += sorted(DEBIAN_SETUP.glob("RESPONSE-999-*.conf"))
    before = [path for path in rules if path.name < initialization.name]
    plugins = folder / "plugins"
    return _Crs(
        setup=(setup, *sorted(plugins.glob("*-config.conf"))),
        before=(*sorted(plugins.glob("*-before.conf")), *before),
        initialization=initialization,
        rules=tuple(path for path in rules if path.name > initialization.name),
        after=(*after, *sorted(plugins.glob("*-after.conf"))),
    )


def _folder_problem(reason: str) -> InvalidConfiguration:
    return InvalidConfiguration(Problem(("crs",), reason))


def _find_own_files(pattern: str) -> tuple[Path, ...]:
    found = tuple(Path(name) for name in sorted(glob.glob(pattern, recursive=True)))  # noqa: PTH207 (the pattern is absolute)
    files = tuple(path for path in found if path.is_file())
    if not files:
        raise ConfigurationError(f"{quoted(pattern)} matches no file")
    return files


def _read_ids(crs: _Crs) -> dict[int, str]:
    return {int(number): path.name for path in crs.files() for number in _ID.findall(_read_text(path))}


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None
