"""The log's file: whole lines, kept while they cannot be written, and a new file after a rename."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import eventually
from tlstunnel.journal import log_file
from tlstunnel.journal.log_file import LogFile


class Opened:
    """A log file, and what it has reported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reported: list[str] = []
        self.file = LogFile(path, self.reported.append)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    found = Opened(tmp_path / "log")
    yield found
    found.file.close()


def test_lines_are_appended(opened: Opened) -> None:
    opened.path.write_bytes(b"before\n")
    for number in range(1_000):
        opened.file.put(b"%d\n" % number)
    opened.file.flush()
    assert opened.path.read_bytes().splitlines() == [b"before", *(b"%d" % number for number in range(1_000))]
    assert opened.file.lost == 0


def test_only_the_owner_and_the_group_may_read_it(opened: Opened) -> None:
    opened.file.put(b"one\n")
    opened.file.flush()
    assert opened.path.stat().st_mode & 0o007 == 0


def test_after_a_rename_and_a_reopening_there_is_a_new_file(opened: Opened) -> None:
    opened.file.put(b"one\n")
    opened.file.flush()
    old = opened.path.rename(opened.path.with_name("log.1"))
    opened.file.put(b"two\n")
    opened.file.flush()
    opened.file.reopen()
    opened.file.put(b"three\n")
    opened.file.flush()
    assert old.read_bytes() == b"one\ntwo\n"
    assert opened.path.read_bytes() == b"three\n"


def test_what_cannot_be_written_is_kept_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "RETRY_SECONDS", 0.02)
    opened = Opened(tmp_path / "missing" / "log")
    opened.file.put(b"one\n")
    eventually(lambda: opened.reported)
    assert opened.reported == ["No such file or directory"]
    opened.path.parent.mkdir()
    eventually(lambda: opened.reported[1:])
    assert opened.reported[1:] == [""]
    opened.file.close()
    assert opened.path.read_bytes() == b"one\n"


def test_what_exceeds_the_bound_is_lost_and_counted(tmp_path: Path) -> None:
    opened = Opened(tmp_path / "missing" / "log")
    line = b"x" * 65_535 + b"\n"
    for _ in range(log_file.MOST_WAITING // len(line) + 3):
        opened.file.put(line)
    assert opened.file.lost == 3
    opened.file.close()


FULL = """
import resource, signal, sys
from pathlib import Path
from tlstunnel.journal import log_file
log_file.RETRY_SECONDS = 0.02
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 1_000_000))
reported = []
file = log_file.LogFile(Path(sys.argv[1]), reported.append)
for number in range(100):
    file.put(b"line %08d\\n" % number)
while not reported:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
while len(reported) < 2:
    pass
file.close()
print(reported)
"""


def test_a_line_that_was_cut_by_a_full_disk_is_written_again(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the kernel takes a part of a write, and then fails."""
    path = tmp_path / "log"
    result = subprocess.run([sys.executable, "-c", FULL, path], check=True, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "['File too large', '']"
    lines = path.read_bytes().splitlines()
    whole = [line for line in lines if len(line) == len("line 00000000")]
    assert whole == [b"line %08d" % number for number in range(100)]
    assert len(lines) == 101


def test_threads_can_write_at_once(opened: Opened) -> None:
    def write(name: int) -> None:
        for number in range(500):
            opened.file.put(b"%d %d\n" % (name, number))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    opened.file.flush()
    assert len(set(opened.path.read_bytes().splitlines())) == 2_000


def test_several_files_of_one_path_do_not_mix_lines(opened: Opened) -> None:
    other = Opened(opened.path)
    for number in range(2_000):
        (opened if number % 2 else other).file.put(b"%06d\n" % number * 3)
    opened.file.flush()
    other.file.close()
    lines = opened.path.read_bytes().splitlines()
    assert len(lines) == 6_000
    assert {len(line) for line in lines} == {6}
