"""Fuzzing with Atheris: `./scripts/soak [SECONDS]`, half of SECONDS for each target. tests/fuzz has the targets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import corpus
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.soak
@pytest.mark.parametrize("name", TARGETS)
def test_no_input_breaks_a_reader(name: str, tmp_path: Path) -> None:
    seconds = int(float(os.environ.get("TLSTUNNEL_SOAK_SECONDS", "600")) / 2)
    folder = corpus.FOUND / name
    corpus.unpack(name, folder)
    command = [sys.executable, "-m", "tests.fuzz.run", name, str(folder), f"-max_total_time={seconds}"]
    # Atheris makes everything ten times slower: 5 s are half a second, in which no other tunnel of the process moves.
    options = ["-max_len=16384", "-timeout=5", "-rss_limit_mb=1024", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=seconds + 120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done " in done.stderr, done.stderr[-4000:]
