"""tlstunnel.testing.program: how tests start programs, and end the programs that these have started."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tlstunnel.testing.program import Program, kill_left_behind, mark_environment, start_process

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture
def ignored() -> Iterator[None]:
    """Ignore the signals that a program started by ``nohup program &`` ignores."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("ignored")
def test_a_program_ignores_no_signal_even_where_this_one_does() -> None:
    code = (
        f"import signal; print([int(n) for n in {[int(n) for n in SIGNALS]} if signal.getsignal(n) is signal.SIG_IGN])"
    )
    process = start_process([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.communicate(timeout=30)[0] == "[]\n"
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 3


@pytest.fixture
def program() -> Iterator[Program]:
    program = Program("the program")
    yield program
    program.end()


def _run(program: Program, code: str) -> None:
    program.start([sys.executable, "-c", code], environment=os.environ)


def test_records_and_other_lines(program: Program) -> None:
    code = (
        """import sys; sys.stderr.write('{"event": "one", "n": 1}\\nnot JSON\\n{"n": 2}\\n[]\\n{"event": "two"}\\n')"""
    )
    _run(program, code)
    assert program.wait_until(lambda: program.records(event="two"), "no two") == [{"event": "two"}]
    assert program.wait() == 0
    assert program.records(n=1) == [{"event": "one", "n": 1}]
    assert program.records(1) == [{"event": "two"}]
    assert program.strays == ["not JSON", '{"n": 2}', "[]"]
    assert program.text.count("\n") == 5


def test_an_event_that_never_comes(program: Program) -> None:
    _run(program, """import sys; print('{"event": "one"}', file=sys.stderr, flush=True); input = sys.stdin.read()""")
    with pytest.raises(AssertionError, match=r'(?s)no two before it exited; its log:\n\{"event": "one"\}'):
        program.wait_until(lambda: program.records(event="two"), "no two")


def test_a_program_that_does_not_exit(program: Program) -> None:
    _run(program, "import time; time.sleep(60)")
    with pytest.raises(AssertionError, match=r"the program did not exit within 0\.05 s; its log:"):
        program.wait(0.05)


def test_processes_that_leave_their_session_are_found_and_killed() -> None:
    mark, environment = mark_environment(os.environ)
    code = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    start_process([sys.executable, "-c", code], env=environment).wait(30)
    assert [line.split() for line in kill_left_behind(mark, grace=0)] == [["sleep", "60"]]
    assert kill_left_behind(mark) == []
