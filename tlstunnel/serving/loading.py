"""The loader: builds what a configuration describes, as a whole or a part of it, and reports every problem.

`start`, `reload`, the probe of an upgrade, `config check`, `firewall explain` and `edge run` all use it, so that they
accept and reject the same files. What is being served changes only after everything is built.

Tested by tests/unit/test_loading_corpus.py.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tlstunnel.certificates import CERTIFICATES, issue
from tlstunnel.config import Config, SiteConfig, decode, read
from tlstunnel.config.document import DEFAULT_FILE, KeyPath, render_path
from tlstunnel.config.invocation import Invocation, sites_to_serve, uses_test_certificate
from tlstunnel.config.problems import InvalidConfiguration, Problem, Problems, render_problems
from tlstunnel.config.usage import Notices
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.verdict import Firewall
from tlstunnel.journal.events import Event
from tlstunnel.metrics.registry import Registry
from tlstunnel.program import import_when_needed
from tlstunnel.serving.changes import describe_changes
from tlstunnel.serving.contents import Contents, describe_reloaded, read_contents
from tlstunnel.serving.sites import build_sites
from tlstunnel.serving.warnings import LoadWarning, find_warnings
from tlstunnel.state.counting import Counting
from tlstunnel.tunnel.sites import Sites

if TYPE_CHECKING:
    from tlstunnel.edge.workers import Workers


@dataclass(frozen=True, slots=True)
class Description:
    """A decoded configuration, the sites to serve, and the file it came from with its text, for messages.

    The `sites` are the file's, or the one of the command line.
    """

    config: Config
    sites: tuple[SiteConfig, ...]
    file: Path | None = None
    text: str = ""

    @classmethod
    def from_file(cls, file: Path | None) -> Self:
        """Read and decode a file, None for the one in the current folder. Raises ConfigurationError."""
        found, file = file is None, file or DEFAULT_FILE
        text = read(file, trusted_only=found)
        config = decode(text, file.parent, str(file))
        return cls(config, config.sites, file, text)

    @classmethod
    def from_invocation(cls, invocation: Invocation, text: str | None) -> Self:
        """Decode the text of the invocation's file, None without one. Raises ConfigurationError."""
        config = invocation.configuration(text)
        return cls(config, sites_to_serve(invocation, config), invocation.file, text or "")

    def make_error(self, found: Sequence[Problem]) -> ConfigurationError:
        """Return the error that reports these problems, at least one."""
        in_file = [problem for problem in found if self.locate(problem.path)]
        elsewhere = [problem.reason for problem in found if not self.locate(problem.path)]
        rendered = render_problems(in_file, self.text, str(self.file)) if in_file else []
        first, *more = dict.fromkeys((*elsewhere, *rendered))
        return ConfigurationError(first, *more)

    def locate(self, path: KeyPath) -> str:
        """Return where the key at `path` is: ``FILE: KEY``. Empty for the site of the command line."""
        if self.file is None or (path[:1] == ("sites",) and not self.config.sites):
            return ""
        return ": ".join(filter(None, (str(self.file), render_path(path))))


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """Everything that serving needs, complete and checked."""

    description: Description
    sites: Sites
    firewall: Firewall
    contents: Contents
    workers: "Workers | None" = None

    @property
    def config(self) -> Config:
        """The configuration that it was built from."""
        return self.description.config

    def describe_changes(self, before: "LoadedConfig") -> list[str]:
        """Return a line for each difference from `before`, in the configuration or in the files that it names."""
        return [
            *describe_changes(before.config, self.config),
            *describe_reloaded(before.contents, self.contents, self.sites, self.firewall.lists, datetime.now(UTC)),
            *self.sites.certificates.complaints(),
        ]

    def warnings(self) -> list[LoadWarning]:
        """Return the warnings about the configuration."""
        # The hints name keys of a file, so there are none for the site of the command line.
        return list(find_warnings(self.config, self.sites)) if self.config.sites else []

    def certificate_warnings(self, now: datetime) -> list[LoadWarning]:
        """Return a warning for each certificate, authority and revocation list that has expired or soon will."""
        found = []
        for index, site in enumerate(self.sites):
            hints = [pair.find_warning(now) for pair in site.served.pairs]
            if site.served.clients is not None:
                hints.append(site.served.clients.find_warning(now))
            found += [
                LoadWarning(Event.CERTIFICATE_WARNING, ("sites", index), site.name, hint)
                for hint in hints
                if hint is not None
            ]
        return found

    async def start_firewall(self) -> None:
        """Start the helpers of the firewall. Raises ConfigurationError."""
        problems = Problems()
        with problems.collect():
            await self.firewall.start()
        if problems.found:
            raise self.description.make_error(problems.found)

    async def start(self) -> None:
        """Start the helpers of the firewall, and set up the workers.

        Raises ConfigurationError with every problem; nothing is left running then.
        """
        problems = Problems()
        with problems.collect():
            await self.firewall.start()
        try:
            if self.workers is not None:
                with problems.collect():
                    await self.workers.start()
        except BaseException:
            await self.firewall.close()
            raise
        if problems.found:
            await self.firewall.close()
            if self.workers is not None:
                await self.workers.close()
            raise self.description.make_error(problems.found)

    async def close(self) -> None:
        """Stop everything that was started, except what a later configuration has taken over."""
        await self.firewall.close()
        await self.sites.close()
        if self.workers is not None:
            await self.workers.close()


def load(
    description: Description,
    metrics: Registry | None = None,
    before: LoadedConfig | None = None,
    test_folder: Path = CERTIFICATES,
    counting: Counting | None = None,
) -> LoadedConfig:
    """Build everything that `description` describes, to be counted by `counting`.

    It takes over what is still valid in `before`. The test certificate, if a site needs one, is in `test_folder`, and
    is created there if necessary. Raises ConfigurationError with every problem.
    """
    with _paused_garbage_collection():
        counting = Counting() if counting is None else counting
        return _load(description, Registry() if metrics is None else metrics, before, test_folder, counting)


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector: it would traverse everything again and again, a tenth of the time of a load.

    Nothing that is built here stays garbage for long, since all of it is used.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load(
    description: Description,
    metrics: Registry,
    before: LoadedConfig | None,
    test_folder: Path,
    counting: Counting,
) -> LoadedConfig:
    problems, of_sites = Problems(), Problems()
    firewall: Firewall | None = None
    sites: Sites | None = None
    workers: Workers | None = None
    _check_state(description, problems)
    _check_notices(description, problems)
    if description.config.admin is not None:
        admin_files = import_when_needed("tlstunnel.serving.admin_files", "the dashboard and the API")
        admin_files.load_admin_files(description.config.admin, problems)
    with problems.collect():
        firewall = Firewall(
            description.config,
            description.sites,
            metrics=metrics,
            make_counters=lambda: counting.counters,
            throttles=counting.throttles,
        )
    with problems.collect():
        workers = _build_workers(description.sites, metrics, before.workers if before is not None else None)
    try:
        with of_sites.collect():
            sites = build_sites(
                description.sites,
                _ensure_test_pair(description.sites, test_folder),
                before.sites if before is not None else None,
                resolve_every=description.config.resolve_interval,
                workers=workers if not problems.found else None,
                counting=counting,
                health_path=description.config.health_path,
            )
        found = (*of_sites.found, *problems.found)
        if firewall is None or sites is None or found:
            raise description.make_error(found)
    except BaseException:
        if workers is not None:
            workers.discard()
        raise
    folder = description.file.parent if description.file is not None else None
    contents = read_contents(description.sites, sites, firewall.lists, folder)
    return LoadedConfig(description, sites, firewall, contents, workers)


def _check_state(description: Description, problems: Problems) -> None:
    """Check what `[state]` names. No server is connected to."""
    state, file = description.config.state, description.file
    if state.url is None:
        return
    parse_url = import_when_needed("tlstunnel.state.valkey.address", "state.url").parse_url
    try:
        parse_url(state.url.text, file.parent if file is not None else None)
    except ConfigurationError as error:
        problems.add(str(error).removeprefix("state.url: "), "state", "url")
    if state.password_file is not None:
        try:
            state.password_file.read_bytes()
        except OSError as error:
            problems.add(f"{state.password_file}: cannot be read: {error.strerror}", "state", "password_file")


def _check_notices(description: Description, problems: Problems) -> None:
    """Check the files that `[usage.notices]` names. Nothing is connected to."""
    notices = description.config.usage.notices
    if notices == Notices():
        return
    credentials = import_when_needed("tlstunnel.plans.credentials", "notices")
    templates = import_when_needed("tlstunnel.plans.templates", "notices")
    if notices.secret_file is not None:
        with problems.collect("usage", "notices", "secret_file"):
            credentials.load_secrets(notices.secret_file)
    if notices.password_file is not None:
        with problems.collect("usage", "notices", "password_file"):
            credentials.load_password(notices.password_file)
    with problems.collect("usage", "notices", "templates"):
        templates.load_texts(notices.templates).check_language(notices.language)


def load_firewall(description: Description) -> Firewall:
    """Build the firewall alone. Raises ConfigurationError with every problem of it."""
    try:
        return Firewall(description.config, description.sites)
    except InvalidConfiguration as error:
        raise description.make_error(error.found) from None


def load_workers(description: Description) -> "Workers":
    """Load the edge workers alone. Raises ConfigurationError with every problem of them."""
    try:
        workers = _build_workers(description.sites, Registry())
    except InvalidConfiguration as error:
        raise description.make_error(error.found) from None
    assert workers is not None, "a site has a worker"
    return workers


def _build_workers(sites: Sequence[SiteConfig], metrics: Registry, before: "Workers | None" = None) -> "Workers | None":
    if before is None and not any(site.worker for site in sites):
        return None
    made: Workers = import_when_needed("tlstunnel.edge.workers", "edge workers").Workers(sites, metrics, before)
    return made


def _ensure_test_pair(sites: Sequence[SiteConfig], folder: Path) -> tuple[Path, Path] | None:
    if not uses_test_certificate(sites):
        return None
    test = issue.ensure(folder)
    return test.cert, test.key
