"""The verdict: leases are closed if a request is refused, and policies in mode "log"."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.corpus.managed_rules import plain_request, require_libmodsecurity
from tlstunnel.config import decode
from tlstunnel.firewall.verdict import PASSED, Firewall, Verdict
from tlstunnel.handshake.connection import Connection
from tlstunnel.metrics.families import FIREWALL_CHECKS_FAILED
from tlstunnel.state.memory import MemoryCounters
from tlstunnel.state.throttles import ThrottleRule, Throttles

T = TypeVar("T")
SITE = '[[sites]]\nnames = ["chat.example"]\norigins = ["localhost:3000"]\n'
TWO = '[[sites.rate_limits]]\nname = "tunnels"\nmax_tunnels = 1\n'


def with_firewall(text: str, folder: Path, then: Any, throttles: Throttles | None = None) -> Any:
    async def run() -> Any:
        firewall = Firewall(decode(text, folder, "t.toml"), throttles=throttles)
        await firewall.start()
        try:
            return await then(firewall)
        finally:
            await firewall.close()

    return asyncio.run(run())


def ask(
    firewall: Firewall, target: str = "/", *headers: str, ip: str = "192.0.2.1", behind: bool = False
) -> Coroutine[Any, Any, Verdict]:
    connection = Connection(ip=ip, tls_version="TLSv1.3", tls_sni="chat.example", site="chat.example")
    return firewall.check(plain_request(target, *headers), connection, behind_proxy=behind)


def _refuses_odd_targets(text: str, folder: Path) -> bool:
    async def run(firewall: Firewall) -> bool:
        assert (await ask(firewall, "/a%20b")).refusal is None
        refusal = (await ask(firewall, "/%3A%2F%2F%00%ff/..//x?y=%00")).refusal
        assert refusal is None or refusal.status == 400
        return refusal is not None

    return bool(with_firewall(text, folder, run))


RULE = '[[{}rules]]\nname = "r"\nwhen = \'path == "/x"\'\naction = "block"\n'
LIMIT = '[[{}rate_limits]]\nname = "l"\nlimit = "9/hour"\n'
DEPENDING = {
    "a rule": SITE + RULE.format("sites."),
    "a rule of all sites": RULE.format("") + SITE,
    "a limit by path": SITE + LIMIT.format("sites.") + 'key = ["ip", "path"]\n',
    "a limit with a condition": LIMIT.format("") + "when = 'path == \"/x\"'\n" + SITE,
    "a route": SITE + '[[sites.routes]]\npath = "/x"\norigins = ["localhost:3001"]\n',
    "a worker": SITE + 'worker = "worker.py:fetch"\n',
}
INDEPENDENT = {
    "no checks": SITE,
    "address lists": 'block_addresses = ["198.51.100.1"]\n' + SITE,
    "a check of web origins": SITE + 'web_origins = ["same"]\n',
    "a limit by address": SITE + LIMIT.format("sites."),
}


@pytest.mark.parametrize("text", DEPENDING.values(), ids=DEPENDING)
def test_ambiguous_targets_are_refused_where_something_depends_on_the_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").touch()
    assert _refuses_odd_targets(text, tmp_path)
    assert not _refuses_odd_targets(text.replace(SITE, f"{SITE}strict_path = false\n"), tmp_path)


@pytest.mark.parametrize("text", INDEPENDENT.values(), ids=INDEPENDENT)
def test_any_target_passes_where_nothing_depends_on_the_path(text: str, tmp_path: Path) -> None:
    assert not _refuses_odd_targets(text, tmp_path)


def test_without_checks_there_is_nothing_to_do(tmp_path: Path) -> None:
    async def run(firewall: Firewall) -> None:
        assert await ask(firewall) is PASSED
        assert firewall.check_address("192.0.2.1") is None

    with_firewall(SITE, tmp_path, run)


def _managed(folder: Path, rule: str = "@streq bad") -> str:
    require_libmodsecurity()
    (folder / "own.conf").write_text(f'SecRule ARGS:x "{rule}" "id:1001,phase:2,deny,msg:\'bad x\'"\n')
    return f'{SITE}{TWO}[sites.managed_rules]\nrules = "own.conf"\ntimeout = "10s"\n'


def test_tunnel_is_returned_if_managed_rules_refuse(tmp_path: Path) -> None:
    async def run(firewall: Firewall) -> None:
        for _ in range(3):
            verdict = await ask(firewall, "/?x=bad")
            assert verdict.refusal is not None
            assert verdict.refusal.reason == "managed rules"
        passed = await ask(firewall, "/?x=good")
        assert passed.refusal is None
        full = await ask(firewall, "/?x=good")
        assert full.refusal is not None
        assert full.refusal.status == 429
        assert passed.lease is not None
        passed.lease.close()
        again = await ask(firewall, "/?x=good")
        assert again.refusal is None

    with_firewall(_managed(tmp_path), tmp_path, run)


def test_tunnel_is_returned_if_the_client_leaves_during_the_check(tmp_path: Path) -> None:
    async def run(firewall: Firewall) -> None:
        for _ in range(3):
            task = asyncio.ensure_future(ask(firewall, f"/?x={'a' * 200}"))
            # It begins, is counted, and waits for the helper.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (await ask(firewall, "/?x=good")).refusal is None

    with_firewall(_managed(tmp_path), tmp_path, run)


LOGGING = """
addresses_mode = "log"
block_addresses = ["192.0.2.0/24"]
[[rules]]
name = "all"
when = "true"
action = "block"
mode = "log"
[[sites]]
names = ["chat.example"]
origins = ["localhost:3000"]
block_addresses = ["192.0.2.1"]
addresses_mode = "log"
web_origins = ["same"]
require_web_origin = true
web_origins_mode = "log"
[[sites.rules]]
name = "each"
when = 'path == "/"'
action = "block"
mode = "log"
[[sites.rate_limits]]
name = "none"
limit = "1/hour"
strategy = "moving"
mode = "log"
"""


def failed_checks(firewall: Firewall) -> dict[str, int]:
    found: dict[str, int] = {}
    for (_, reason, mode), count in firewall.metrics[FIREWALL_CHECKS_FAILED].values.items():
        assert mode == "log"
        found[reason] = found.get(reason, 0) + count
    return found


def test_policy_in_mode_log_passes_and_counts(tmp_path: Path) -> None:
    async def run(firewall: Firewall) -> None:
        assert firewall.check_address("192.0.2.1") is None
        assert failed_checks(firewall) == {"address blocked": 1}
        await ask(firewall)
        verdict = await ask(firewall, behind=True)
        assert verdict.refusal is None
        logged = verdict.to_record()["logged"]
        assert logged == ["addresses", "addresses", "web origin", "all", "each", "none"]
        assert failed_checks(firewall)["address blocked"] == 4
        assert sum(failed_checks(firewall).values()) >= 6

    with_firewall(LOGGING, tmp_path, run)


def test_lists_of_all_sites_are_checked_for_clients_behind_a_proxy(tmp_path: Path) -> None:
    async def run(firewall: Firewall) -> None:
        assert (await ask(firewall, ip="203.0.113.1")).refusal is None
        refusal = (await ask(firewall, ip="203.0.113.1", behind=True)).refusal
        assert refusal is not None
        assert refusal.status == 403

    with_firewall(f'block_addresses = ["203.0.113.0/24"]\n{SITE}', tmp_path, run)


@pytest.mark.parametrize("text", [SITE, SITE + LIMIT.format("sites."), SITE + RULE.format("sites.")])
def test_a_throttled_site_refuses_above_the_rate(text: str, tmp_path: Path) -> None:
    counters = MemoryCounters()
    throttles = Throttles(lambda: counters)

    async def run(firewall: Firewall) -> list[str]:
        found = []
        for _ in range(3):
            verdict = await ask(firewall)
            found.append(verdict.refusal.reason if verdict.refusal is not None else "")
            if verdict.lease is not None:
                verdict.lease.close()
        return found

    assert with_firewall(text, tmp_path, run, throttles) == [""] * 3
    throttles.replace([ThrottleRule(id=1, site="chat.example", amount=1, window=3600, until=1e12)])
    assert with_firewall(text, tmp_path, run, throttles) == ["", "throttled", "throttled"]


def test_what_rules_block_does_not_count_for_a_throttle(tmp_path: Path) -> None:
    counters = MemoryCounters()
    throttles = Throttles(lambda: counters)
    throttles.replace([ThrottleRule(id=1, site="chat.example", amount=1, window=3600, until=1e12)])

    async def run(firewall: Firewall) -> list[int]:
        found = [await ask(firewall, target) for target in ("/x", "/x", "/", "/")]
        return [one.refusal.status if one.refusal is not None else 101 for one in found]

    assert with_firewall(SITE + RULE.format("sites."), tmp_path, run, throttles) == [403, 403, 101, 429]
