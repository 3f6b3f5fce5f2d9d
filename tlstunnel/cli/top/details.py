"""What ``tlstunnel top`` shows of one refused connection, tunnel or origin.

Tested by tests/unit/test_cli_top.py.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.text import Text

from tlstunnel.cli.tables import render_duration, render_size
from tlstunnel.commands.records import Decision, Refusal
from tlstunnel.escaping import printable

_STYLES: Mapping[Decision, str] = {
    "passed": "green",
    "not configured": "dim",
    "logged": "yellow",
    "refused": "bold red",
    "ended": "yellow",
    "not reached": "dim",
}


def describe_refusal(refusal: Refusal) -> Text:
    """Return why a connection was refused, how to change that, and what every stage decided."""
    text = Text()
    for name in ("id", "client", "site", "path", "status", "reason", "detail"):
        if value := refusal.record.get(name):
            text.append(f"{name:8} ", "dim").append(f"{printable(str(value))}\n")
    text.append(f"{'time':8} ", "dim").append(f"{_render_time(refusal.at)}\n\n")
    if refusal.advice:
        text.append(f"{refusal.advice}\n", "bold")
    if refusal.document:
        text.append(f"see {refusal.document}\n", "dim")
    text.append("\n")
    for stage in refusal.stages:
        text.append(f"{stage.decision:15}", _STYLES[stage.decision]).append(stage.stage)
        text.append(f"  {printable(stage.detail)}\n" if stage.detail else "\n", "dim")
    return text


def describe_item(item: object) -> Text:
    """Return the fields of a tunnel or an origin."""
    text = Text()
    for name, value in _list_fields(item):
        text.append(f"{name:15} ", "dim").append(f"{printable(value)}\n")
    return text


def _list_fields(item: Any) -> Iterator[tuple[str, str]]:
    for name in item.__struct_fields__:
        value = getattr(item, name)
        match name, value:
            case _, "" | None | [] | {} | ():
                continue
            case "up" | "down", int():
                yield name, render_size(value)
            case "rate", float():
                yield name, f"{render_size(value)}/s"
            case "seconds", float():
                yield "age", render_duration(value)
            case "opened" | "until" | "problem_at", float():
                yield name, _render_time(value)
            case _, dict():
                yield name, " ".join(f"{key}={one}" for key, one in value.items())
            case _, list():
                yield name, ", ".join(map(str, value))
            case _:
                yield name, str(value)


def _render_time(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"
