"""Where sites stood last: stored whole or not at all, and not missed if it cannot be read."""

import stat
from pathlib import Path

import pytest

from tlstunnel.plans.assessments import FILE_NAME, read_assessments, store_assessments
from tlstunnel.plans.values import Assessment, Figures, Standing

ASSESSMENT = Assessment(
    site="a.example",
    plan="pro",
    standing=Standing.REPEATED,
    holds=(Standing.SPIKE, Standing.REPEATED),
    since=1.5,
    figures=Figures(guideline=10, now=3, share=0.5, resource="cpu"),
    sentence="So it is.",
)


def test_what_is_stored_is_read(tmp_path: Path) -> None:
    assert read_assessments(tmp_path) == ((), None)
    for assessments in ((ASSESSMENT,), ()):
        store_assessments(tmp_path, assessments)
        path = tmp_path / FILE_NAME
        assert read_assessments(tmp_path) == (assessments, path.stat().st_mtime)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"assessments": [{"site": 1}]}', '{"assessments": "\xff"}'])
def test_what_is_damaged_is_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content, encoding="latin-1")
    assert read_assessments(tmp_path) == ((), None)


def test_where_nothing_can_be_stored_the_last_ones_stay(tmp_path: Path) -> None:
    store_assessments(tmp_path, [ASSESSMENT])
    (tmp_path / f"{FILE_NAME}.new").mkdir()
    store_assessments(tmp_path, [])
    assert read_assessments(tmp_path)[0] == (ASSESSMENT,)
    store_assessments(tmp_path / "absent", [ASSESSMENT])
