"""The documents: every relative link leads to a file that exists, and to a heading in it."""

import re
from pathlib import Path

import pytest

from tlstunnel.journal.events import fixed_reason

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "certs/*.md")
    for path in REPOSITORY.glob(pattern)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def _text(document: str) -> str:
    """Return a document without its blocks of code."""
    return FENCE.sub("", (REPOSITORY / document).read_text())


def _anchors(document: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _text(document), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(name)
    return found


def _broken_links(document: str) -> list[str]:
    broken = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", _text(document))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / document).parent.joinpath(path).resolve() if path else REPOSITORY / document
        if not target.exists() or (anchor and anchor not in _anchors(target.relative_to(REPOSITORY).as_posix())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    assert _broken_links(document) == []


def test_every_page_can_be_found() -> None:
    """The landing page, or a page that it links to, leads to each page."""
    seen, todo = set(), ["docs/README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        for link in LINK.findall(_text(page)):
            target = (REPOSITORY / page).parent.joinpath(link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_relative_to(REPOSITORY / "docs"):
                todo.append(target.relative_to(REPOSITORY).as_posix())
    assert {document for document in DOCUMENTS if document.startswith("docs/")} <= seen


@pytest.mark.parametrize(("page", "least"), [("troubleshooting", 50), ("handshake", 25), ("firewall", 8)])
def test_reasons_are_those_of_the_log(page: str, least: int) -> None:
    """Every reason in the tables of these pages is one that the log has."""
    reasons = []
    column = None
    for line in _text(f"docs/{page}.md").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "`reason` in the log" in cells:
            column = cells.index("`reason` in the log")
        elif cells and column is not None and not cells[0].startswith("--"):
            reasons += re.findall(r"`([^`]+)`", cells[column].partition(", with")[0])
        elif not cells:
            column = None
    assert len(reasons) > least
    assert [reason for reason in reasons if fixed_reason(reason) is None and fixed_reason(f"{reason}: x") is None] == []
