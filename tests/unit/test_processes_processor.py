"""The share of CPU time, from files as the kernel writes them, and from the real ones."""

import os
import time
from pathlib import Path

from tlstunnel.processes.processor import Processor


def write(path: Path, user: int, idle: int, waiting: int = 0) -> None:
    first = min(os.sched_getaffinity(0))
    lines = [
        f"cpu  9 9 9 9 9 9 9 9 9 9\ncpu{first} {user} 0 0 {idle} {waiting} 0 0 0 50 50",
        "cpu999 7 7 7 7",
        "ctxt 5",
    ]
    path.write_text("\n".join(lines) + "\n")


def test_the_share_is_of_the_time_since_the_last_call(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    write(stat, 100, 100)
    processor = Processor(stat, group=tmp_path)
    write(stat, 175, 125)
    assert processor.measure() == 0.75
    write(stat, 175, 150, 50)
    assert processor.measure() == 0.0
    write(stat, 275, 150, 50)
    assert processor.measure() == 1.0


def test_what_cannot_be_read_is_no_load(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    processor = Processor(stat, group=tmp_path)
    assert processor.measure() == 0.0
    stat.write_text("cpu0 nonsense\n")
    assert processor.measure() == 0.0
    write(stat, 100, 100)
    assert processor.measure() == 0.0
    write(stat, 200, 100)
    assert processor.measure() == 1.0
    assert processor.measure() == 0.0


def test_the_machine_is_busy_while_we_are() -> None:
    processor = Processor()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    assert 0.0 < processor.measure() <= 1.0
