"""A helper that dies, hangs or is replaced fails at most one request, delays no other, and leaves nothing behind."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.corpus.managed_rules import helper_pids, own_rules, require_libmodsecurity, subject, with_pool
from tests.harness import TIMEOUT, assert_below, eventually
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.managed import pool as pool_module
from tlstunnel.firewall.managed.messages import Evaluation, RuleSet, RuleSource
from tlstunnel.firewall.managed.pool import Failure, HelperPool
from tlstunnel.firewall.managed.rule_sets import build
from tlstunnel.program import HELPER_VARIABLES

RULES = 'SecRule ARGS:x "@streq bad" "id:1001,phase:2,deny,status:429,msg:\'bad x\'"\n'
# PCRE2 gives up on one after 20 ms.
SLOW_RULES = "".join(f'SecRule ARGS:y "@rx ^(a+)+$" "id:{2000 + number},phase:2,deny"\n' for number in range(500))
SLOW = subject(f"/?y={'a' * 60}!")
ORDINARY, BAD = subject("/?x=good"), subject("/?x=bad")
CLEAN = Evaluation(0)


@pytest.fixture
def rule_set(tmp_path: Path) -> RuleSet:
    require_libmodsecurity()
    return build(own_rules(tmp_path, RULES + SLOW_RULES))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until `condition` is true."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.005)


def test_helper_evaluates_and_leaves_nothing_behind(rule_set: RuleSet) -> None:
    before = descriptors()
    pids: list[int] = []

    async def ask(pool: HelperPool) -> None:
        pids.extend([*helper_pids(pool), *map(parent_of, helper_pids(pool))])
        assert await pool.evaluate(rule_set.name, ORDINARY, 5) == CLEAN
        bad = await pool.evaluate(rule_set.name, BAD, 5)
        assert isinstance(bad, Evaluation)
        assert (bad.denied_by, bad.status) == (1001, 429)
        assert [(match.id, match.message) for match in bad.matches] == [(1001, "bad x")]

    with_pool(HelperPool([rule_set], processes=2), ask)
    assert len(set(pids)) == 4
    eventually(lambda: not any(running(pid) for pid in pids))
    assert descriptors() == before


def test_hanging_evaluation_is_killed_and_the_next_succeeds(rule_set: RuleSet) -> None:
    """A regular expression of the user's really backtracks for seconds, without a signal from outside."""

    async def ask(pool: HelperPool) -> float:
        child = helper_pids(pool)[0]
        began = time.monotonic()
        hanging = asyncio.create_task(pool.evaluate(rule_set.name, SLOW, 0.05))
        behind = [asyncio.create_task(pool.evaluate(rule_set.name, ORDINARY, 5)) for _ in range(20)]
        assert await hanging is Failure.LATE
        took = time.monotonic() - began
        assert await asyncio.gather(*behind) == [CLEAN] * 20
        assert helper_pids(pool) != (child,)
        assert took >= 0.05
        await until(lambda: not running(child))
        return took

    assert_below(1, lambda: with_pool(HelperPool([rule_set]), ask))


def test_stopped_helper_misses_the_deadline_and_is_replaced(rule_set: RuleSet) -> None:
    async def ask(pool: HelperPool) -> None:
        for _ in range(3):
            stopped = helper_pids(pool)[0]
            os.kill(stopped, signal.SIGSTOP)
            assert await pool.evaluate(rule_set.name, ORDINARY, 0.05) is Failure.LATE
            # Not before its successor has a request: the deadline of this one is not spent on waiting.
            assert await pool.evaluate(rule_set.name, ORDINARY, 5) == CLEAN
            assert helper_pids(pool) != (stopped,)

    with_pool(HelperPool([rule_set]), ask)


def test_killing_a_helper_fails_only_its_request(rule_set: RuleSet) -> None:
    async def ask(pool: HelperPool) -> None:
        child = helper_pids(pool)[0]
        os.kill(child, signal.SIGSTOP)
        middle = asyncio.create_task(pool.evaluate(rule_set.name, BAD, 60))
        behind = [asyncio.create_task(pool.evaluate(rule_set.name, ORDINARY, 60)) for _ in range(20)]
        await asyncio.sleep(0)  # the requests have been sent to them
        os.kill(child, signal.SIGKILL)
        assert await middle is Failure.DIED
        assert await asyncio.gather(*behind) == [CLEAN] * 20

    with_pool(HelperPool([rule_set]), ask)


def test_helper_whose_loading_process_is_killed_is_restarted(
    rule_set: RuleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MAX_WAIT", 60.0)
    log: list[str] = []

    async def ask(pool: HelperPool) -> None:
        child = helper_pids(pool)[0]
        os.kill(parent_of(child), signal.SIGKILL)
        await until(lambda: not helper_pids(pool))
        assert await pool.evaluate(rule_set.name, ORDINARY, 60) == CLEAN
        await until(lambda: not running(child))

    with_pool(HelperPool([rule_set], log=log.append), ask)
    assert len(log) == 1
    assert "restarted" in log[0]
    assert "SIGKILL" in log[0]


def test_helper_whose_loading_process_hangs_is_restarted(rule_set: RuleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "CHILD_TIMEOUT", 0.1)
    monkeypatch.setattr(pool_module, "MAX_WAIT", 60.0)
    log: list[str] = []

    async def ask(pool: HelperPool) -> None:
        child = helper_pids(pool)[0]
        loader = parent_of(child)
        os.kill(loader, signal.SIGSTOP)
        os.kill(child, signal.SIGSTOP)
        assert await pool.evaluate(rule_set.name, ORDINARY, 0.05) is Failure.LATE
        assert await pool.evaluate(rule_set.name, ORDINARY, 60) == CLEAN
        assert not running(loader)
        assert not running(child)

    with_pool(HelperPool([rule_set], log=log.append), ask)
    assert "does not fork a child" in log[0]


def test_failed_restart_of_a_helper_is_retried(
    rule_set: RuleSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "MAX_WAIT", 0.1)
    log: list[str] = []
    rules = tmp_path / "own.conf"

    async def ask(pool: HelperPool) -> None:
        rules.rename(tmp_path / "away")
        os.kill(parent_of(helper_pids(pool)[0]), signal.SIGKILL)
        await until(lambda: any("next attempt" in line for line in log))
        assert await pool.evaluate(rule_set.name, ORDINARY, 5) is Failure.WAITED
        (tmp_path / "away").rename(rules)
        await until(lambda: helper_pids(pool))
        assert await pool.evaluate(rule_set.name, ORDINARY, 5) == CLEAN

    with_pool(HelperPool([rule_set], log=log.append), ask)
    assert str(rules) in log[1]


def test_replacing_children_fails_no_request(rule_set: RuleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_WAIT", 60.0)

    async def ask(pool: HelperPool) -> set[int]:
        seen: set[int] = set()

        async def one() -> None:
            assert await pool.evaluate(rule_set.name, ORDINARY, 30) == CLEAN
            seen.update(helper_pids(pool))

        await asyncio.gather(*(one() for _ in range(100)))
        return seen

    assert len(with_pool(HelperPool([rule_set], evaluations=10), ask)) >= 9


def test_rules_that_do_not_load_prevent_the_start(rule_set: RuleSet) -> None:
    broken = RuleSet("broken", (RuleSource(text="SecRule ARGS\n"),))
    before = descriptors()
    with pytest.raises(ConfigurationError, match="libmodsecurity cannot load it"):
        asyncio.run(HelperPool([rule_set, broken], processes=2).start())
    assert not Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert descriptors() == before


def test_helper_holds_nothing_of_the_tunnel_and_few_rights(rule_set: RuleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_PASSPHRASE", "correct horse")

    async def ask(pool: HelperPool) -> None:
        child = helper_pids(pool)[0]
        ours = links("self")
        for pid in (child, parent_of(child)):
            theirs = links(str(pid))
            assert {theirs.pop(number) for number in "012"} == {"/dev/null"}
            # libmodsecurity's own socket, which its curl opens, and the end of the pair.
            assert {link.partition(":")[0] for link in theirs.values()} == {"socket"}
            assert not set(theirs.values()) & set(ours.values())
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")[:-1]
            assert {variable.partition(b"=")[0].decode() for variable in variables} <= set(HELPER_VARIABLES)
            assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
            limits = Path(f"/proc/{pid}/limits").read_text()
            for limit, most in (("Max open files", "0"), ("Max file size", "0"), ("Max core file size", "[01]")):
                assert re.search(rf"^{limit} +{most} +{most} ", limits, re.MULTILINE), limit

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        with_pool(HelperPool([rule_set]), ask)


def links(pid: str) -> dict[str, str]:
    """Return what the descriptors of a process refer to, by number."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that reads the folder
            found[entry.name] = str(entry.readlink())
    return found


PARENT = """
import asyncio, sys
from tlstunnel.firewall.managed.messages import RuleSet, RuleSource
from tlstunnel.firewall.managed.pool import HelperPool
from tests.corpus.managed_rules import helper_pids, subject

async def main():
    pool = HelperPool([RuleSet("r", (RuleSource(text="SecRuleEngine On\\n"), RuleSource(file=sys.argv[1])))])
    await pool.start()
    print(*helper_pids(pool), flush=True)
    await pool.evaluate("r", subject("/?y=" + "a" * 60 + "!"), 60)

asyncio.run(main())
"""


def test_helper_exits_with_the_tunnel_even_during_an_evaluation(rule_set: RuleSet, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(tmp_path / "own.conf")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        loader = parent_of(child)
        eventually(lambda: Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "R")
        parent.kill()
    eventually(lambda: not running(child) and not running(loader))
