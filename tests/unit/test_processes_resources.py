"""What is said before descriptors or memory run out, and when it is not repeated."""

from pathlib import Path

import pytest

from tlstunnel.processes import resources as module
from tlstunnel.processes.resources import COMPARED, NOTED_EVERY, Growth, Resource, Resources, measure_memory

THRESHOLDS: dict[Resource, float] = {"descriptors": 0.8, "memory": 0.85}


def test_a_process_that_runs_out_of_descriptors_and_the_site_that_grew() -> None:
    resources = Resources()
    assert resources.measure(THRESHOLDS, {1: 0.2, 2: 0.3}, 0.1, {"a": 50, "b": 60}) == ([], [])
    (new,), over = resources.measure(THRESHOLDS, {1: 0.2, 2: 0.8}, 0.1, {"a": 150, "b": 61})
    assert over == []
    assert (new.resource, new.process, new.share, new.growth) == ("descriptors", 2, 0.8, Growth("a", 150, 100))
    assert str(new) == (
        "process 2 uses 80% of the connections that its descriptors allow; a has 150 tunnels, 100 more than before"
    )
    assert new.describe() == {
        "resource": "descriptors",
        "percent": 80,
        "process": 2,
        "site": "a",
        "tunnels": 150,
        "grown": 100,
    }
    assert resources.shares == {"descriptors": 0.8, "memory": 0.1}


def test_a_share_at_the_threshold_is_reported_once() -> None:
    resources = Resources()
    shares = [0.84, 0.85, 0.84, 0.86, 0.76, 0.74, 0.76, 0.85]
    found = [resources.measure(THRESHOLDS, {}, share, {}) for share in shares]
    assert [len(new) for new, _ in found] == [0, 1, 0, 0, 0, 0, 0, 1]
    assert [over for _, over in found] == [[], [], [], [], [], ["memory"], [], []]
    assert str(resources.shortages["memory"]) == "85% of the memory is used"
    assert resources.shortages["memory"].describe() == {"resource": "memory", "percent": 85}


def test_a_shortage_that_lasts_has_the_last_figures() -> None:
    resources = Resources()
    resources.measure(THRESHOLDS, {}, 0.9, {"a": 5})
    resources.measure(THRESHOLDS, {}, 0.95, {"a": 5})
    assert str(resources.shortages["memory"]) == "95% of the memory is used; a has 5 tunnels"


def test_growth_is_that_of_some_time() -> None:
    """Not only since the last measurement, and not since ever."""
    resources = Resources()
    span = COMPARED * NOTED_EVERY
    for number in range(3 * span + 1):
        resources.measure(THRESHOLDS, {}, 0.9, {"slow": 1000 + number, "large": 50_000})
    assert resources.shortages["memory"].growth == Growth(
        "slow", 1000 + 3 * COMPARED * NOTED_EVERY, COMPARED * NOTED_EVERY
    )


@pytest.mark.parametrize(
    ("limit", "current", "share"), [("1000", "900", 0.6), ("max", "900", 0.25), ("0", "900", 0.25), ("x", "900", 0.25)]
)
def test_memory_is_that_of_the_machine_or_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, current: str, share: float
) -> None:
    monkeypatch.setattr(module, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(module, "_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(module, "_GROUPS", tmp_path)
    assert measure_memory() == 0.0
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  750 kB\n")
    (tmp_path / "cgroup").write_text("0::/system.slice\n")
    assert measure_memory() == 0.25
    group = tmp_path / "system.slice"
    group.mkdir()
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert measure_memory() == share


def test_the_memory_of_this_machine() -> None:
    assert 0.0 < measure_memory() < 1.0
