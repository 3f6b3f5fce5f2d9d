"""Load a worker's code: ``FILE:FUNCTION`` is executed at each load, ``PACKAGE.MODULE:FUNCTION`` is imported once."""

import importlib
import inspect
import itertools
import logging
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable

Fetch = Callable[[Any, Any], Awaitable[object]]
SetUp = Callable[[dict[str, Any]], Awaitable[object]]
TearDown = Callable[[Any], Awaitable[object]]

MAX_REASON = 300
"""Characters of an exception's text that an error shows."""

IMPORT_SECONDS = 30.0
"""How long the import of a module may take. An upgrade waits for it (``release.upgrade_timeout`` is as long)."""

T = TypeVar("T")

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Code:
    """A worker's function, and the `setup` and `teardown` of its module, if it has them.

    `file` is the path of the source, "" if unknown. `module_name` is the name under which a file was executed for this
    configuration alone, "" for an imported module.
    """

    fetch: Fetch
    setup: SetUp | None
    teardown: TearDown | None
    file: str
    module_name: str = ""

    def discard(self) -> None:
        """Remove a file's module from `sys.modules`. An imported module stays."""
        if self.module_name:
            sys.modules.pop(self.module_name, None)


class Loader:
    """Loads the workers of one configuration. Each file is executed once, however many workers it has."""

    def __init__(self) -> None:
        self._files: dict[str, ModuleType] = {}
        self._broken: dict[str, str] = {}

    def discard(self) -> None:
        """Discard all executed modules. Call this only if none of them is in use."""
        while self._files:
            _discard(self._files.popitem()[1])

    def load(self, reference: str) -> Code:
        """Load the worker that `reference` names. Raises ConfigurationError with the file, the line and the problem."""
        place, _, name = reference.rpartition(":")
        is_file = place.endswith(".py")
        module = self._execute(place) if is_file else _import_module(place)
        fetch = getattr(module, name, None)
        if fetch is None:
            raise ConfigurationError(f"the edge worker {reference}: there is no {name} in {place}")
        _check_signature(fetch, 2, f"async def {name}(request, env)", reference)
        setup, teardown = getattr(module, "setup", None), getattr(module, "teardown", None)
        if setup is not None:
            _check_signature(setup, 1, "async def setup(config)", reference)
        if teardown is not None:
            _check_signature(teardown, 1, "async def teardown(env)", reference)
        file = getattr(module, "__file__", None) or ""
        return Code(fetch, setup, teardown, file, module.__name__ if is_file else "")

    def _execute(self, place: str) -> ModuleType:
        """Return the module of a file, executed once. A file that failed is not executed again for another worker."""
        if place in self._broken:
            raise ConfigurationError(self._broken[place])
        module = self._files.get(place)
        if module is None:
            try:
                module = self._files[place] = _execute_file(place)
            except ConfigurationError as error:
                self._broken[place] = str(error)
                raise
        return module


def _execute_file(place: str) -> ModuleType:
    """Execute a file as a module with a new name.

    The file is compiled here because Python's own import would use cached bytecode if time and size are unchanged. The
    name is below ``tlstunnel.edge``, so that ``logging.getLogger(__name__)`` logs from level INFO.
    """
    path = Path(place)
    name = f"tlstunnel.edge.{path.stem}_{next(_numbers)}"
    module = ModuleType(name)
    module.__file__ = place
    module.__spec__ = ModuleSpec(name, None, origin=place)
    try:
        code = compile(path.read_bytes(), place, "exec", dont_inherit=True)
    except OSError as error:
        raise ConfigurationError(f"the edge worker {place}: cannot be read: {error.strerror}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise ConfigurationError(f"the edge worker {place}{line}: is not valid Python: {explain(error)}") from None
    sys.modules[name] = module  # dataclasses look it up there
    try:
        _run_within(IMPORT_SECONDS, place, lambda: exec(code, module.__dict__))  # noqa: S102 - running a worker's code is the purpose
    except BaseException as error:
        _discard(module)
        if isinstance(error, ConfigurationError):
            raise
        raise _import_error(place, error) from None
    return module


def _discard(module: ModuleType) -> None:
    """Free an unused module and its contents. The frames of an exception would keep them until they are collected."""
    sys.modules.pop(module.__name__, None)
    vars(module).clear()


def _run_within(seconds: float, place: str, work: Callable[[], T]) -> T:
    """Call `work` in a thread of its own and return its result. The thread is abandoned if it takes too long.

    Raises what `work` raises, and ConfigurationError after `seconds`.
    """
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="edge worker's import", daemon=True)
    thread.start()
    thread.join(seconds)
    if done:
        return done[0]
    if not failed:
        raise ConfigurationError(f"the edge worker {place}: its import took longer than {seconds:g} s")
    error = failed.pop()
    try:
        raise error
    finally:
        del error  # it refers to this frame and the worker's; a refused worker must be freed at once


def _import_module(name: str) -> ModuleType:
    try:
        module = _run_within(IMPORT_SECONDS, name, lambda: importlib.import_module(name))
    except ConfigurationError:
        raise
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            hint = "install it next to tlstunnel, or add its folder to PYTHONPATH; for a file, write edge/chat.py:fetch"
            raise ConfigurationError(f"the edge worker {name}: there is no module {error.name}; {hint}") from None
        raise _import_error(name, error) from None
    except BaseException as error:
        raise _import_error(name, error) from None
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)  # the level that a file's logger has because its name is below ours
    return module


def _import_error(place: str, error: BaseException) -> ConfigurationError:
    line = find_line(error, place)  # 0 for a module: its name is not a path
    error.__traceback__ = None  # its frames would keep everything in the module alive
    where = f"{place}:{line}" if line else place
    return ConfigurationError(f"the edge worker {where}: cannot be imported: {explain(error)}")


def find_line(error: BaseException, file: str) -> int:
    """Return the innermost line of `file` in the traceback of `error`; 0 if there is none."""
    line, traceback = 0, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def explain(error: BaseException) -> str:
    """Return an exception as one printable line."""
    try:
        text = printable(" ".join(str(error).split())[:MAX_REASON])
    except BaseException as another:
        text = f"its text raises {type(another).__name__}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_signature(function: object, arguments: int, wanted: str, reference: str) -> None:
    """Raise ConfigurationError unless `function` is a coroutine function that takes so many positional `arguments`."""
    if not inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"the edge worker {reference}: expected a coroutine function, {wanted}")
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError as error:
        raise ConfigurationError(f"the edge worker {reference}: expected {wanted}: {error}") from None
