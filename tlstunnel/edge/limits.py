"""What an edge worker says about the tunnel itself: when it ends, and the tags by which it can be found. No I/O.

Tested by tests/unit/test_edge_limits.py.
"""

import math
import re
from collections.abc import Mapping
from datetime import datetime

from tlstunnel.addresses import quoted
from tlstunnel.escaping import printable, shorten

MOST_TAGS = 8
"""Tags of a tunnel. They are kept as long as it is open, and are in its record."""

LONGEST_VALUE = 255
"""Characters of the value of a tag: as many as the subject of a token has (OpenID Connect Core section 2)."""

MOST_BYTES = 512
"""Bytes of all tags of a tunnel in UTF-8: a line of the log must fit into a pipe's buffer at once."""

LATEST = 253_402_300_800
"""Unix time of the year 10 000, which is after every `datetime`. A later one is in milliseconds by mistake."""

MOST_LOGGED = 8
"""Fields that a worker adds to the record."""

LONGEST_LOGGED = 128
"""Characters of the text of such a field."""

LogValue = str | int | float | bool

LogFields = tuple[tuple[str, LogValue], ...]
"""What a worker adds to the record: names and values."""

_LARGEST = 1 << 63

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,31}")


def parse_until(until: object) -> float:
    """Return a time as Unix time. `until` is that, or an aware datetime. Raises ValueError."""
    if isinstance(until, datetime):
        if until.utcoffset() is None:
            raise ValueError("until must be a datetime with a time zone, such as datetime.now(UTC) + timedelta(1)")
        return max(until.timestamp(), 0.0)
    if isinstance(until, bool) or not isinstance(until, int | float):
        raise ValueError(f"until must be a datetime or a Unix time in seconds, not {_describe(until)}")
    if not -LATEST < until < LATEST:  # also NaN, and an integer that no float can be
        raise ValueError("until must be a Unix time in seconds; this is too late, and may be in milliseconds")
    return max(float(until), 0.0)


def parse_tags(tags: object) -> dict[str, str]:
    """Return a copy of the tags of a worker. Raises ValueError, which does not quote their values."""
    if not isinstance(tags, Mapping):
        raise ValueError(f'tags must be a mapping such as {{"user": "42"}}, not {_describe(tags)}')
    return dict(_parse_tag(name, value) for name, value in tags.items())


def join_tags(before: tuple[str, ...], tags: Mapping[str, str]) -> tuple[str, ...]:
    """Return tags as "name=value", sorted by name, those in `tags` instead of those before. Raises ValueError."""
    joined = dict(tag.split("=", 1) for tag in before) | dict(tags)
    if len(joined) > MOST_TAGS:
        raise ValueError(f"a tunnel can have {MOST_TAGS} tags, and not {len(joined)}")
    tags_after = tuple(f"{name}={value}" for name, value in sorted(joined.items()))
    size = sum(len(tag.encode()) for tag in tags_after)
    if size > MOST_BYTES:
        raise ValueError(f"the tags of a tunnel can have {MOST_BYTES} bytes in all, and not {size}")
    return tags_after


def parse_log(log: object) -> dict[str, LogValue]:
    """Return a copy of what a worker adds to the record. Raises ValueError, which does not quote its values.

    A client may have sent what is in a text, so it is escaped and cut; nothing that it sends makes the request fail.
    """
    if not isinstance(log, Mapping):
        raise ValueError(f'log must be a mapping such as {{"room": "7"}}, not {_describe(log)}')
    return dict(_parse_logged(name, value) for name, value in log.items())


def join_log(before: LogFields, log: Mapping[str, LogValue]) -> LogFields:
    """Return what is added to the record, that in `log` instead of what was before. Raises ValueError."""
    joined = dict(before) | dict(log)
    if len(joined) > MOST_LOGGED:
        raise ValueError(f"a worker can add {MOST_LOGGED} fields to the log, and not {len(joined)}")
    return tuple(joined.items())


def _parse_logged(name: object, value: object) -> tuple[str, LogValue]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = quoted(name) if isinstance(name, str) else _describe(name)
        raise ValueError(f"the name of a log field is 1 to 32 letters, digits, _, . or -, a letter first, not {shown}")
    name = str.__str__(name)
    if isinstance(value, str):
        return name, shorten(printable(str.__str__(value)[: LONGEST_LOGGED + 1]), LONGEST_LOGGED)
    if isinstance(value, bool):
        return name, value
    if isinstance(value, int) and -_LARGEST <= value < _LARGEST:
        return name, int(value)
    if isinstance(value, float):
        number = float(value)
        return name, number if math.isfinite(number) else str(number)  # JSON has no NaN
    raise ValueError(f"the log field {name} must be text, a number of 64 bits or a boolean, not {_describe(value)}")


def _parse_tag(name: object, value: object) -> tuple[str, str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = quoted(name) if isinstance(name, str) else _describe(name)
        raise ValueError(f"the name of a tag is 1 to 32 letters, digits, _, . or -, a letter first, not {shown}")
    if not isinstance(value, str):
        raise ValueError(f"the tag {name} must be text, as str(...) makes it, not {_describe(value)}")
    # Exactly a string, not an object of a class of the worker.
    name, value = str.__str__(name), str.__str__(value)
    if not 0 < len(value) <= LONGEST_VALUE:
        raise ValueError(f"the tag {name} must have 1 to {LONGEST_VALUE} characters, and not {len(value)}")
    if not value.isprintable():
        raise ValueError(f"the tag {name} contains a character that cannot be printed")
    return name, value


def _describe(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
