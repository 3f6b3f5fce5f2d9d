"""`config check` and `start` accept and reject the same configurations, and report every problem of each.

See tests/corpus/configurations.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import structlog

from tests.corpus.configurations import Configuration, read_corpus, write_named_files
from tests.corpus.managed_rules import require_libmodsecurity
from tests.harness import PROGRAM, TIMEOUT, child_environment
from tlstunnel.cli import main
from tlstunnel.config import read
from tlstunnel.config.invocation import Invocation
from tlstunnel.errors import ConfigurationError
from tlstunnel.journal.journal import Journal
from tlstunnel.serving.service import Service
from tlstunnel.sockets.readiness import TunnelLoop

GOOD, BAD = read_corpus("good"), read_corpus("bad")


def named(configurations: Sequence[Configuration], *names: str) -> list[Configuration]:
    found = [each for each in configurations if each.name in names]
    assert len(found) == len(names)
    return found


@pytest.fixture(scope="session")
def named_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    write_named_files(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which the test certificate is made."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Return the exit status of `config check`, and what it reports, without the program's name."""
    monkeypatch.setattr(sys, "argv", ["tlstunnel", "config", "check", str(file)])
    with pytest.raises(SystemExit) as caught:
        main()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert all(line.startswith("tlstunnel: ") for line in lines)
    assert captured.out.endswith("\nok\n") if not caught.value.code else captured.out == ""
    return int(caught.value.code or 0), [line.removeprefix("tlstunnel: ") for line in lines]


def start(file: Path, hints: Sequence[str] = ()) -> list[str]:
    """Begin to serve as a child does, wait until each of `hints` is logged, and end; return the problems."""

    async def begin() -> list[str]:
        text = read(file)
        invocation = Invocation(file)
        if not invocation.configuration(text).sites:
            invocation = Invocation(file, echo=1)
        service = await Service.begin(invocation, text, Journal())
        try:
            async with asyncio.timeout(TIMEOUT):
                while not all(any(hint in str(line) for line in logged) for hint in hints):
                    await asyncio.sleep(0.01)
        finally:
            await service.close()
        return []

    with structlog.testing.capture_logs() as logged, asyncio.Runner(loop_factory=TunnelLoop) as runner:
        try:
            return runner.run(begin())
        except ConfigurationError as error:
            return list(error.problems)


def match(problems: Sequence[str], expected: Sequence[tuple[str, str]], file: Path) -> None:
    """Compare what is reported with what the file says."""
    written = [problem.replace(f"{file.parent}/", "") for problem in problems]
    assert len(written) == len(expected), written
    for problem, (key, part) in zip(written, expected, strict=True):
        place, _, rest = problem.partition(": ")
        assert place.partition(":")[0] == "t.toml"
        assert not key or rest.startswith(f"{key}: ") or place == f"t.toml:{key}", problem
        assert part in rest, problem


CopyAndCheck = Callable[[Configuration], tuple[Path, int, list[str]]]


@pytest.fixture
def copy_and_check(
    folder: Path, named_files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CopyAndCheck:
    """Return a function that copies a file and the files that it names, and returns the copy and what `check` does."""

    def run(configuration: Configuration) -> tuple[Path, int, list[str]]:
        if "managed_rules" in configuration.name:
            require_libmodsecurity()
        file = configuration.copy_to(folder, named_files)
        return file, *check(file, capsys, monkeypatch)

    return run


@pytest.mark.parametrize("configuration", BAD, ids=lambda each: each.name)
def test_bad(configuration: Configuration, copy_and_check: CopyAndCheck) -> None:
    file, status, reported = copy_and_check(configuration)
    assert status == 1
    match(reported, configuration.problems, file)
    assert start(file) == reported


@pytest.mark.parametrize("configuration", GOOD, ids=lambda each: each.name)
def test_good(configuration: Configuration, copy_and_check: CopyAndCheck) -> None:
    file, status, reported = copy_and_check(configuration)
    assert status == 0
    warnings = [line.replace("warning: ", "", 1) for line in reported]
    assert len(warnings) == len([line for line in reported if ": warning: " in line])
    match(warnings, configuration.warnings, file)
    assert start(file, [part for _, part in configuration.warnings]) == []


def test_the_corpus_is_large() -> None:
    assert len(GOOD) >= 25
    assert len(BAD) >= 60
    assert all(each.problems for each in BAD)


SAMPLE = named(BAD, "everything_at_once", "missing_pair", "worker_that_raises", "wrong_type", "every_wrong_rule")


@pytest.mark.parametrize("configuration", SAMPLE, ids=lambda each: each.name)
def test_the_program_itself_rejects_it(configuration: Configuration, folder: Path, named_files: Path) -> None:
    file = configuration.copy_to(folder, named_files)
    ran = [
        subprocess.run(
            [*PROGRAM, *words],
            cwd=folder,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for words in (["config", "check", str(file)], ["start", "--listen", "127.0.0.1:0", "--config", str(file)])
    ]
    checked, started = ran
    assert (checked.returncode, started.returncode) == (1, 1), started.stderr
    assert "Traceback" not in started.stderr
    problems = [line.removeprefix("tlstunnel: ") for line in checked.stderr.splitlines()]
    match(problems, configuration.problems, file)
    lines = [line for line in started.stderr.splitlines() if line.startswith("tlstunnel: ")]
    assert lines == checked.stderr.splitlines()


def test_the_program_itself_accepts_a_key_with_a_passphrase(folder: Path, named_files: Path) -> None:
    (configuration,) = named(GOOD, "passphrase_file")
    file = configuration.copy_to(folder, named_files)
    words = ["start", "--listen", "127.0.0.1:0", "--config", str(file), "--control", "c.sock", "--log-format", "json"]
    with subprocess.Popen([*PROGRAM, *words], cwd=folder, env=child_environment(), stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        try:
            events = (json.loads(line)["event"] for line in process.stderr)
            assert "ready" in events
        finally:
            process.terminate()
            process.communicate(timeout=30)
    assert process.returncode == 0
