"""The number of cores that may be used."""

import os
from pathlib import Path

import pytest

from tlstunnel.processes.cores import count_usable

MANY = 64
CPU = "cpu,cpuacct"


@pytest.fixture(autouse=True)
def _many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)))


def _groups(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    return folder / "cgroup", folder / "own"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {}, MANY),
        ("0::/\n", {"cpu.max": "max 100000\n"}, MANY),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        # A quota of a parent group applies too; the smallest counts.
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "100000 100000\n"}, 1),
        # In a container its own group is visible as the root.
        ("0::/docker/0123\n", {"cpu.max": "400000 100000\n"}, 4),
        # Version 1.
        (
            "4:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            3,
        ),
        (f"4:{CPU}:/\n", {f"{CPU}/cpu.cfs_quota_us": "-1", f"{CPU}/cpu.cfs_period_us": "100000"}, MANY),
        ("5:memory:/a\n", {"memory/a/cpu.max": "100000 100000"}, MANY),
        ("nothing that is known", {}, MANY),
        ("0::/\n", {"cpu.max": "what is this"}, MANY),
    ],
)
def test_quotas(tmp_path: Path, own: str, files: dict[str, str], cores: int) -> None:
    root, file = _groups(tmp_path, own, files)
    assert count_usable(root, file) == cores


def test_without_control_groups(tmp_path: Path) -> None:
    assert count_usable(tmp_path, tmp_path / "none") == MANY
