"""Where each site stood last, in a file of the state folder: for a restart, and for whoever looks in the meantime."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from tlstunnel.plans.values import Assessment

FILE_NAME = "assessments.json"
"""Without it, or if it is damaged, standings begin anew."""


class _Stored(msgspec.Struct, frozen=True):
    assessments: tuple[Assessment, ...] = ()


def read_assessments(folder: Path) -> tuple[tuple[Assessment, ...], float | None]:
    """Return the assessments, and when they were stored; nothing and None if there are none that can be read."""
    path = folder / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Stored).assessments, path.stat().st_mtime
    except (OSError, msgspec.DecodeError):
        return (), None


def store_assessments(folder: Path, assessments: Iterable[Assessment]) -> None:
    """Store the assessments in place of those before, or keep those if that is not possible.

    It is not waited for the disk: without them, a standing is left a little sooner, and nothing else.
    """
    path = folder / FILE_NAME
    new = path.with_name(path.name + ".new")
    with contextlib.suppress(OSError):
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(_Stored(tuple(assessments))))
        new.replace(path)
