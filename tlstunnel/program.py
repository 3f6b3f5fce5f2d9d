"""How this program was started, how to start it again, and whether its package on disk was replaced since.

Tested by tests/unit/test_program.py and tests/promises/test_upgrade.py.
"""

import importlib
import importlib.util
import os
import resource
import site
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import tlstunnel
from tlstunnel.errors import ConfigurationError


def _find_python() -> str:
    """Return the path of this process's interpreter: `sys.executable`, with links to its virtual environment resolved.

    The environment's own link to the interpreter is kept: Python finds the environment by it (PEP 405).
    """
    try:
        inside = Path(sys.executable).relative_to(sys.prefix)
    except ValueError:
        return sys.executable
    return str(Path(sys.prefix).resolve() / inside)


# Read once, at the start: a link that is changed later takes effect with the next upgrade.
PYTHON = _find_python()
PACKAGE = Path(tlstunnel.__file__).resolve().parent

HELPER_VARIABLES = (
    *("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "TZ"),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "PYTHONUSERBASE"),
)
"""What a process needs to find Python, this package and its libraries, and to encode texts."""

IMPORTED_LATER = ("cel", "re2", "limits", "multidict", "hiredis")
"""Libraries that rules (18 MiB), edge workers and shared counts need, imported when a configuration has such a part."""


def _list_files() -> Iterator[tuple[str, int, int]]:
    """Return the files of the package, as they are on disk. An installation may remove some meanwhile."""
    # Not `rglob`, which raises if a folder is removed meanwhile.
    files = [Path(folder, name) for folder, _, names in os.walk(PACKAGE) for name in names]
    paths = [path for path in files if path.suffix in {".py", ".lua"}]
    paths += [Path(spec.origin) for name in IMPORTED_LATER if (spec := importlib.util.find_spec(name)) and spec.origin]
    for path in paths:
        try:
            stat = path.stat()
        except OSError:  # it has just been removed, or is the lock of an editor, a link to nowhere
            yield str(path), 0, 0
        else:
            yield str(path), stat.st_ino, stat.st_mtime_ns


_AT_START = frozenset(_list_files())


def is_package_replaced() -> bool:
    """Return whether a module imported now could be of another release than the modules imported so far. Takes 2 ms."""
    return frozenset(_list_files()) != _AT_START


def import_when_needed(module: str, needed_for: str) -> ModuleType:
    """Import a module whose libraries most configurations do without.

    Raises ConfigurationError if the module is not imported yet and the package on disk was replaced since the start:
    modules of two releases do not work together.
    """
    if module not in sys.modules and is_package_replaced():
        raise ConfigurationError(
            f"{needed_for} need modules that this process has not imported yet, and the package on disk was replaced"
            " since the process started; run tlstunnel upgrade"
        )
    return importlib.import_module(module)


def find_starting_command() -> list[str]:
    """Return the command that started this process, as an absolute path with its links kept.

    A link that now points to another virtual environment therefore takes effect. Call this before anything changes the
    working directory.
    """
    script = sys.argv[0]
    if os.access(script, os.X_OK) and Path(script).name != "__main__.py":
        return [_to_absolute(script), *sys.argv[1:]]
    # `python -m tlstunnel`. The path of the interpreter is not resolved either: in a virtual environment it is a link.
    return [sys.executable, *sys.orig_argv[1:]]


def build_module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this package with this interpreter."""
    return [PYTHON, "-P", "-m", module, *arguments]


def build_module_environment() -> Mapping[str, str]:
    """Return the environment for `build_module_command`, so that it runs this package even if links have changed."""
    folder = PACKAGE.parent
    installed = {Path(path).resolve() for path in (*site.getsitepackages(), site.getusersitepackages())}
    if folder in installed:
        return os.environ
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *([before] if before else [])])}


def build_helper_environment() -> Mapping[str, str]:
    """Return the environment of a process that needs nothing of ours: `HELPER_VARIABLES` of `build_module_environment`.

    Passphrases and tokens are often in the environment, and every library in the process could read them.
    """
    ours = build_module_environment()
    return {name: ours[name] for name in HELPER_VARIABLES if name in ours}


def forbid_core_dumps() -> None:
    """Have the kernel write no core dump of this process and its children: it would contain private keys.

    The limit is 1 byte rather than 0: if kernel.core_pattern is a pipe, such as to systemd-coredump, Linux ignores
    every limit but this one (fs/coredump.c). A process that is not dumpable (prctl(2)) could not set its own name, nor
    could ``status`` read its memory.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 0 if hard == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def set_process_name(name: str) -> None:
    """Set the name that `top` and `ps -o comm` show; the kernel keeps its first 15 bytes (proc_pid_comm(5))."""
    comm = Path("/proc/self/comm")
    if comm.exists():
        comm.write_text(name)


def find_folder() -> Path:
    """Return the current folder, or where it was at the start if it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path(os.environ.get("PWD", "/"))


def _to_absolute(path: str) -> str:
    """Make a path absolute. The working directory is named as in ``PWD``, which keeps symbolic links."""
    folder, current = os.environ.get("PWD", ""), find_folder()
    try:
        same = Path(folder).samefile(current)
    except OSError:
        same = False
    return os.path.normpath(Path(folder if same else current, path))
