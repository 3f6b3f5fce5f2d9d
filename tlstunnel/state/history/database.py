"""The file: creating, checking, migrating and locking it. What cannot be used is left exactly as it is.

Why it cannot be used is a StateError, which names the file and says what to do. Errors that may pass, such as a full
disk, are those of sqlite3 (`may_pass`).
"""

import contextlib
import fcntl
import os
import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tlstunnel.errors import StateError

FILE_NAME = "history.db"
"""In the state folder."""

BUSY_SECONDS = 2.0
"""How long a statement waits for another program's lock on the file. Only the thread of the history waits."""

MAX_LOG_BYTES = 8 << 20
"""Bytes that the write-ahead log keeps after it was emptied, twice what it has at most without a long reader."""

_MAGIC = b"SQLite format 3\0"
_APPLICATION_ID = slice(68, 72)  # https://www.sqlite.org/fileformat2.html#the_database_header
_HEADER_BYTES = 100

_MAY_PASS = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)

_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of a file. `steps[n]` has the statements that lead from version n to version n + 1.

    A published step never changes, since there are files of its version. `application_id` is what distinguishes the
    file from those of other programs.
    """

    application_id: int
    steps: tuple[tuple[str, ...], ...]

    @property
    def version(self) -> int:
        """The version that this program reads and writes."""
        return len(self.steps)


_COUNTS = (
    "handshakes",
    "short",
    "unfinished",
    "invalid",
    "blocked",
    "limited",
    "worker",
    "origin",
    "declined",
    "bytes_up",
    "bytes_down",
    "cpu",
)
_COUNT_COLUMNS = ", ".join(f"{name} INTEGER NOT NULL" for name in _COUNTS)

MAX_SITES = 1 << 20
"""Numbers of sites, which are not used again: as many as there can be in `site_minutes.key` and its like."""

_SITES = """
    CREATE TABLE sites (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, since INTEGER NOT NULL, last_day INTEGER NOT NULL
    )
"""

# The key is the time * MAX_SITES + the site. A minute's rows are written, and later deleted, in a dozen adjacent pages;
# with the site first it would be a page for each site (12 instead of 4 ms for 1 000 sites, and 4 MB of log). Two
# columns as the key of a table WITHOUT ROWID make minutes 15 % larger, and twice as slow to write (all measured).
_TABLES = f"""
    CREATE TABLE {{name}} (time INTEGER PRIMARY KEY, samples INTEGER NOT NULL{{measured}});
    CREATE TABLE site_{{name}} (
        key INTEGER PRIMARY KEY, peak INTEGER NOT NULL, tunnels INTEGER NOT NULL, {_COUNT_COLUMNS}{{kept}}
    )
"""

HISTORY = Schema(
    application_id=0x544C5375,  # "TLSu", for usage
    steps=(
        (
            _SITES,
            "CREATE TABLE instances (name TEXT PRIMARY KEY, positions BLOB NOT NULL)",
            *_TABLES.format(name="minutes", measured="", kept="").split(";"),
            *_TABLES.format(name="hours", measured="", kept="").split(";"),
            *_TABLES.format(name="days", measured=", p95_samples INTEGER NOT NULL DEFAULT 0", kept=", p95 REAL").split(
                ";"
            ),
        ),
    ),
)
"""The history. `time` counts minutes, hours or days since 1970 (UTC); `samples` are those of all sites together, so a
site without a row was idle, and a time without samples is a gap. `tunnels` is the sum of the samples."""


def may_pass(error: Exception) -> bool:
    """Return whether trying again later can help: no room, a read-only file system, a lock of another program."""
    return isinstance(error, OSError) or _code_of(error) in _MAY_PASS


def is_damage(error: Exception) -> bool:
    """Return whether the file is damaged, or lacks a table that it should have."""
    return _code_of(error) in _DAMAGE


def _code_of(error: Exception) -> int:
    code = getattr(error, "sqlite_errorcode", -1) if isinstance(error, sqlite3.Error) else -1
    return code & 0xFF if code >= 0 else code


def describe_damage(path: Path, reason: str) -> StateError:
    """Return the error for a damaged file."""
    return StateError(
        f"{path} is damaged ({reason}): move it away with its -wal file, and a new one is made, or restore a copy;"
        " it was not changed"
    )


@contextlib.contextmanager
def lock_for_writing(path: Path) -> Iterator[None]:
    """Be the only writer of `path`, by a lock on a file beside it, which the kernel releases if the process dies.

    Raises StateError if there is another one, and OSError.
    """
    lock_path = path.with_name(path.name + ".lock")
    descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 20).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise LockedError(
                f"{path}: {who} keeps its history there, and a file has one writer: set state.dir to another folder"
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


class LockedError(StateError):
    """Another process writes the file."""


def open_for_writing(path: Path, schema: Schema) -> sqlite3.Connection:
    """Open the file, which is created or migrated first if necessary. Only for the holder of its lock.

    Every commit is on the disk when it returns (synchronous=FULL). Raises StateError, OSError and sqlite3.Error.
    """
    if not _has_content(path):
        _create(path, schema)
    _check_header(path, schema)
    connection = _connect(path, "rw")
    try:
        with _damage_reported(path):
            version = _read_known_version(connection, path, schema)
            if version < schema.version:
                _migrate(connection, path, version, schema)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA journal_size_limit = {MAX_LOG_BYTES}")
            connection.execute("PRAGMA temp_store = MEMORY")
            if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise StateError(
                    f"{path}: its file system has no shared memory, which SQLite's write-ahead log needs: set state.dir"
                    " to a folder on a local disk"
                )
    except BaseException:
        connection.close()
        raise
    return connection


def check_pages(connection: sqlite3.Connection, path: Path) -> None:
    """Raise StateError if a page is damaged. Takes a second for 100 MB, outside of Python's lock."""
    with _damage_reported(path):
        for (problem,) in connection.execute("PRAGMA quick_check(1)"):
            if problem != "ok":
                raise describe_damage(path, " ".join(problem.split()))


def open_for_reading(path: Path, schema: Schema) -> sqlite3.Connection:
    """Open the file without the possibility to change it. Never stops the writer.

    Raises StateError and sqlite3.Error.
    """
    try:
        if not _has_content(path):
            raise StateError(f"{path}: no history yet")
        _check_header(path, schema)
    except OSError as error:
        raise StateError(f"{path}: cannot be read: {error.strerror}") from error
    connection = _connect(path, "ro")
    try:
        with _damage_reported(path):
            version = _read_known_version(connection, path, schema)
            if version < schema.version:
                raise StateError(f"{path} has version {version}: the tunnel migrates it when it starts")
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,  # transactions begin where they are written
        timeout=BUSY_SECONDS,
        check_same_thread=mode == "rw",
    )


def _has_content(path: Path) -> bool:
    """Return whether there is anything in the file. Raises StateError if it is no file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode):
        raise StateError(f"{path}: not a file; set state.dir to another folder")
    return status.st_size > 0


def _check_header(path: Path, schema: Schema) -> None:
    """Raise StateError unless it is a database of this program.

    SQLite would change a foreign one merely by opening it: it rolls back what a crash has left.
    """
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC):
        raise StateError(
            f"{path} is not an SQLite database: move it away, and a new one is made, or set state.dir to another folder"
        )
    if int.from_bytes(header[_APPLICATION_ID], "big") != schema.application_id:
        raise StateError(f"{path} is a database of another program: set state.dir to another folder")


def _read_known_version(connection: sqlite3.Connection, path: Path, schema: Schema) -> int:
    """Return the version of the file. Raises StateError if it is that of a later release."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > schema.version:
        raise StateError(
            f"{path} has version {version}, and this release of tlstunnel knows up to {schema.version}: install the"
            " newer release again, or move the file away, and a new one is made"
        )
    return version


@contextlib.contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if is_damage(error):
            raise describe_damage(path, str(error)) from error
        raise


def _create(path: Path, schema: Schema) -> None:
    """Create the file. It appears under its name only when it is complete, so a crash leaves no half of it."""
    _keep_orphaned_log(path)
    new = path.with_name(path.name + ".new")
    for leftover in (new, *_companions(new)):
        leftover.unlink(missing_ok=True)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with contextlib.closing(_connect(new, "rw")) as connection, transaction(connection):
        connection.execute(f"PRAGMA application_id = {schema.application_id}")
        _run_steps(connection, 0, schema)
    _move_into_place(new, path)


def _keep_orphaned_log(path: Path) -> None:
    """Move away the log of a file that is gone: SQLite would apply it to the new one."""
    log, shared = _companions(path)
    shared.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        log.rename(path.with_name(path.name + ".orphaned-wal"))


def _companions(path: Path) -> tuple[Path, Path]:
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def _migrate(connection: sqlite3.Connection, path: Path, version: int, schema: Schema) -> None:
    """Copy the file, then migrate it in one transaction: it has the old version or the new one, whatever happens."""
    new = path.with_name(f"{path.name}.version-{version}.new")
    new.unlink(missing_ok=True)
    connection.execute("VACUUM INTO ?", (str(new),))
    _move_into_place(new, path.with_name(f"{path.name}.version-{version}"))
    with transaction(connection):
        _run_steps(connection, version, schema)


def _run_steps(connection: sqlite3.Connection, version: int, schema: Schema) -> None:
    for step in schema.steps[version:]:
        for statement in step:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {schema.version}")


def _move_into_place(new: Path, path: Path) -> None:
    """Rename a complete file, and return when that is on the disk."""
    new.chmod(0o600)
    _sync(new, os.O_RDONLY)
    new.rename(path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what is written inside, or nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
