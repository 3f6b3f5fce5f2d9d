"""The metrics as text for Prometheus: its text format 0.0.4, and OpenMetrics 1.0.

Sources: https://prometheus.io/docs/instrumenting/exposition_formats/ and https://prometheus.io/docs/specs/om/open_metrics_spec/.

Tested by tests/unit/test_exposition.py, where promtool and the parsers of prometheus-client read it.
"""

from collections.abc import Iterator, Mapping, Sequence

from tlstunnel.metrics.families import FAMILIES, MICROSECONDS, SUM, Family
from tlstunnel.metrics.snapshot import Labels, Snapshot

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_UNITS = ("seconds", "bytes")
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})
_HELP_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})


def render(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """Return the metrics as a client wants them that sent the field `Accept`, "" if it did not; and their media type.

    They are those of all sites in `snapshot`: `tlstunnel.metrics.shown_sites` reduces it before.
    """
    is_open = prefers_open_metrics(accept)
    lines = [line for family in FAMILIES.values() for line in _render_family(family, snapshot, is_open=is_open)]
    if is_open:
        lines.append("# EOF")
    lines.append("")
    return "\n".join(lines).encode("utf-8", "replace"), OPEN_METRICS if is_open else TEXT


def prefers_open_metrics(accept: str) -> bool:
    """Return whether a client that sent this field `Accept` prefers OpenMetrics 1.0 to the text format.

    Without a preference, it gets the text format (RFC 9110 section 12.5.1; it is never refused).
    """
    best = {"open": 0.0, "text": 0.0}
    for item in accept.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        found = dict(part.split("=", 1) for part in parameters if "=" in part)
        if name == "application/openmetrics-text" and found.get("version", "1.0.0").strip('"') == "1.0.0":
            kind = "open"
        elif name in {"text/plain", "text/*", "*/*"}:
            kind = "text"
        else:
            continue
        best[kind] = max(best[kind], _parse_quality(found.get("q", "1")))
    return best["open"] > best["text"]


def _parse_quality(text: str) -> float:
    try:
        return min(max(float(text), 0.0), 1.0)
    except ValueError:
        return 0.0


def _render_family(family: Family, snapshot: Snapshot, *, is_open: bool) -> Iterator[str]:
    series = snapshot[family]
    if not series and family.labels:
        return
    name = family.name.removesuffix("_total") if is_open else family.name
    yield f"# HELP {name} {family.help.translate(_ESCAPES if is_open else _HELP_ESCAPES)}"
    yield f"# TYPE {name} {family.kind}"
    if is_open and name.endswith(_UNITS):
        yield f"# UNIT {name} {name.rpartition('_')[2]}"
    if family.kind == "histogram":
        yield from _render_histogram(family, series)
    elif series:
        for labels, value in sorted(series.items()):
            yield f"{family.name}{_render_labels(family.labels, labels)} {_render_value(value, family.divisor)}"
    elif family.kind == "counter":
        yield f"{family.name} 0"


def _render_histogram(family: Family, series: Mapping[Labels, int]) -> Iterator[str]:
    rows: dict[Labels, dict[str, int]] = {} if family.labels else {(): {}}
    for (*labels, bucket), value in series.items():
        rows.setdefault(tuple(labels), {})[bucket] = value
    for values, buckets in sorted(rows.items()):
        total = 0
        for bucket in family.buckets:
            total += buckets.get(bucket, 0)
            yield f"{family.name}_bucket{_render_labels(family.series_labels, (*values, bucket))} {total}"
        written = _render_labels(family.labels, values)
        yield f"{family.name}_sum{written} {_render_value(buckets.get(SUM, 0), MICROSECONDS)}"
        yield f"{family.name}_count{written} {total}"


def _render_labels(names: Sequence[str], values: Labels) -> str:
    if not names:
        return ""
    pairs = (f'{name}="{value.translate(_ESCAPES)}"' for name, value in zip(names, values, strict=True))
    return f"{{{','.join(pairs)}}}"


def _render_value(value: int, divisor: int) -> str:
    return str(value) if divisor == 1 else repr(value / divisor)
