"""The queue of the pool: bounded in length and time, and without requests that were cancelled."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.corpus.managed_rules import helper_pids, own_rules, require_libmodsecurity, subject, with_pool
from tlstunnel.errors import ConfigurationError
from tlstunnel.firewall.managed import pool as pool_module
from tlstunnel.firewall.managed.messages import Evaluation, RuleSet
from tlstunnel.firewall.managed.pool import Failure, HelperPool
from tlstunnel.firewall.managed.rule_sets import build

ORDINARY = subject("/?x=1")
CLEAN = Evaluation(0)


@pytest.fixture
def rule_set(tmp_path: Path) -> RuleSet:
    require_libmodsecurity()
    return build(own_rules(tmp_path, 'SecRule ARGS:x "@streq a" "id:1,phase:2,deny"\n'))


def test_full_queue_fails_at_once(rule_set: RuleSet) -> None:
    async def ask(pool: HelperPool) -> None:
        child = helper_pids(pool)[0]
        os.kill(child, signal.SIGSTOP)
        pending = [asyncio.create_task(pool.evaluate(rule_set.name, ORDINARY, 60)) for _ in range(4)]
        await asyncio.sleep(0)
        assert await pool.evaluate(rule_set.name, ORDINARY, 60) is Failure.FULL
        os.kill(child, signal.SIGCONT)
        assert await asyncio.gather(*pending) == [CLEAN] * 4

    with_pool(HelperPool([rule_set], queue=3), ask)


def test_waiting_is_bounded(rule_set: RuleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MAX_WAIT", 0.05)

    async def ask(pool: HelperPool) -> None:
        child = helper_pids(pool)[0]
        os.kill(child, signal.SIGSTOP)
        pending = asyncio.create_task(pool.evaluate(rule_set.name, ORDINARY, 60))
        await asyncio.sleep(0)
        assert await pool.evaluate(rule_set.name, ORDINARY, 60) is Failure.WAITED
        os.kill(child, signal.SIGCONT)
        # The one that had begun has its own deadline.
        assert await pending == CLEAN

    with_pool(HelperPool([rule_set], queue=3), ask)


def test_cancelled_request_leaves_the_queue(rule_set: RuleSet) -> None:
    async def ask(pool: HelperPool) -> None:
        child = helper_pids(pool)[0]
        os.kill(child, signal.SIGSTOP)
        pending = [asyncio.create_task(pool.evaluate(rule_set.name, ORDINARY, 60)) for _ in range(3)]
        await asyncio.sleep(0)
        pending[0].cancel()  # with the helper
        pending[1].cancel()  # in the queue
        await asyncio.gather(*pending[:2], return_exceptions=True)
        assert [task.cancelled() for task in pending] == [True, True, False]
        behind = asyncio.create_task(pool.evaluate(rule_set.name, ORDINARY, 60))
        await asyncio.sleep(0)
        assert await pool.evaluate(rule_set.name, ORDINARY, 60) is Failure.FULL
        os.kill(child, signal.SIGCONT)
        assert await pending[2] == await behind == CLEAN

    with_pool(HelperPool([rule_set], queue=2), ask)


def test_all_helpers_work(rule_set: RuleSet) -> None:
    async def ask(pool: HelperPool) -> None:
        stopped, free = helper_pids(pool)
        os.kill(stopped, signal.SIGSTOP)
        found = asyncio.gather(*(pool.evaluate(rule_set.name, ORDINARY, 60) for _ in range(50)))
        # The stopped one has one request; the other serves the rest.
        await asyncio.sleep(0)
        os.kill(stopped, signal.SIGCONT)
        assert await found == [CLEAN] * 50
        assert helper_pids(pool) == (stopped, free)

    with_pool(HelperPool([rule_set], processes=2), ask)


def test_closing_ends_all_requests(rule_set: RuleSet) -> None:
    async def run() -> None:
        pool = HelperPool([rule_set])
        assert await pool.evaluate(rule_set.name, ORDINARY, 60) is Failure.CLOSED
        await pool.start()
        os.kill(helper_pids(pool)[0], signal.SIGSTOP)
        pending = [asyncio.create_task(pool.evaluate(rule_set.name, ORDINARY, 60)) for _ in range(5)]
        await asyncio.sleep(0)
        await pool.close()
        assert await asyncio.gather(*pending) == [Failure.CLOSED] * 5
        assert await pool.evaluate(rule_set.name, ORDINARY, 60) is Failure.CLOSED
        await pool.close()

    asyncio.run(run())


def test_equal_rule_sets_are_loaded_once(rule_set: RuleSet, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = build(own_rules(tmp_path / "other", 'SecRule ARGS:x "@streq b" "id:1,phase:2,deny"\n'))

    async def ask(pool: HelperPool) -> list[object]:
        target = subject("/?x=b")
        return [await pool.evaluate(name, target, 60) for name in (rule_set.name, other.name)]

    pool = HelperPool([rule_set, other, rule_set])
    assert pool.rule_sets == (rule_set, other)
    first, second = with_pool(pool, ask)
    assert first == CLEAN
    assert isinstance(second, Evaluation)
    assert second.denied_by == 1


# Responds to its first request with invalid data, or exits; after that, a real helper is started.
LIAR = """\
import os, pathlib, socket, sys
import msgspec
from tlstunnel.firewall.managed.messages import END_OF_RULES, RulesLoaded, Ready
lied = pathlib.Path({lied!r})
if lied.exists():
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
connection = socket.socket(fileno=int(sys.argv[4]))
while connection.recv(200000) != END_OF_RULES:
    pass
connection.sendall(msgspec.msgpack.encode(RulesLoaded()))
connection.sendall(msgspec.msgpack.encode(Ready(os.getpid())))
connection.recv(200000)
lied.touch()
if {packet!r}:
    connection.sendall({packet!r})
    connection.recv(200000)
"""


@pytest.mark.parametrize(("packet", "said"), [(b"\xc1", "it sent an invalid message"), (b"", "it exited")])
def test_helper_that_sends_nonsense_is_restarted(
    rule_set: RuleSet, packet: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, program = tmp_path / "liar.py", tmp_path / "liar"
    script.write_text(LIAR.format(lied=str(tmp_path / "lied"), python=sys.executable, packet=packet))
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr("tlstunnel.program.PYTHON", str(program))
    monkeypatch.setattr(pool_module, "MAX_WAIT", 60.0)
    log: list[str] = []

    async def ask(pool: HelperPool) -> None:
        assert await pool.evaluate(rule_set.name, ORDINARY, 60) is Failure.DIED
        assert await pool.evaluate(rule_set.name, ORDINARY, 60) == CLEAN

    with_pool(HelperPool([rule_set], log=log.append), ask)
    assert len(log) == 1
    assert said in log[0]


def test_helper_that_cannot_run_prevents_the_start(rule_set: RuleSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlstunnel.program.PYTHON", "/bin/false")
    with pytest.raises(ConfigurationError, match="exited during its start: exited with status 1"):
        asyncio.run(HelperPool([rule_set]).start())


def test_helper_that_does_not_load_in_time_prevents_the_start(
    rule_set: RuleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LOAD_TIMEOUT", 0.001)
    with pytest.raises(ConfigurationError, match="did not load the rules within"):
        asyncio.run(HelperPool([rule_set]).start())
