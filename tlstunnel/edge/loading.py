"""A worker's code: ``FILE:FUNCTION``, executed anew each time, or ``PACKAGE.MODULE:FUNCTION``, imported once."""

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

IMPORT_SECONDS = 30.0
"""What a module has to be executed: a release waits for it (``release.upgrade_timeout`` is as long)."""

T = TypeVar("T")

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Code:
    """A worker's function, and its module's `setup` and `teardown` where there are any.

    `file` is where it stands, "" where nobody knows. `module_name` is the name under which it was executed for this
    configuration alone, "" for one that was imported.
    """

    fetch: Fetch
    setup: SetUp | None
    teardown: TearDown | None
    file: str
    module_name: str = ""

    def discard(self) -> None:
        """Let the module go, which nobody else can import."""
        if self.module_name:
            sys.modules.pop(self.module_name, None)


class Loader:
    """Loads the workers of one configuration: each file is executed once, however many workers it has."""

    def __init__(self) -> None:
        self._files: dict[str, ModuleType] = {}
        self._broken: dict[str, str] = {}

    def discard(self) -> None:
        """Discard every module that was executed, if none of them is used."""
        while self._files:
            _discard(self._files.popitem()[1])

    def load(self, reference: str) -> Code:
        """Load a worker. Raises ConfigurationError, which says what is wrong with it and where."""
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
        """Execute a file, unless that was done: one that fails is not executed again for its next worker."""
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
    """Execute a file as a module of a new name.

    Compiled here: Python's own import would take a cached file for it where time and size are the same. The name is
    one below ``tlstunnel.edge``, so that what it logs by ``logging.getLogger(__name__)`` is shown from INFO on.
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
        raise ConfigurationError(f"the edge worker {place}{line}: is not Python: {explain(error)}") from None
    sys.modules[name] = module  # dataclasses look for it there
    try:
        _run_within(IMPORT_SECONDS, place, lambda: exec(code, module.__dict__))  # noqa: S102 - what a worker is for
    except BaseException as error:
        _discard(module)
        if isinstance(error, ConfigurationError):
            raise
        raise _import_error(place, error) from None
    return module


def _discard(module: ModuleType) -> None:
    """Let go what nobody uses, and what it holds: an exception's frames would keep it until they are collected."""
    sys.modules.pop(module.__name__, None)
    vars(module).clear()


def _run_within(seconds: float, place: str, work: Callable[[], T]) -> T:
    """Do this in a thread of its own, which is left alone where it does not end.

    Raises what it raises; ConfigurationError.
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
        raise ConfigurationError(f"the edge worker {place}: its import did not end within {seconds:g} s")
    error = failed.pop()
    try:
        raise error
    finally:
        del error  # it holds this frame, and the worker's: what is refused is to be gone at once


def _import_module(name: str) -> ModuleType:
    try:
        module = _run_within(IMPORT_SECONDS, name, lambda: importlib.import_module(name))
    except ConfigurationError:
        raise
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            hint = (
                "install it where tlstunnel is, or put its folder into PYTHONPATH; a file is written edge/chat.py:fetch"
            )
            raise ConfigurationError(f"the edge worker {name}: there is no module {error.name}; {hint}") from None
        raise _import_error(name, error) from None
    except BaseException as error:
        raise _import_error(name, error) from None
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)  # as that of a file, whose name is below ours
    return module


def _import_error(place: str, error: BaseException) -> ConfigurationError:
    line = find_line(error, place)  # a module's name is no file's
    error.__traceback__ = None  # it holds every frame, and by them all that the module had
    where = f"{place}:{line}" if line else place
    return ConfigurationError(f"the edge worker {where}: cannot be imported: {explain(error)}")


def find_line(error: BaseException, file: str) -> int:
    """The line of `file` in which `error` was raised, or what was called there raised it; 0 where it was elsewhere."""
    line, traceback = 0, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def explain(error: BaseException) -> str:
    """An exception in one line, fit for a terminal."""
    try:
        text = printable(" ".join(str(error).split())[:MAX_REASON])
    except BaseException as another:
        text = f"its text raises {type(another).__name__}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_signature(function: object, arguments: int, wanted: str, reference: str) -> None:
    """Refuse what could not be called as it will be."""
    if not inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"the edge worker {reference}: expected {wanted}, which is a coroutine function")
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError as error:
        raise ConfigurationError(f"the edge worker {reference}: expected {wanted}: {error}") from None
