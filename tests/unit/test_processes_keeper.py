"""From what the parent sends each second to the history, and what waits while that is not open."""

import asyncio
import stat
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tlstunnel.backoff import Backoff
from tlstunnel.config import decode
from tlstunnel.processes import keeper as module
from tlstunnel.processes.keeper import Keeper
from tlstunnel.processes.messages import Sampled
from tlstunnel.state.folder import INSTANCE_FILE
from tlstunnel.state.history.database import FILE_NAME
from tlstunnel.state.history.reader import HistoryReader
from tlstunnel.state.history.samples import MINUTE, Counts, Instance, Totals
from tlstunnel.state.history.store import MINUTES, Keep

START = 29_000_000 * MINUTE


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30.0))


def values(tunnels: int, handshakes: int = 0) -> list[int]:
    return [tunnels, handshakes, *[0] * (len(Counts._fields) - 1)]


def sampled(second: int, sites: dict[str, list[int]], *, whole: bool = False) -> Sampled:
    return Sampled(time=START + second, age=second, sites=sites, whole=whole)


async def opened(keeper: Keeper) -> Keeper:
    keeper.start()
    while not keeper.describe().path:
        await asyncio.sleep(0.01)
    return keeper


def read(folder: Path, minute: int = 0) -> dict[str, tuple[int, float, int]]:
    """Return the samples, the mean and the handshakes of each site in a minute."""
    begin = START + minute * MINUTE
    with HistoryReader(folder) as reader:
        found = reader.read_totals(MINUTES, begin, begin + MINUTE)
    return {
        name: (usage.samples, usage.level.mean, usage.counts.handshakes) for name, usage in found.items() if usage.level
    }


def test_sites_that_have_not_changed_are_sampled_too(tmp_path: Path) -> None:
    async def main() -> None:
        keeper = await opened(Keeper(tmp_path, Keep(), "x"))
        keeper.take(sampled(0, {"a": values(2, 2), "b": values(0), "c": values(1, 1)}, whole=True))
        keeper.take(sampled(1, {}))
        keeper.take(sampled(2, {"c": values(0, 1)}))
        keeper.take(sampled(3, {"b": values(4, 4)}))
        await keeper.close()

    run(main())
    assert read(tmp_path) == {"a": (4, 2.0, 2), "b": (4, 1.0, 4), "c": (4, 0.5, 1)}


def test_sites_that_are_gone_are_sampled_no_more(tmp_path: Path) -> None:
    async def main() -> None:
        keeper = await opened(Keeper(tmp_path, Keep(), "x"))
        keeper.take(sampled(0, {"a": values(2, 2), "b": values(3, 3)}, whole=True))
        keeper.take(sampled(1, {"a": values(2, 2)}, whole=True))
        keeper.take(sampled(2, {}))
        keeper.take(sampled(60, {}))
        await keeper.close()

    run(main())
    assert read(tmp_path) == {"a": (3, 2.0, 2), "b": (3, 1.0, 3)}
    assert read(tmp_path, 1) == {"a": (1, 2.0, 0), "b": (1, 0.0, 0)}


def test_idle_sites_are_known(tmp_path: Path) -> None:
    """The history tells an idle site from one that does not exist."""

    async def main() -> None:
        keeper = await opened(Keeper(tmp_path, Keep(), "x"))
        keeper.take(sampled(0, {"idle": values(0)}, whole=True))
        await keeper.close()

    run(main())
    assert read(tmp_path) == {"idle": (1, 0.0, 0)}


def test_each_site_is_listed_in_each_minute() -> None:
    """Whether it is idle or not, also those that come later."""
    names = {f"{number}.example" for number in range(173)}
    samples = module._Samples("x", None, print)
    samples.add(sampled(0, {name: values(0) for name in names}, whole=True), ())
    samples.add(sampled(1, {"new.example": values(0)}), ())
    listed = set[str]()
    for _ in range(MINUTE):
        samples.add(sampled(2, {}), ())
        (instance,) = samples._waiting[-1][1]
        assert len(instance.sites) < 10
        listed.update(instance.sites)
    assert listed == names | {"new.example"}


def test_samples_wait_until_the_history_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there is room for; of those before only the counts remain."""
    monkeypatch.setattr(module, "MOST_WAITING", 2)

    async def main() -> None:
        keeper = Keeper(tmp_path, Keep(), "x")
        keeper.take(sampled(0, {"a": values(9, 9)}, whole=True))
        for second in range(1, 4):
            keeper.take(sampled(second, {"a": values(second, 9 + second)}))
        await opened(keeper)
        await keeper.close()

    run(main())
    assert read(tmp_path) == {"a": (2, 2.5, 12)}


def test_the_next_keeper_counts_on(tmp_path: Path) -> None:
    """Also if samples are missing between the two, and if the values are of a release that counts more."""

    async def main() -> None:
        for second, handshakes in ((0, 2), (5, 7), (9, 8)):
            keeper = await opened(Keeper(tmp_path, Keep(), "x"))
            keeper.take(sampled(second, {"a": [*values(1, handshakes), 5]}, whole=True))
            await keeper.close()

    run(main())
    assert read(tmp_path) == {"a": (3, 1.0, 8)}


def test_it_is_tried_again_to_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE_NAME).write_text("not ours")
    monkeypatch.setattr(module, "RETRIES", Backoff(0.01, 0.01))

    async def main() -> None:
        keeper = Keeper(tmp_path, Keep(), "x")
        with capture_logs() as logs:
            keeper.start()
            while not logs:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert [log["event"] for log in logs] == ["history not opened"]
            assert keeper.describe().problem == logs[0]["reason"]
            (tmp_path / FILE_NAME).unlink()
            while not keeper.describe().path:
                await asyncio.sleep(0.01)
        assert keeper.describe().problem == ""
        keeper.take(sampled(0, {}, whole=True))
        await keeper.close()

    run(main())


def test_it_can_be_closed_at_any_time(tmp_path: Path) -> None:
    async def main() -> None:
        await Keeper(tmp_path, Keep(), "x").close()
        keeper = Keeper(tmp_path, Keep(), "x")
        keeper.start()
        await keeper.close()
        keeper.take(sampled(0, {}, whole=True))
        await (await opened(Keeper(tmp_path, Keep(), "x"))).close()

    run(main())


@pytest.mark.parametrize(
    ("text", "keep"),
    [("", Keep()), ("[usage.keep]\nminutes = '2d'\nhours = '61d'\ndays = '401d'\n", Keep(2 * 1440, 61 * 24, 401))],
)
def test_how_long_the_history_is_kept(text: str, keep: Keep) -> None:
    config = decode(f"{text}[[sites]]\norigins = ['localhost:1']\n", Path(), "t.toml")
    assert Keeper.configured(config, None, "x")._keep == keep


class Machines:
    """An exchange in which the test says what other machines have told."""

    def __init__(self) -> None:
        self.others: dict[str, Instance] = {}
        self.told: list[bytes] = []
        self.withdrawn: list[str] = []

    def start(self) -> None:
        pass

    def publish(self, age: float, sites: Mapping[str, Totals]) -> None:
        pass

    def tell(self, text: bytes) -> None:
        self.told.append(text)

    def withdraw(self, instance: str) -> None:
        self.withdrawn.append(instance)

    def list_others(self) -> Sequence[tuple[str, bytes]]:
        return [(name, b"") for name in self.others]

    def decode(self, instance: str, text: bytes) -> Instance | None:
        assert text == b""
        return self.others[instance]

    async def close(self, *, withdraw: bool) -> None:
        pass


def test_tunnels_that_are_gone_with_another_machine_are_reported(tmp_path: Path) -> None:
    """It has drained before, so what it had within two minutes counts; not what it had before them."""

    async def main() -> None:
        machines = Machines()
        lost: list[Mapping[str, int]] = []
        keeper = await opened(Keeper(tmp_path, Keep(), "x", machines, lost.append))

        async def sample(second: int, **tunnels: int) -> None:
            totals = {site: Totals(number) for site, number in tunnels.items()}
            machines.others = {"y": Instance("y", second, totals), "z": Instance("z", second, {"a": Totals(3)})}
            keeper.take(sampled(second, {}))
            await asyncio.wrap_future(keeper._thread.submit(lambda: None))

        await sample(0, a=900, b=1)
        await sample(61, a=50, b=7, idle=0)
        await sample(122, a=40)
        await sample(150, a=5)
        assert lost == []
        del machines.others["y"]
        keeper.take(sampled(151, {}))
        await keeper.close()
        await asyncio.sleep(0)
        assert lost == [{"a": 50, "b": 7}]
        keeper.tell(b"x")
        assert machines.told == [b"x"]

    run(main())


def test_the_tunnel_before_is_withdrawn_unless_it_is_this_one(tmp_path: Path) -> None:
    async def main() -> None:
        machines = Machines()
        for instance in ("a1", "a1", "b2"):
            keeper = Keeper(tmp_path, Keep(), instance, machines)
            keeper.start()
            assert keeper._task is not None
            await keeper._task
            await keeper.close()
        assert machines.withdrawn == ["a1"]
        assert stat.S_IMODE((tmp_path / INSTANCE_FILE).stat().st_mode) == 0o600

    run(main())


def test_a_second_tunnel_withdraws_nobody(tmp_path: Path) -> None:
    """It has not got the history's lock."""

    async def main() -> None:
        machines = Machines()
        first = await opened(Keeper(tmp_path, Keep(), "a1", machines))
        second = Keeper(tmp_path, Keep(), "b2", machines)
        second.start()
        await asyncio.sleep(0.1)
        await second.close()
        await first.close()
        assert machines.withdrawn == []
        assert (tmp_path / INSTANCE_FILE).read_text() == "a1\n"

    run(main())
