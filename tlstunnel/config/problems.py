"""The problems of a configuration: collected instead of raised one at a time, each with the key it is about.

Tested by tests/unit/test_loading_corpus.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tlstunnel.config.document import KeyPath, find_lines, render_path
from tlstunnel.errors import CertificateError, ConfigurationError

MAX_PROBLEMS = 50
"""How many problems of a file are reported. More have one cause, and finding their lines takes time."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at ``path``. For an unknown key, ``path`` is its table and ``key`` the key itself."""

    path: KeyPath
    reason: str
    key: str | None = None

    @property
    def place(self) -> KeyPath:
        """The path whose line is the problem's."""
        return self.path if self.key is None else (*self.path, self.key)

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


def render_problems(problems: Sequence[Problem], text: str, source: str) -> list[str]:
    """Return a line for each problem of a file with this text, ``SOURCE:LINE: KEY: REASON``, in the order of lines."""
    reported = problems[:MAX_PROBLEMS]
    lines = find_lines(text, [problem.place for problem in reported])
    found = sorted(zip(lines, reported, strict=True), key=lambda pair: pair[0])
    rendered = [f"{source}:{line}: {problem}" for line, problem in found]
    rest = len(problems) - len(reported)
    return [*rendered, f"{source}: {rest} more problems"] if rest else rendered
