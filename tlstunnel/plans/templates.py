"""The texts of notices: templates of the package, which an operator's folder can replace one by one.

A template is a text file. Its first line is the subject, the second is empty, the rest is the body. `${name}` stands
for a value, `$$` for a dollar sign, and there is nothing else: a value is never evaluated, and it is one printable line
whatever a configuration or a client has put into it. All templates are checked when they are loaded, so that none
fails when there is a notice to send.
"""

import difflib
import re
import string
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from tlstunnel.addresses import quoted
from tlstunnel.errors import ConfigurationError
from tlstunnel.escaping import printable, shorten
from tlstunnel.plans.notices import NOTIFIED
from tlstunnel.plans.plot import Labels
from tlstunnel.plans.values import Figures, Notice, Standing

FOLDER = Path(__file__).with_name("templates")
WORDS = "words.toml"
DEFAULT_LANGUAGE = "en"

MAX_TEMPLATE_BYTES = 65_536
MAX_SUBJECT = 200
"""Characters of a rendered subject. A line of a mail has 998 octets at most (RFC 5322 section 2.1.1)."""
MAX_VALUE = 300
"""Characters of a value."""

NO_BREAK_SPACES = "\u00a0\u202f"
"""They are not printable for Python, but good typography: before a percent sign in German, a colon in French."""

TYPOGRAPHIC = frozenset(f"\n{NO_BREAK_SPACES}")
"""What a text can contain that is not printable."""

_BASIC = frozenset({"id", "site", "plan", "next_plan", "sentence", "since", "created", "reply_to"})
PLACEHOLDERS = _BASIC | frozenset(Figures.__struct_fields__) | {"suggestion"}
"""What a template can contain."""


class Text(msgspec.Struct, frozen=True):
    """The text of a notice. The subject is one line; the lines of the body end with LF."""

    subject: str
    body: str


class Words(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What numbers look like in a language, and the words for values: the file `WORDS`."""

    thousands: str
    decimal: str
    percent: str
    none: str
    unknown: str
    operator: str
    suggest_plan: str
    suggest_own: str
    no_contact: str
    resources: dict[str, str]
    scarcities: dict[str, str]
    floods: dict[str, str]
    plot: Labels = Labels()


class _Template(string.Template):
    idpattern = "[A-Za-z_][A-Za-z0-9_]*"
    flags = 0  # type: ignore[assignment]


class Texts:
    """All texts, by language."""

    def __init__(self, languages: Mapping[str, tuple[Words, Mapping[str, str]]]) -> None:
        """Use `load_texts`."""
        self._languages = languages

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages there are."""
        return tuple(sorted(self._languages))

    def check_language(self, language: str) -> None:
        """Raise ConfigurationError if there are no texts in this language."""
        if language not in self._languages:
            raise ConfigurationError(f"there are no texts in {quoted(language)}, only in {', '.join(self.languages)}")

    def render(self, notice: Notice, reply_to: str = "") -> Text:
        """Return the text of a notice in its language, or in English. `reply_to` is whom to reply to."""
        words, templates = self._find(notice.language)
        values = _list_values(notice, words, reply_to)
        subject, _, body = _substitute(templates[find_name(notice.standing)], values).partition("\n\n")
        if notice.recipient != notice.standing.recipient:
            body = f"{_substitute(words.no_contact, values)}\n\n{body}"
        return Text(shorten(" ".join(subject.split()), MAX_SUBJECT), body)

    def find_labels(self, language: str) -> Labels:
        """Return the words on plots in a language, or in English."""
        return self._find(language)[0].plot

    def _find(self, language: str) -> tuple[Words, Mapping[str, str]]:
        return self._languages.get(language) or self._languages[DEFAULT_LANGUAGE]


def find_name(standing: Standing) -> str:
    """Return the name of the template about a standing."""
    return f"{standing.replace(' ', '-')}.txt"


NAMES = (*(find_name(standing) for standing in NOTIFIED), WORDS)
"""The files of a language."""


def load_texts(folder: Path | None = None) -> Texts:
    """Load and check all texts: those in the package, and instead of them those that are in `folder`/LANGUAGE.

    Raises ConfigurationError, with one problem for each placeholder that is unknown and each file that cannot be used.
    """
    problems: list[str] = []
    files = {path.name: {file.name: file for file in path.iterdir()} for path in FOLDER.iterdir()}
    if folder is not None:
        try:
            for language, name, path in _list_replacements(folder, problems):
                files.setdefault(language, {})[name] = path
        except OSError as error:
            raise ConfigurationError(f"{error.filename}: cannot be read: {error.strerror}") from None
    languages = {}
    for language, found in sorted(files.items()):
        missing = [name for name in NAMES if name not in found]
        if missing:
            problems.append(
                f"{folder}/{language}: {missing[0]} is missing; a language that is not in the package needs all of"
                f" {', '.join(NAMES)}"
            )
            continue
        words = _load_words(found[WORDS], problems)
        templates = {name: _load_template(found[name], problems) for name in NAMES if name != WORDS}
        languages[language] = words, templates
    if problems:
        raise ConfigurationError(*problems)
    return Texts({name: (words, texts) for name, (words, texts) in languages.items() if words is not None})


def _list_replacements(folder: Path, problems: list[str]) -> Iterator[tuple[str, str, Path]]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            problems.append(f"{path}: templates are in a folder for each language, such as {folder}/en/{NAMES[0]}")
            continue
        for file in sorted(path.iterdir()):
            if file.name.startswith("."):
                continue
            if file.name in NAMES:
                yield path.name, file.name, file
            else:
                problems.append(f"{file}: unknown template; the names here are {', '.join(NAMES)}")


def _load_words(path: Path, problems: list[str]) -> Words | None:
    text = _read(path, problems)
    try:
        words = msgspec.toml.decode(text, type=Words)
    except (msgspec.DecodeError, ValueError) as error:
        problems.append(f"{path}: {printable(str(error))}")
        return None
    for key in ("suggest_plan", "suggest_own", "no_contact"):
        problems += [f"{path}: {key}: {reason}" for _, reason in _find_mistakes(getattr(words, key))]
    return words


def _load_template(path: Path, problems: list[str]) -> str:
    text = _read(path, problems)
    subject, _, body = text.partition("\n\n")
    if not subject.strip() or "\n" in subject or not body.strip():
        problems.append(f"{path}: expected the subject in line 1, an empty line 2, and the body from line 3 on")
    problems += [f"{path}: line {line}: {reason}" for line, reason in _find_mistakes(text)]
    return text


def _read(path: Path, problems: list[str]) -> str:
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_TEMPLATE_BYTES else None
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return "-\n\n-"
    if content is None:
        problems.append(f"{path}: larger than {MAX_TEMPLATE_BYTES} bytes")
        return "-\n\n-"
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        problems.append(f"{path}: not UTF-8")
        return "-\n\n-"
    if any(not character.isprintable() and character not in TYPOGRAPHIC for character in text):
        problems.append(f"{path}: has a control character")
    return text


def _find_mistakes(text: str) -> Iterator[tuple[int, str]]:
    """Return each mistake in the placeholders of a text, with its line."""
    for match in _Template.pattern.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        name = match["named"] or match["braced"]
        if match["invalid"] is not None:
            yield line, "a $ that begins no placeholder; write ${name}, or $$ for a dollar sign"
        elif name is not None and name not in PLACEHOLDERS:
            near = difflib.get_close_matches(name[:100], sorted(PLACEHOLDERS), n=1)
            known = ", ".join(f"${{{one}}}" for one in sorted(PLACEHOLDERS))
            hint = f"did you mean ${{{near[0]}}}?" if near else f"there are {known}"
            yield line, f"unknown placeholder {quoted('${' + name + '}')}; {hint}"


def _substitute(template: str, values: Mapping[str, str]) -> str:
    return _Template(template).substitute(values)


def _list_values(notice: Notice, words: Words, reply_to: str) -> dict[str, str]:
    """Return the value of each placeholder as text."""
    assessment = notice.assessment
    found = {
        "id": notice.id,
        "site": notice.site,
        "plan": assessment.label or assessment.plan or words.none,
        "next_plan": assessment.next_label or assessment.next_plan or words.none,
        "sentence": assessment.sentence,
        "since": _format_time(assessment.since),
        "created": _format_time(notice.created),
        "reply_to": reply_to or words.operator,
    }
    values = {name: shorten(printable(text), MAX_VALUE) for name, text in found.items()}
    for name in Figures.__struct_fields__:
        figure = _format_figure(name, getattr(assessment.figures, name), words)
        values[name] = shorten(_escape(figure), MAX_VALUE)
    suggestion = words.suggest_plan if assessment.next_plan else words.suggest_own
    return values | {"suggestion": _substitute(suggestion, values)}


def _escape(text: str) -> str:
    """Escape what is not printable, and keep the spaces of a language's numbers."""
    return re.sub(f"[^{NO_BREAK_SPACES}]+", lambda match: printable(match[0]), text)


_PARTS = frozenset({"share", "suggested_share", "scarcity_share", "flood_share"})


def _format_figure(name: str, value: Any, words: Words) -> str:
    if value is None:
        return words.none if name == "guideline" else words.unknown
    for key, choices in (("resource", words.resources), ("scarcity", words.scarcities), ("flood", words.floods)):
        if name == key:
            return choices.get(value, str(value))
    if name in _PARTS:
        return _format_number(value * 100, words) + words.percent
    return _format_number(value, words)


def _format_number(value: float, words: Words) -> str:
    """Return a number as people write it, with one decimal place if it is small and not whole."""
    text = f"{value:,.1f}" if value < 100 and value != int(value) else f"{value:,.0f}"
    return "".join({",": words.thousands, ".": words.decimal}.get(character, character) for character in text)


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
