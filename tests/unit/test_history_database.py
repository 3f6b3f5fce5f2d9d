"""The file: what is foreign, damaged, newer or older, and that none of these is ever changed."""

import contextlib
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tlstunnel.errors import StateError
from tlstunnel.state.history.database import (
    HISTORY,
    LockedError,
    Schema,
    check_pages,
    is_damage,
    lock_for_writing,
    may_pass,
    open_for_reading,
    open_for_writing,
    transaction,
)
from tlstunnel.state.history.samples import Counts

FIRST = Schema(0x1234, (("CREATE TABLE words (word TEXT NOT NULL)",),))
SECOND = Schema(0x1234, (*FIRST.steps, ("ALTER TABLE words ADD COLUMN length INTEGER NOT NULL DEFAULT 0",)))
THIRD = Schema(0x1234, (*SECOND.steps, ("UPDATE words SET length = length(word)", "CREATE TABLE more (a)")))
BROKEN = Schema(0x1234, (*SECOND.steps, ("UPDATE words SET length = 7", "INSERT INTO missing VALUES (1)")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.db"


@contextlib.contextmanager
def opened(path: Path, schema: Schema = FIRST) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(open_for_writing(path, schema)) as connection:
        yield connection


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_new_file_is_private_and_identified(path: Path) -> None:
    with opened(path) as connection:
        for pragma, expected in (("application_id", 0x1234), ("user_version", 1), ("synchronous", 2)):
            assert connection.execute(f"PRAGMA {pragma}").fetchone() == (expected,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}
    assert [file.name for file in path.parent.iterdir()] == ["history.db"]


def test_what_was_written_is_there_again(path: Path) -> None:
    with opened(path) as connection, transaction(connection):
        connection.execute("INSERT INTO words VALUES ('a')")
    with opened(path) as connection:
        assert connection.execute("SELECT * FROM words").fetchall() == [("a",)]
        with contextlib.suppress(ZeroDivisionError), transaction(connection):
            connection.execute("INSERT INTO words VALUES ('b')")
            raise ZeroDivisionError
        assert connection.execute("SELECT * FROM words").fetchall() == [("a",)]


def test_what_a_crash_left_while_creating_is_no_obstacle(path: Path) -> None:
    path.touch()
    path.with_name("history.db.new").write_text("half")
    path.with_name("history.db.new-wal").write_text("half")
    with opened(path) as connection:
        assert connection.execute("SELECT * FROM words").fetchall() == []


def test_the_log_of_a_file_that_is_gone_is_not_applied_to_the_new_one(path: Path) -> None:
    """SQLite would (https://www.sqlite.org/howtocorrupt.html, 1.4)."""
    with opened(path) as connection:
        with transaction(connection):
            connection.execute("INSERT INTO words VALUES ('old')")
        log = path.with_name("history.db-wal").read_bytes()
    path.unlink()
    path.with_name("history.db-wal").write_bytes(log)
    with opened(path) as connection:
        assert connection.execute("SELECT * FROM words").fetchall() == []
    assert path.with_name("history.db.orphaned-wal").read_bytes() == log


def write_foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (a)")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("hello"), r"is not an SQLite database: move it away, and a new one is made"),
    "foreign": (write_foreign, r"is a database of another program: set state\.dir to another folder"),
    "folder": (lambda path: path.mkdir(), r"not a file; set state\.dir to another folder"),
    "fifo": (os.mkfifo, r"not a file"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_an_error_and_stays_as_it_is(path: Path, kind: str) -> None:
    write, message = FOREIGN[kind]
    write(path)
    before = contents(path.parent) if path.is_file() else {}
    for attempt in (open_for_writing, open_for_reading):
        with pytest.raises(StateError, match=rf"^{path}:? {message}"):
            attempt(path, FIRST)
    assert (contents(path.parent) if path.is_file() else {}) == before


def fill(path: Path) -> None:
    with opened(path) as connection:
        check_pages(connection, path)
        with transaction(connection):
            connection.executemany("INSERT INTO words VALUES (?)", [("x" * 500,)] * 200)


def test_damaged_pages_are_an_error_and_stay_as_they_are(path: Path) -> None:
    fill(path)
    with path.open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xff" * 4096)
    before = path.read_bytes()
    message = rf"^{path} is damaged \(.+\): move it away with its -wal file, and a new one"
    with opened(path) as connection, pytest.raises(StateError, match=message):
        check_pages(connection, path)
    assert path.read_bytes() == before


def test_a_file_that_was_cut_off_is_damaged(path: Path) -> None:
    fill(path)
    os.truncate(path, 5 * 4096)
    with pytest.raises(StateError, match="is damaged"), opened(path) as connection:
        check_pages(connection, path)


def test_an_older_file_is_copied_and_migrated(path: Path) -> None:
    with opened(path) as connection, transaction(connection):
        connection.execute("INSERT INTO words VALUES ('word')")
    with pytest.raises(StateError, match="has version 1: the tunnel migrates it when it starts"):
        open_for_reading(path, THIRD)
    with opened(path, THIRD) as connection:
        assert connection.execute("SELECT * FROM words").fetchall() == [("word", 4)]
        assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    copy = path.with_name("history.db.version-1")
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with opened(copy) as connection:
        assert connection.execute("SELECT * FROM words").fetchall() == [("word",)]


def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    with opened(path, SECOND) as connection, transaction(connection):
        connection.execute("INSERT INTO words VALUES ('word', 0)")
    with pytest.raises(StateError, match="no such table"):
        open_for_writing(path, BROKEN)
    with opened(path, SECOND) as connection:
        assert connection.execute("SELECT * FROM words").fetchall() == [("word", 0)]


def test_a_newer_file_is_refused(path: Path) -> None:
    with opened(path, THIRD):
        pass
    before = path.read_bytes()
    for attempt in (open_for_writing, open_for_reading):
        with pytest.raises(StateError, match="has version 3, and this release of tlstunnel knows up to 2: install the"):
            attempt(path, SECOND)
    assert path.read_bytes() == before


def test_a_reader_cannot_write_and_needs_a_file(path: Path) -> None:
    with pytest.raises(StateError, match="no history yet"):
        open_for_reading(path, FIRST)
    assert not path.exists()
    with (
        opened(path),
        contextlib.closing(open_for_reading(path, FIRST)) as reader,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        reader.execute("INSERT INTO words VALUES ('a')")


def test_there_is_one_writer(path: Path) -> None:
    with lock_for_writing(path):
        message = rf"^{path}: process {os.getpid()} keeps its history there, .*: set state\.dir to another folder"
        with pytest.raises(LockedError, match=message), contextlib.ExitStack() as held:
            held.enter_context(lock_for_writing(path))
    with lock_for_writing(path):
        pass


def test_the_lock_of_a_killed_process_is_free(path: Path) -> None:
    program = (
        "import sys, pathlib; from tlstunnel.state.history.database import lock_for_writing\n"
        "with lock_for_writing(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(LockedError, match=f"process {process.pid} "), lock_for_writing(path):
            pass
        process.kill()
        process.wait()
        with lock_for_writing(path):
            pass


def test_a_lock_of_another_program_may_pass_and_a_missing_table_does_not(path: Path) -> None:
    with opened(path) as connection, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        connection.execute("PRAGMA busy_timeout = 0")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError) as busy, transaction(connection):
            pass
        other.execute("ROLLBACK")
        with pytest.raises(sqlite3.OperationalError) as missing:
            connection.execute("SELECT * FROM missing")
    assert (may_pass(busy.value), is_damage(busy.value)) == (True, False)
    assert (may_pass(missing.value), is_damage(missing.value)) == (False, True)
    assert (may_pass(OSError()), is_damage(OSError())) == (True, False)
    assert (may_pass(ValueError()), is_damage(ValueError())) == (False, False)


def test_the_tables_have_a_column_for_each_count(path: Path) -> None:
    with opened(path, HISTORY) as connection:
        for table in ("minutes", "hours", "days"):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info(site_{table})")]
            own = ["p95"] if table == "days" else []
            assert columns == ["key", "peak", "tunnels", *Counts._fields, *own]
