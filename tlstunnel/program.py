"""How this program was started, how the same is started again, and whether it is still what is on the disk."""

import importlib.util
import os
import site
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import tlstunnel


def _python() -> str:
    """Where the interpreter of this process really is: `sys.executable`, links to its virtual environment resolved.

    The environment's own link to the interpreter is not: by it Python knows the environment (PEP 405).
    """
    try:
        inside = Path(sys.executable).relative_to(sys.prefix)
    except ValueError:
        return sys.executable
    return str(Path(sys.prefix).resolve() / inside)


# All as they are at the start: a link that is pointed elsewhere later is for the next upgrade.
PYTHON = _python()
PACKAGE = Path(tlstunnel.__file__).resolve().parent

IMPORTED_LATER = ("cel", "re2", "limits", "multidict")
"""What rules need, 18 MiB of it, and what edge workers need: imported when a configuration has them."""


def _files() -> Iterator[tuple[str, int, int]]:
    paths = [*PACKAGE.rglob("*.py")]
    paths += [Path(spec.origin) for name in IMPORTED_LATER if (spec := importlib.util.find_spec(name)) and spec.origin]
    for path in paths:
        stat = path.stat()
        yield str(path), stat.st_ino, stat.st_mtime_ns


_AT_START = frozenset(_files())


def is_package_replaced() -> bool:
    """Whether a module that is imported now could be of another version than those that have been: 2 ms."""
    try:
        return frozenset(_files()) != _AT_START
    except OSError:
        return True


def starting_command() -> list[str]:
    """The command by which this process was started, absolute, with no link of its path resolved.

    So a link that was pointed at another virtual environment takes effect. To be called before anything changes the
    working directory.
    """
    script = sys.argv[0]
    if os.access(script, os.X_OK) and Path(script).name != "__main__.py":
        return [_absolute(script), *sys.argv[1:]]
    # `python -m tlstunnel`. The interpreter's own path is not resolved either: a virtual environment's is a link.
    return [sys.executable, *sys.orig_argv[1:]]


def module_command(module: str, *arguments: str) -> list[str]:
    """The command of a module of this package, by this interpreter."""
    return [PYTHON, "-P", "-m", module, *arguments]


def module_environment() -> Mapping[str, str]:
    """The environment in which `module_command` finds the package that this process runs, whatever a link says now."""
    folder = PACKAGE.parent
    installed = {Path(path).resolve() for path in (*site.getsitepackages(), site.getusersitepackages())}
    if folder in installed:
        return os.environ
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *([before] if before else [])])}


def set_process_name(name: str) -> None:
    """Let `top` and `ps -o comm` show that name, of at most 15 bytes (proc_pid_comm(5))."""
    comm = Path("/proc/self/comm")
    if comm.exists():
        comm.write_text(name)


def _absolute(path: str) -> str:
    """As seen from the working directory under the name that the shell has for it, links kept."""
    folder = os.environ.get("PWD", "")
    try:
        same = Path(folder).samefile(Path.cwd())
    except OSError:
        same = False
    return os.path.normpath(Path(folder if same else Path.cwd(), path))
