"""scripts/bench builds its load, measures, reports and compares. The figures themselves are not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.load import budgets, gate, report
from scripts.load.running import BenchError
from tests.harness import REPOSITORY, child_environment, missing, require
from tlstunnel.testing.program import kill_left_behind, mark_environment

VERSIONS = gate.Versions("3.11.7", "OpenSSL 3.0", "valgrind-3.19.0", "HAProxy 2.6", "6.1", "a processor")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it with the tunnel of this Python, and check that it leaves no process behind."""
    mark, environment = mark_environment(child_environment(measured=True))
    environment["TLSTUNNEL_VENV"] = str(Path(sys.executable).parent.parent)
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench"), *arguments]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    finally:
        orphans = kill_left_behind(mark)
        assert not orphans, orphans


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run: its JSON file and its output."""
    for program, package in (("gcc", None), ("make", None), ("openssl", None), ("taskset", "util-linux")):
        require(program, package)
    if not Path("/usr/include/openssl/ssl.h").exists():
        missing("openssl/ssl.h not found: ./scripts/install gets libssl-dev")
    if not {0, 1} <= os.sched_getaffinity(0):
        missing("two cores are needed: one for the tunnel, one for the load")
    folder = tmp_path_factory.mktemp("bench")
    result = bench(
        *("--only", "echo,handshakes", "--rounds", "1", "--seconds", "0.3", "--no-plots", "--out", str(folder))
    )
    assert result.returncode == 0, result.stderr
    return folder / "bench.json", result.stdout


def number(content: dict[str, Any], figure: str, column: str) -> float:
    """Return the median of the tunnel."""
    value = content["figures"][figure]["columns"][column]["subjects"]["tlstunnel"]["median"]
    return float(value)


@pytest.mark.alone
def test_it_measures_the_tunnel(measured: tuple[Path, str]) -> None:
    path, printed = measured
    content = json.loads(path.read_text())
    assert content["failures"] == []
    for figure in ("echo-1-64", "echo-64-64", "echo-64-4096", "handshakes-full", "handshakes-resumed"):
        assert number(content, figure, "rate") > 10
        assert 0 < number(content, figure, "p50_us") <= number(content, figure, "p99_us")
        assert content["figures"][figure]["title"] in printed
    assert number(content, "echo-64-64", "cpu") > 1
    assert (number(content, "handshakes-full", "resumed"), number(content, "handshakes-resumed", "resumed")) == (0, 1)
    assert number(content, "handshakes-full", "errors") == 0
    assert content["machine"]["cores"] == os.cpu_count()
    assert "0.1." in content["subjects"]["tlstunnel"]["version"]


@pytest.mark.alone
def test_it_shows_a_run_again_as_markdown_and_in_a_document(measured: tuple[Path, str], tmp_path: Path) -> None:
    path, _ = measured
    shown = bench("--report", str(path))
    assert shown.returncode == 0, shown.stderr
    assert "| echo, 64 tunnels, 4 KiB messages |" in shown.stdout
    document = tmp_path / "document.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        assert bench("--report", str(path), "--into", str(document)).returncode == 0
        assert document.read_text() == f"before\n{report.BEGIN}\n\n{shown.stdout}\n{report.END}\nafter\n"


@pytest.mark.alone
def test_a_document_without_marks_is_left_alone(measured: tuple[Path, str], tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("nothing\n")
    with pytest.raises(BenchError, match=r"document\.md lacks"):
        report.write_into(document, report.load(measured[0]))
    assert document.read_text() == "nothing\n"


def test_a_missing_or_broken_run_is_an_error_of_one_line(tmp_path: Path) -> None:
    (broken := tmp_path / "broken.json").write_text("{")
    for path in (broken, tmp_path / "none.json"):
        result = bench("--report", str(path))
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert str(path) in result.stderr


def test_the_figures_in_the_document_are_those_of_the_committed_run() -> None:
    folder = REPOSITORY / "docs"
    text = (folder / "performance.md").read_text()
    shown = text.partition(report.BEGIN)[2].partition(report.END)[0].strip()
    assert shown == report.render_markdown(report.load(folder / "performance" / "bench.json"))


def test_the_committed_baseline_has_every_check_of_the_gate() -> None:
    baseline = report.load(REPOSITORY / "docs" / "performance" / "baseline.json")
    assert set(baseline["values"]) == {check.name for check in gate.CHECKS}
    assert set(baseline["versions"]) == set(VERSIONS.to_json())


def rounds(ours: list[float], peers: list[float] | None = None) -> gate.Rounds:
    """Return the results of a run for echo and instructions."""
    echo = {"tlstunnel": {"cpu": ours}} | ({"haproxy": {"cpu": peers}} if peers else {})
    return {"echo-64-64": echo, "instructions": {"tlstunnel": {"small": [70.0, 71.0, 70.0]}}}


def test_the_gate_compares_rounds_with_the_peer_and_instructions_as_they_are() -> None:
    # The second round was slow for both: it does not change the ratio.
    found = gate.compute_values(rounds([12.0, 36.0, 12.0], [10.0, 30.0, 10.0]))
    assert found == {"echo-64-64.cpu": pytest.approx(1.2), "instructions.small": 70.0}


def test_the_gate_reports_what_became_worse_and_by_how_much() -> None:
    baseline = {"versions": VERSIONS.to_json(), "values": {"echo-64-64.cpu": 1.0, "instructions.small": 70.0}}
    assert list(gate.explain({"echo-64-64.cpu": 1.05, "instructions.small": 70.5}, baseline, VERSIONS)) == []
    sentences = list(gate.explain({"echo-64-64.cpu": 1.5, "instructions.small": 77.0}, baseline, VERSIONS))
    assert len(sentences) == 2
    assert sentences[0].startswith("echo 64 B, 64 tunnels, CPU, beside haproxy, is 50% worse than the baseline")
    assert sentences[1].startswith("instructions, message of 64 B is 10% worse")
    lines = list(gate.render({"echo-64-64.cpu": 1.5, "instructions.small": 70.5}, baseline, VERSIONS))
    assert [line for line in lines if line.endswith("WORSE")] == [
        next(line for line in lines if "echo 64 B, 64" in line)
    ]


def test_the_gate_compares_no_instructions_of_another_python() -> None:
    versions = VERSIONS.to_json() | {"python": "3.13.1"}
    baseline = {"versions": versions, "values": {"echo-64-64.cpu": 1.0, "instructions.small": 10.0}}
    now = {"echo-64-64.cpu": 1.0, "instructions.small": 70.0}
    assert gate.find_worse(now, baseline, VERSIONS) == []
    assert "python 3.11.7, not 3.13.1" in "\n".join(gate.render(now, baseline, VERSIONS))


@pytest.mark.parametrize(
    ("kind", "ratio", "verdict"),
    [("beside", 1.1, "aim"), ("beside", 0.9, "must"), ("beside", 0.7, "missed"), ("behind", 1.1, "aim")],
)
def test_a_budget_names_the_limit_that_is_met(kind: Any, ratio: float, verdict: str) -> None:
    budget = budgets.Budget("a figure", "echo-64-64", "cpu", kind, must=0.8 if kind == "beside" else 1.2, aim=1.0)
    subjects = {"tlstunnel": {"median": 5.0, "ratio_to_best_peer": ratio}}
    content = {"figures": {"echo-64-64": {"columns": {"cpu": {"subjects": subjects}}}}}
    value = budget.find_measured(content, "tlstunnel")
    assert value is not None
    assert value == pytest.approx(ratio if kind == "beside" else 1 / ratio)
    assert verdict in budget.render_result(value)
    assert budget.find_measured({"figures": {}}, "tlstunnel") is None
