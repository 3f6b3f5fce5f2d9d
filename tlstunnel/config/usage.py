"""How usage is kept, assessed and talked about: thresholds, and where notices go.

Nothing here ends a tunnel. docs/plans.md says what each threshold means.

Tested by tests/unit/test_config_plans.py.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from tlstunnel.addresses import quoted
from tlstunnel.config.durations import Timeout
from tlstunnel.config.kinds import FilePath, Integer, Text
from tlstunnel.config.plans import Contact
from tlstunnel.config.tables import Findings, Table
from tlstunnel.config.urls import MAIL_EXAMPLE, MailServer, WebURL, parse_mailbox

DAY = 86_400
_LANGUAGES = ("en", "de")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})?")


class LongTimeout(Timeout):
    """A timeout of up to ten years."""

    __slots__ = ()
    longest = 3660.0 * DAY


def parse_language(text: str) -> str:
    """Return a language tag. Raises ValueError."""
    if not _LANGUAGE.fullmatch(text):
        raise ValueError(f'expected a language such as "en", got {quoted(text)}')
    return text


Percent = Annotated[int, Integer(1, 100)]
Hours = Annotated[int, Integer(1, 8784)]
Days = Annotated[int, Integer(1, 366)]
WebhookURL = Annotated[WebURL, Text(WebURL.parse, "https://example.com/notices", pattern="^[Hh][Tt][Tt][Pp][Ss]?://")]
MailURL = Annotated[MailServer, Text(MailServer.parse, MAIL_EXAMPLE.strip('"'), pattern="^[Ss][Mm][Tt][Pp][Ss]?://")]
Mailbox = Annotated[str, Text(parse_mailbox, "tunnel@example.com")]
Language = Annotated[str, Text(parse_language, "en", pattern=f"^{_LANGUAGE.pattern}$")]


class Keep(Table, frozen=True):
    """How long the history is kept, by resolution."""

    minutes: LongTimeout = LongTimeout(DAY)
    hours: LongTimeout = LongTimeout(60 * DAY)
    days: LongTimeout = LongTimeout(400 * DAY)

    def check_order(self) -> Findings:
        """A day of minutes, from which its percentile is computed; and no finer resolution longer than a coarser."""
        if self.minutes < DAY:
            yield ("minutes",), f"expected a day at least, got {quoted(str(self.minutes))}"
        if self.hours < self.minutes:
            yield ("hours",), f"expected at least as long as minutes, which are kept for {self.minutes}"
        if self.days < self.hours:
            yield ("days",), f"expected at least as long as hours, which are kept for {self.hours}"


class RepeatedUse(Table, frozen=True):
    """When use above the guideline is repeated: in so many hours, on so many days, within a time."""

    hours: Hours = 6
    days: Days = 5
    within: Timeout = Timeout(28 * DAY)

    def check_days(self) -> Findings:
        """It can happen."""
        return _check_days(self)

    @property
    def hours_looked_at(self) -> int:
        """The hours in `within`."""
        return math.ceil(self.within / 3600)


class SustainedUse(Table, frozen=True):
    """When use above the guideline is sustained: on so many days, for so many hours of each, within a time."""

    hours: Annotated[int, Integer(1, 24)] = 8
    days: Days = 3
    within: Timeout = Timeout(7 * DAY)

    def check_days(self) -> Findings:
        """It can happen."""
        return _check_days(self)

    @property
    def days_looked_at(self) -> int:
        """The days in `within`."""
        return math.ceil(self.within / DAY)


def _check_days(table: RepeatedUse | SustainedUse) -> Findings:
    if table.within < table.days * DAY:
        yield ("days",), f"{table.days} days are more than within, which is {table.within}"


class Disproportion(Table, frozen=True):
    """When a share is disproportionate: so many times what the plan suggests, on the average of a time."""

    factor: Annotated[int, Integer(2, 1000)] = 3
    over: Timeout = Timeout(900)

    def check_over(self) -> Findings:
        """Samples are of minutes."""
        if not 60 <= self.over <= DAY:
            yield ("over",), f"expected a minute at least, and a day at most, got {quoted(str(self.over))}"


class Busy(Table, frozen=True):
    """From how much of its CPU, descriptors or memory, in percent, a machine is busy."""

    cpu: Percent = 80
    descriptors: Percent = 80
    memory: Percent = 85


class Abuse(Table, frozen=True):
    """From how many suspicious connections per second abuse is suspected, and what throttling means."""

    rate: Annotated[int, Integer(1, 1_000_000)] = 10
    address_rate: Annotated[int, Integer(1, 1_000_000)] = 2
    throttle_rate: Annotated[int, Integer(1, 1_000_000)] = 5
    throttle_for: Timeout = Timeout(900)


class Notices(Table, frozen=True):
    """Where notices go besides the log, and in which language."""

    webhook: WebhookURL | None = None
    secret_file: Annotated[Path, FilePath("a file with a secret")] | None = None
    email: MailURL | None = None
    password_file: Annotated[Path, FilePath("a file whose first line is the password")] | None = None
    sender: Mailbox | None = None
    operator: Contact | None = None
    language: Language = "en"
    templates: Annotated[Path, FilePath("a folder of texts")] | None = None

    def check_webhook(self) -> Findings:
        """A webhook is signed."""
        for key in ("webhook", "operator"):
            if isinstance(getattr(self, key), WebURL) and self.secret_file is None:
                yield (key,), "requires secret_file, with which notices are signed"

    def check_email(self) -> Findings:
        """Mail has a sender, and its password is for a user and comes from one place."""
        if self.email is None:
            for key in ("password_file", "sender"):
                if getattr(self, key) is not None:
                    yield (key,), f"requires email, such as email = {MAIL_EXAMPLE}"
            return
        if self.sender is None:
            yield ("email",), "requires sender, the address that notices come from"
        if self.password_file is not None and not self.email.user:
            yield ("password_file",), "requires a user in email"
        if self.password_file is not None and self.email.password:
            yield ("password_file",), "there is a password in email too; keep one of them"

    def check_language(self) -> Findings:
        """There are texts in this language."""
        if self.language not in _LANGUAGES and self.templates is None:
            yield ("language",), f"requires templates, a folder of texts; there are some for {' and '.join(_LANGUAGES)}"


class Usage(Table, frozen=True):
    """How usage is kept and assessed. `tolerance` is in percent of the guideline."""

    keep: Keep = Keep()
    tolerance: Annotated[int, Integer(0, 1000)] = 10
    repeated: RepeatedUse = RepeatedUse()
    sustained: SustainedUse = SustainedUse()
    disproportionate: Disproportion = Disproportion()
    busy: Busy = Busy()
    abuse: Abuse = Abuse()
    on_abuse: Literal["notice", "throttle"] = "notice"
    notices: Notices = Notices()

    def check_keep(self) -> Findings:
        """What is looked at is kept."""
        if self.keep.hours < self.keep.minutes:  # which is reported
            return
        for key in ("repeated", "sustained"):
            if getattr(self, key).within > self.keep.hours:
                yield (key, "within"), f"is longer than keep.hours, which is {self.keep.hours}"
