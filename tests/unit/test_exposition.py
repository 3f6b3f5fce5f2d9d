"""The metrics as text, read by promtool and by the parsers of prometheus-client."""

import subprocess
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.harness import require
from tlstunnel.admin.exposition import OPEN_METRICS, TEXT, prefers_open_metrics, render
from tlstunnel.metrics.families import (
    CONNECTIONS,
    CONNECTIONS_ACCEPTED,
    FAMILIES,
    HANDSHAKE_SECONDS,
    HANDSHAKE_STAGE_SECONDS,
    OPEN_CONNECTIONS,
    RULES,
    SITE_CPU_SECONDS,
)
from tlstunnel.metrics.registry import Registry
from tlstunnel.metrics.snapshot import Snapshot
from tlstunnel.metrics.usage import FIELDS

Parse = Callable[[str], Iterable[Any]]
OPEN = "application/openmetrics-text"
FORMATS: list[tuple[str, Parse]] = [("text/plain", parse_text), (OPEN, parse_open_metrics)]

USAGE = [3, *range(10, 10 + len(FIELDS))]
"""What a site has used: every field has another value."""


def full() -> Snapshot:
    """Return a snapshot with a value in every family."""
    registry = Registry()
    values: dict[str, dict[tuple[str, ...], int]] = {}
    for family in FAMILIES.values():
        labels = tuple(f"{label} of it" for label in family.labels)
        if family.kind == "histogram":
            for seconds in (0.0, 0.003, 70.0):
                registry.histogram(family, *labels).observe(seconds)
        else:
            values[family.name] = {labels: 12}
    return Snapshot({**Snapshot.of(values).families, **registry.snapshot().families}, {"chat.example.com": USAGE})


def read(snapshot: Snapshot, accept: str, parse: Parse) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Return all values by the name of the sample and its labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in parse(render(snapshot, accept)[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.items())] = sample.value
    return found


@pytest.mark.parametrize(("accept", "parse"), FORMATS, ids=["text", "OpenMetrics"])
def test_every_family_can_be_read(accept: str, parse: Parse) -> None:
    found = read(full(), accept, parse)
    for family in FAMILIES.values():
        suffixes = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        assert all(family.name + suffix in found for suffix in suffixes), family.name
    site = (("site", "chat.example.com"),)
    assert found["tlstunnel_tunnels"][site] == 3
    assert found["tlstunnel_handshakes_total"][*site, ("outcome", "opened")] == 10
    assert found["tlstunnel_bytes_total"][*site, ("direction", "down")] == 20
    assert found["tlstunnel_site_cpu_seconds_total"][site] == 21e-6
    stage = (("stage", "stage of it"),)
    name = HANDSHAKE_STAGE_SECONDS.name
    assert found[f"{name}_bucket"][*stage, ("le", "0.0025")] == 1
    assert found[f"{name}_bucket"][*stage, ("le", "0.005")] == 2
    assert found[f"{name}_bucket"][*stage, ("le", "+Inf")] == found[f"{name}_count"][stage] == 3
    assert found[f"{name}_sum"][stage] == pytest.approx(70.003)


@pytest.mark.parametrize(("accept", "parse"), FORMATS, ids=["text", "OpenMetrics"])
def test_what_has_no_labels_is_there_from_the_beginning(accept: str, parse: Parse) -> None:
    found = read(Snapshot(), accept, parse)
    assert found[CONNECTIONS_ACCEPTED.name] == {(): 0}
    assert found[f"{HANDSHAKE_SECONDS.name}_count"] == {(): 0}
    assert CONNECTIONS.name not in found
    assert OPEN_CONNECTIONS.name not in found


def test_help_kind_and_unit_are_those_of_the_table() -> None:
    _, (_, parse) = FORMATS
    families = {family.name: family for family in parse(render(full(), OPEN)[0].decode())}
    for family in FAMILIES.values():
        found = families[family.name.removesuffix("_total")]
        assert (found.documentation, found.type) == (family.help, family.kind)
        assert found.unit == ("seconds" if "_seconds" in family.name else "bytes" if "_bytes" in family.name else "")


def test_promtool_finds_nothing_to_complain_about() -> None:
    text, media_type = render(full(), "")
    assert media_type == TEXT
    program = require("promtool", "prometheus")
    checked = subprocess.run([program, "check", "metrics"], input=text, capture_output=True, check=False, timeout=30)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_promtool_would_complain() -> None:
    program = require("promtool", "prometheus")
    text = b"# TYPE tlstunnel_x counter\ntlstunnel_x 1\n"
    assert subprocess.run([program, "check", "metrics"], input=text, capture_output=True, check=False).returncode


@given(st.text(st.characters(exclude_categories=["Cs"])), st.sampled_from(FORMATS))
def test_any_value_of_a_label_comes_back(value: str, chosen: tuple[str, Parse]) -> None:
    snapshot = Snapshot.of({RULES.name: {("", value, "matched"): 7}})
    accept, parse = chosen
    found = read(snapshot, accept, _keep_carriage_returns(parse))
    assert found[RULES.name] == {(("site", ""), ("rule", value), ("outcome", "matched")): 7}


def _keep_carriage_returns(parse: Parse) -> Parse:
    """Both formats end lines with LF only, but a parser may read CR as the end of one too (universal newlines)."""

    def restored(text: str) -> Iterable[Any]:
        for family in parse(text.replace("\r", "\ue00d")):
            for sample in family.samples:
                sample.labels.update({name: text.replace("\ue00d", "\r") for name, text in sample.labels.items()})
            yield family

    return restored


def test_a_lone_surrogate_does_not_make_all_metrics_unreadable() -> None:
    text, _ = render(Snapshot.of({RULES.name: {("", "\udc80", "matched"): 7}}), "")
    assert b'rule="?"' in text


@given(st.lists(st.floats(0, 100), max_size=20))
def test_buckets_add_up(observed: list[float]) -> None:
    registry = Registry()
    histogram = registry.histogram(HANDSHAKE_SECONDS)
    for seconds in observed:
        histogram.observe(seconds)
    found = read(registry.snapshot(), OPEN, parse_open_metrics)
    buckets = found[f"{HANDSHAKE_SECONDS.name}_bucket"]
    for ((_, bound),), count in buckets.items():
        assert count == sum(seconds <= float(bound) for seconds in observed)
    assert found[f"{HANDSHAKE_SECONDS.name}_count"][()] == len(observed)
    assert found[f"{HANDSHAKE_SECONDS.name}_sum"][()] == pytest.approx(sum(observed), abs=1e-5)


def test_values_are_shown_in_seconds() -> None:
    snapshot = Snapshot.of({SITE_CPU_SECONDS.name: {("a.example",): 1_500_000}})
    assert b'tlstunnel_site_cpu_seconds_total{site="a.example"} 1.5\n' in render(snapshot, "")[0]


PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;q=0.8,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "is_open"),
    [
        ("", False),
        ("*/*", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        ("text/plain;version=0.0.4", False),
        (OPEN, True),
        ("Application/OpenMetrics-Text; Version=1.0.0; charset=utf-8", True),
        (PROMETHEUS, True),
        ("application/openmetrics-text;version=0.0.1", False),
        ('application/openmetrics-text; version="1.0.0"; q=0.2, text/plain; q=0.1', True),
        ("application/openmetrics-text;q=0.2, text/plain;q=0.3", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x", False),
        ("application/openmetrics-text;q", True),
        (",;,;=;,q=1", False),
    ],
)
def test_open_metrics_are_sent_to_those_who_prefer_them(accept: str, is_open: bool) -> None:
    assert prefers_open_metrics(accept) == is_open
    text, media_type = render(Snapshot(), accept)
    assert media_type == (OPEN_METRICS if is_open else TEXT)
    assert text.endswith(b"\n# EOF\n") == is_open
