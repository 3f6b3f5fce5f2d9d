"""The problems of a configuration: collected instead of raised one at a time, each with the key it is about."""

from dataclasses import dataclass

from tlstunnel.errors import CertificateError, ConfigurationError

KeyPath = tuple[str | int, ...]
"""Where a value is in the file: ``("sites", 0, "cert")``; empty for the file as a whole."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the key it is about, and the reason in one line."""

    path: KeyPath
    reason: str

    def __str__(self) -> str:
        key = render_path(self.path)
        return f"{key}: {self.reason}" if key else self.reason


class InvalidConfiguration(ConfigurationError):
    """What a configuration describes cannot be built. `found` has every problem; at least one."""

    def __init__(self, *found: Problem) -> None:
        super().__init__(*map(str, found))
        self.found = found


class Problems:
    """Collects problems, each once, so that all of them can be reported together."""

    def __init__(self) -> None:
        self._found: dict[Problem, None] = {}

    @property
    def found(self) -> tuple[Problem, ...]:
        """All problems, in the order in which they were found."""
        return tuple(self._found)

    def add(self, reason: str, *path: str | int) -> None:
        """Add a problem of the key at `path`."""
        self._found[Problem(path, reason)] = None

    def collect(self, *path: str | int) -> "Collecting":
        """Collect what is raised inside a ``with`` block as problems of the key at `path`, instead of passing it on.

        The paths of an `InvalidConfiguration` are relative to `path`.
        """
        return Collecting(self, path)

    def raise_found(self) -> None:
        """Raise InvalidConfiguration if there is any problem."""
        if self._found:
            raise InvalidConfiguration(*self._found)


class Collecting:
    """A ``with`` block whose ConfigurationError or CertificateError is collected."""

    def __init__(self, problems: Problems, path: KeyPath) -> None:
        self._problems = problems
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if isinstance(error, InvalidConfiguration):
            for each in error.found:
                self._problems.add(each.reason, *self._path, *each.path)
            return True
        if isinstance(error, ConfigurationError | CertificateError):
            for reason in error.problems:
                self._problems.add(reason, *self._path)
            return True
        return False


def render_path(path: KeyPath) -> str:
    """Write the path as a person would: ``sites[0].cert``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
