"""The lines on which keys and items of a TOML document begin."""

import json
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_config import documents, toml
from tlstunnel.config.document import KeyPath, find_lines, render_path

TEXT = '''\
# a comment with = and [brackets] and "quotes
title = "a # b = [c]"   # another
a.b."c.d".'e"f' = 1979-05-27 07:32:00
numbers = [ 1, 2.5,  # one
  -3e2,
  0x1f ,]
long = """
[not.a.table]
x = 1 \\""" still ""\"""
raw = \'\'\'
[[nor.this]]
\\\'\'\'\'\'
after = { x = 1, "y z" = [ { w = true },
  { w = false } ] }
[table]
one = 1
[table.inner]
two = 2
[[list]]
three = 3
[list.sub]
four = 4
[[list]]
[[list.deep]]
five = 5
[[list.deep]]
six = 6
["quoted [] key"]
seven = 7
[x.y.z]
'''


def paths(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in items:
        yield from paths(inner, (*path, step))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ((), 1),
        (("title",), 2),
        (("a",), 3),
        (("a", "b", "c.d", 'e"f'), 3),
        (("numbers",), 4),
        (("numbers", 1), 4),
        (("numbers", 2), 5),
        (("numbers", 3), 6),
        (("long",), 7),
        (("raw",), 10),
        (("after", "x"), 13),
        (("after", "y z", 0, "w"), 13),
        (("after", "y z", 1), 14),
        (("after", "y z", 1, "w"), 14),
        (("table",), 15),
        (("table", "one"), 16),
        (("table", "inner", "two"), 18),
        (("list",), 19),
        (("list", 0), 19),
        (("list", 0, "sub"), 21),
        (("list", 0, "sub", "four"), 22),
        (("list", 1), 23),
        (("list", 1, "deep", 0, "five"), 25),
        (("list", 1, "deep", 1), 26),
        (("list", 1, "deep", 1, "six"), 27),
        (("quoted [] key", "seven"), 29),
        (("x", "y"), 30),
        # A missing key is reported at the innermost table that exists.
        (("x", "y", "z", "missing", 3), 30),
        (("list", 1, "deep", 1, "missing"), 26),
        (("missing",), 1),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines(path: KeyPath, line: int, end: str) -> None:
    text = TEXT.replace("\n", end)
    tomllib.loads(text)
    assert find_lines(text, [path]) == [line]


def test_every_value_of_the_text_is_found() -> None:
    """Otherwise it would be reported at the line of the table around it, or at the first."""
    every = list(paths(tomllib.loads(TEXT)))
    found = dict(zip(every, find_lines(TEXT, every), strict=True))
    assert min(line for path, line in found.items() if path) == 2


@given(document=documents)
def test_every_value_is_found_where_it_is_written(document: dict[str, Any]) -> None:
    """Each key has a line of its own, so the lines of keys at the top count up."""
    pairs = [f"{json.dumps(key, ensure_ascii=False)} = {toml(value)}" for key, value in document.items()]
    text = "\n".join(pairs)
    try:
        tomllib.loads(text)
    except ValueError:  # such as a control character, which TOML does not allow
        return
    starts = [1 + sum(pair.count("\n") + 1 for pair in pairs[:index]) for index in range(len(pairs))]
    assert find_lines(text, [(key,) for key in document]) == starts
    for key, start, pair in zip(document, starts, pairs, strict=True):
        inside = list(paths(tomllib.loads(text)[key], (key,)))
        assert all(start <= line <= start + pair.count("\n") for line in find_lines(text, inside))


@given(text=st.text(alphabet="[]{}=\"'.#\n,\\ a1", max_size=40))
def test_every_valid_text_is_read(text: str) -> None:
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError):
        return
    every = list(paths(document))
    lines = find_lines(text, every)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("sites", 0, "names", 1), "sites[0].names[1]"),
        (("lists", "\r\n\x1b[2J"), 'lists."\\r\\n\\x1b[2J"'),
        (("lists", ""), 'lists.""'),
        (("lists", "a b"), 'lists."a b"'),
    ],
)
def test_a_path_is_shown_on_one_line(path: KeyPath, text: str) -> None:
    assert render_path(path) == text
