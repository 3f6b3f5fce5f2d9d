"""The log's words: each is one text, written as a string wherever it goes."""

import ast
import logging
import re
from pathlib import Path

import msgspec
import pytest
import structlog

from tlstunnel.journal.events import VARIABLE, EndedBy, Event, Reason, WorkerOutcome, fixed_reason

DOCUMENT = (Path(__file__).parents[2] / "docs" / "log.md").read_text()
PLACEHOLDER = re.compile(r": [A-Z]+$")
"""The varying part, which the document writes in capitals."""


def columns(title: str) -> set[str]:
    """Return the texts in the columns of this title (its first word), in all tables of the document."""
    found: set[str] = set()
    column: int | None = None
    for line in DOCUMENT.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            column = None
        elif column is None:
            titles = [cell.replace("`", "").split()[0] for cell in cells]
            column = titles.index(title) if title in titles else -1
        elif column >= 0:
            found |= {PLACEHOLDER.sub("", text) for text in re.findall(r"`([^`]+)`", cells[column])}
    return found


@pytest.mark.parametrize(("title", "words"), [("event", Event), ("reason", Reason), ("ended_by", EndedBy)])
def test_the_document_has_these_words_and_no_others(title: str, words: type[Event] | type[Reason]) -> None:
    assert columns(title) - {"logger"} == {str(word) for word in words}


SOURCES = sorted((Path(__file__).parents[2] / "tlstunnel").rglob("*.py"))
LEVELS = {"info", "warning", "error", "exception"}


@pytest.mark.parametrize("words", [Event, Reason])
def test_each_word_is_used(words: type[Event] | type[Reason]) -> None:
    package = "".join(source.read_text() for source in SOURCES)
    used = set(re.findall(rf"\b{words.__name__}\.([A-Z0-9_]+)\b", package))
    assert set(words.__members__) == used


def test_no_event_is_written_out_in_the_code() -> None:
    """Only the table has texts, so that the document has all of them."""
    found = [
        f"{source}:{call.lineno}"
        for source in SOURCES
        for call in ast.walk(ast.parse(source.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in LEVELS
        and call.args
        and isinstance(call.args[0], ast.Constant | ast.JoinedStr)
    ]
    assert found == []


@pytest.mark.parametrize("reason", sorted(VARIABLE))
def test_the_document_says_which_reasons_vary(reason: Reason) -> None:
    assert re.search(rf"`{reason}: [A-Z]+`", DOCUMENT)


@pytest.mark.parametrize("words", [Event, Reason, EndedBy, WorkerOutcome])
def test_no_text_is_used_twice(words: type[Event] | type[Reason]) -> None:
    assert len(words.__members__) == len(set(words.__members__.values()))


def test_a_word_is_written_as_its_text_in_both_formats() -> None:
    assert msgspec.json.encode({"reason": Reason.MAX_AGE}) == b'{"reason":"max age"}'
    render = structlog.dev.ConsoleRenderer(colors=False, repr_native_str=True)
    assert "reason='max age'" in render(None, "info", {"event": Event.CONNECTION, "reason": Reason.MAX_AGE})
    assert logging.Formatter().format(logging.makeLogRecord({"msg": Event.READY})) == "ready"


def test_a_word_is_found_by_its_text() -> None:
    texts: dict[str, int] = {"max age": 1}
    reasons: dict[str, int] = {Reason.MAX_AGE: 1}
    assert texts[Reason.MAX_AGE] == reasons["max age"] == 1


@pytest.mark.parametrize(
    ("reason", "fixed"),
    [
        ("closed", Reason.CLOSED),
        (Reason.TLS_TIMED_OUT, Reason.TLS_TIMED_OUT),
        ("managed rules: guard", Reason.MANAGED_RULES_GUARD),
        ("TLS error: SSLV3_ALERT_BAD_CERTIFICATE", Reason.TLS_ERROR),
        ("rule: admin: only from inside", Reason.RULE),
        ("tls: socket error: No route to host", Reason.TLS_SOCKET_ERROR),
        ("closed: again", None),
        ("whatever", None),
        ("", None),
    ],
)
def test_a_reason_has_a_fixed_part(reason: str, fixed: Reason | None) -> None:
    assert fixed_reason(reason) is fixed


def test_no_fixed_part_is_ambiguous() -> None:
    for variable in VARIABLE:
        assert not any(reason.startswith(f"{variable}: ") for reason in Reason)


def test_no_field_has_a_name_that_the_text_format_treats_in_its_own_way() -> None:
    """structlog's renderer takes a `stack` for a text of several lines, and fails if it is something else."""
    found = [
        f"{source}:{call.lineno}: {keyword.arg}"
        for source in SOURCES
        for call in ast.walk(ast.parse(source.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in LEVELS
        for keyword in call.keywords
        if keyword.arg == "stack"
    ]
    assert found == []
