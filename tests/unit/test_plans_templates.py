"""The texts of notices: those of the package, those of an operator, and mistakes in them."""

import re
import shutil
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.errors import ConfigurationError
from tlstunnel.plans.notices import NOTIFIED
from tlstunnel.plans.templates import FOLDER, MAX_SUBJECT, NAMES, PLACEHOLDERS, WORDS, Texts, find_name, load_texts
from tlstunnel.plans.values import Assessment, Figures, Notice, Standing

FIGURES = Figures(
    guideline=1000,
    now=1234,
    peak=56_789,
    p95=1_050.5,
    hours=672,
    hours_measured=670,
    hours_over=17,
    days_over=5,
    resource="handshakes",
    share=0.525,
    suggested_share=0.1,
    factor=5.25,
    scarcity="cpu",
    scarcity_share=0.9,
    flood="refused",
    flood_rate=12.34,
    flood_share=0.99,
    flood_addresses=3,
)


def make_notice(standing: Standing = Standing.SUSTAINED, language: str = "en", **values: str) -> Notice:
    assessment = Assessment(
        site="chat.example.com",
        plan="pro",
        label="Pro",
        next_plan="business",
        next_label="Business",
        standing=standing,
        since=1_800_000_000.0,
        figures=FIGURES,
        sentence="It was over its guideline.",
    )
    recipient = standing.recipient
    assert recipient is not None
    notice = Notice(
        id="notice-0123456789abcdef",
        site="chat.example.com",
        standing=standing,
        created=1_800_086_400.0,
        recipient=recipient,
        address="mailto:ops@chat.example.com",
        assessment=assessment,
        language=language,
    )
    return msgspec.structs.replace(notice, **values)


TEXTS = load_texts()
EXPECTED = {
    ("repeated", "en"): ["guideline of 1,000 tunnels", "17 of the last 672", ": 56,789", ": 1,234", ": 5\n"],
    ("repeated", "de"): ["Richtwert von 1.000 Tunneln", "17 der letzten 672", ": 56.789", ": 1.234", ": 5\n"],
    ("sustained", "en"): ["guideline of 1,000 tunnels", ": 1,050\n", "17 of the last 672", "The plan Business may"],
    ("sustained", "de"): [
        "Richtwert von 1.000 Tunneln",
        ": 1.050\n",
        "An 95\u00a0% des",
        "17 der letzten 672",
        "Der Plan Business passt",
    ],
    ("disproportionate", "en"): ["share of the handshakes: 52.5%", ": 10%", ": 5.2 to 1\n", "90% of the CPU time"],
    ("disproportionate", "de"): [
        "(Verbindungsaufbauten): 52,5\u00a0%",
        ": 10\u00a0%",
        ": 5,2 zu 1\n",
        "(Rechenzeit): 90\u00a0%",
    ],
    ("suspected abuse", "en"): [
        "handshakes that are refused",
        "12.3 per second",
        ": 99%",
        "about 3",
        "2027-01-15 08:00",
    ],
    ("suspected abuse", "de"): [
        "die abgelehnt werden",
        "12,3 pro Sekunde",
        ": 99\u00a0%",
        "etwa 3",
        "2027-01-15 08:00",
    ],
}


@pytest.mark.parametrize(("standing", "language"), EXPECTED)
def test_a_text_has_its_figures(standing: str, language: str) -> None:
    text = TEXTS.render(make_notice(Standing(standing), language), "help@example.net")
    assert text.subject.startswith("chat.example.com: ")
    assert "\n" not in text.subject
    whole = f"{text.subject}\n{text.body}"
    for words in (*EXPECTED[standing, language], "help@example.net", "notice-0123456789abcdef"):
        assert words in whole
    assert "$" not in whole


@pytest.mark.parametrize("language", ["en", "de"])
@pytest.mark.parametrize("standing", NOTIFIED)
def test_a_text_says_that_nothing_is_cut_off(standing: Standing, language: str) -> None:
    body = TEXTS.render(make_notice(standing, language)).body
    assert re.search(
        {"en": r"[Nn]othing is cut off|never cut off", "de": r"nichts abgeschaltet|nie abgeschaltet"}[language], body
    )
    assert {"en": "the operator of this tunnel", "de": "den Betreiber dieses Tunnels"}[language] in body


def test_no_number_is_parted_from_its_unit() -> None:
    for path in FOLDER.rglob("*.*"):
        assert not re.search(r"\d %", path.read_text()), path


def test_no_text_speaks_of_a_limit() -> None:
    for path in FOLDER.rglob("*.*"):
        assert not re.search(r"limit|exceed|violat|überschr|verst[oö]ß", path.read_text(), re.IGNORECASE), path


@pytest.mark.parametrize("language", ["en", "de"])
@pytest.mark.parametrize("standing", NOTIFIED)
def test_no_line_is_wider_than_a_mail_shows_well(standing: Standing, language: str) -> None:
    """With the values in it: a program that breaks the lines of a paragraph again leaves short ones behind."""
    body = TEXTS.render(make_notice(standing, language), "help@example.net").body
    assert [line for line in body.splitlines() if len(line) > 92] == []


def test_a_site_without_a_next_plan_is_offered_a_guideline_of_its_own() -> None:
    notice = make_notice()
    notice = msgspec.structs.replace(notice, assessment=msgspec.structs.replace(notice.assessment, next_plan=""))
    assert "A guideline of its own may suit it better." in TEXTS.render(notice).body


def test_what_is_not_known_has_a_word() -> None:
    notice = make_notice(Standing.SUSTAINED)
    assessment = Assessment(site="a", standing=Standing.SUSTAINED, since=0.0, sentence="")
    text = TEXTS.render(msgspec.structs.replace(notice, assessment=assessment))
    assert "Guideline: none concurrent" in text.body
    assert ": unknown\n" in text.body


def test_the_operator_is_told_why_a_notice_to_an_owner_comes() -> None:
    text = TEXTS.render(make_notice(recipient="operator", address=""))
    assert text.body.startswith("No contact is configured for chat.example.com, so")
    assert not TEXTS.render(make_notice(Standing.SUSPECTED_ABUSE)).body.startswith("No contact")


def test_an_unknown_language_is_english() -> None:
    assert TEXTS.render(make_notice(language="fr")) == TEXTS.render(make_notice(language="en"))
    assert TEXTS.languages == ("de", "en")


@given(st.text(), st.text(), st.text())
def test_a_value_is_one_line_and_never_evaluated(site: str, sentence: str, label: str) -> None:
    notice = make_notice()
    hostile = msgspec.structs.replace(notice.assessment, label=label + "${id}$x", sentence=sentence)
    text = TEXTS.render(msgspec.structs.replace(notice, site=site, assessment=hostile), sentence)
    usual = TEXTS.render(notice)
    assert text.body.count("\n") == usual.body.count("\n")
    assert (text.subject + text.body.replace("\n", "")).isprintable()
    assert len(text.subject) <= MAX_SUBJECT
    if len(label) < 20:
        assert "${id}$x" in text.body


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def fail(folder: Path) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as raised:
        load_texts(folder)
    return raised.value.problems


def test_an_operator_replaces_single_texts(tmp_path: Path) -> None:
    write(tmp_path, "en/sustained.txt", "News about ${site}\r\n\r\nIt costs $$ ${peak}.\r\n")
    write(tmp_path, ".git/HEAD", "x")
    write(tmp_path, "en/.sustained.txt.swp", "x")
    texts = load_texts(tmp_path)
    assert texts.render(make_notice()) == msgspec.convert(
        {"subject": "News about chat.example.com", "body": "It costs $ 56,789.\n"}, type(texts.render(make_notice()))
    )
    for standing, language in ((Standing.REPEATED, "en"), (Standing.SUSTAINED, "de")):
        assert texts.render(make_notice(standing, language)) == TEXTS.render(make_notice(standing, language))


def test_an_operator_adds_a_language(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "en", tmp_path / "fr")
    write(tmp_path, "fr/sustained.txt", "Bonjour ${site}\n\n${guideline}\n")
    texts = load_texts(tmp_path)
    assert texts.languages == ("de", "en", "fr")
    assert texts.render(make_notice(language="fr")).subject == "Bonjour chat.example.com"
    (tmp_path / "fr" / WORDS).unlink()
    (problem,) = fail(tmp_path)
    assert problem == (
        f"{tmp_path}/fr: words.toml is missing; a language that is not in the package needs all of {', '.join(NAMES)}"
    )


@pytest.mark.parametrize("name", sorted(PLACEHOLDERS))
def test_each_placeholder_has_a_value(tmp_path: Path, name: str) -> None:
    write(tmp_path, "en/sustained.txt", f"Subject\n\n[${{{name}}}] [${name}]\n")
    first, second = re.findall(r"\[([^]]+)\]", load_texts(tmp_path).render(make_notice()).body)
    assert first == second != ""


def test_a_wrong_template_names_the_file_and_the_placeholder(tmp_path: Path) -> None:
    path = write(tmp_path, "en/repeated.txt", "${sit}\n\n${guideline}\n\n${whatever}${PEAK} $ 5 ${peak.__class__}\n")
    problems = fail(tmp_path)
    assert problems[0] == f'{path}: line 1: unknown placeholder "${{sit}}"; did you mean ${{site}}?'
    assert problems[1].startswith(f'{path}: line 5: unknown placeholder "${{whatever}}"; there are ${{created}}, ${{')
    assert [problem.partition("; ")[0] for problem in problems[2:]] == [
        f'{path}: line 5: unknown placeholder "${{PEAK}}"',
        f"{path}: line 5: a $ that begins no placeholder",
        f"{path}: line 5: a $ that begins no placeholder",
    ]


SHAPE = "expected the subject in line 1, an empty line 2, and the body from line 3 on"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("en/sustained.txt", "", SHAPE),
        ("en/sustained.txt", "Subject\nbody\n", SHAPE),
        ("en/sustained.txt", "Subject\nsecond\n\nbody\n", SHAPE),
        ("en/sustained.txt", "\n\nbody\n", SHAPE),
        ("en/sustained.txt", "Subject\n\n\n", SHAPE),
        ("en/sustained.txt", b"Subject\n\n\xff\n", "not UTF-8"),
        ("en/sustained.txt", "Subject\n\n\x1b[2J\n", "has a control character"),
        ("en/sustained.txt", "Subject\n\n" + "x" * 70_000, "larger than 65536 bytes"),
        ("en/sustaned.txt", "x", f"unknown template; the names here are {', '.join(NAMES)}"),
        ("sustained.txt", "x", "templates are in a folder for each language, such as FOLDER/en/repeated.txt"),
        ("en/words.toml", "thousands = ", "Invalid value (at end of document)"),
        ("en/words.toml", "thousands = ','", "Object missing required field `decimal`"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    path = write(tmp_path, name, content)
    assert fail(tmp_path) == (f"{path}: {reason.replace('FOLDER', str(tmp_path))}",)


def test_words_are_checked_too(tmp_path: Path) -> None:
    text = (FOLDER / "en" / WORDS).read_text()
    path = write(tmp_path, "en/words.toml", text.replace("${next_plan}", "${nextplan}"))
    assert fail(tmp_path) == (
        f'{path}: suggest_plan: unknown placeholder "${{nextplan}}"; did you mean ${{next_plan}}?',
    )
    write(tmp_path, "en/words.toml", text + '\n[wrods]\na = "b"\n')
    (problem,) = fail(tmp_path)
    assert problem.startswith(f"{path}: Object contains unknown field `wrods`")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert fail(tmp_path / "nowhere") == (f"{tmp_path}/nowhere: cannot be read: No such file or directory",)
    (tmp_path / "en" / find_name(Standing.SUSTAINED)).mkdir(parents=True)
    assert fail(tmp_path) == (f"{tmp_path}/en/sustained.txt: cannot be read: Is a directory",)


def test_the_package_has_both_languages_whole() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"en", "de"}
    for language in FOLDER.iterdir():
        assert {path.name for path in language.iterdir()} == set(NAMES)
    assert isinstance(TEXTS, Texts)
