"""Deliver a notice by e-mail.

The client is aiosmtplib, which is maintained (5.1.3 of 2026), has no dependencies, and bounds what it reads. One
deadline holds for everything, because a coroutine can be cancelled anywhere. smtplib in a thread cannot be: a server
that continues its reply line by line keeps the thread, and the memory for the lines, for as long as it likes.

No value can add a header or a line to a mail: each is one printable line before it comes to a header, and Python's
`email` refuses a line break in one (not everywhere before 3.11.10: CVE-2024-6923). In the body, only the template
makes lines.
"""

import asyncio
import contextlib
import socket
import ssl
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import format_datetime
from ipaddress import ip_address

import aiosmtplib
import msgspec

from tlstunnel.config.urls import MailServer, parse_mailbox
from tlstunnel.escaping import printable, shorten
from tlstunnel.plans.connection import connect, describe_failure, make_context
from tlstunnel.plans.notices import Outcome, Result
from tlstunnel.plans.templates import TYPOGRAPHIC, Text
from tlstunnel.plans.values import Notice

TIMEOUT = 60.0
"""Seconds for a delivery. RFC 5321 section 4.5.3.2 allows a server minutes for each reply, but there are retries."""

QUIT_SECONDS = 2.0
"""How long to wait for the end of a session whose mail was accepted."""

MAX_REASON = 300

_AUTHENTICATION_NEEDED = 530
"""Also "Must issue a STARTTLS command first" (RFC 4954 section 6, RFC 3207 section 4): the operator can correct it."""


class Envelope(msgspec.Struct, frozen=True):
    """The mailboxes of a mail, such as ops@example.com. An answer goes to `reply_to` instead of the sender."""

    sender: str
    recipient: str
    reply_to: str = ""


def compose(notice: Notice, text: Text, envelope: Envelope, plot: bytes | None = None) -> EmailMessage:
    """Return the mail about a notice. It is the same for each attempt, with the same Message-ID.

    `plot` is a PNG. Raises ValueError if something in the envelope is not a mailbox.
    """
    message = EmailMessage(policy=SMTP_POLICY)
    message["From"] = _to_address(envelope.sender)
    message["To"] = _to_address(envelope.recipient)
    if envelope.reply_to:
        message["Reply-To"] = _to_address(envelope.reply_to)
    message["Subject"] = _make_one_line(text.subject)
    message["Date"] = format_datetime(datetime.fromtimestamp(notice.created, UTC))
    message["Message-ID"] = f"<{_to_address(f'{notice.id}@{_to_address(envelope.sender).domain}')}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no answers of programs
    message.set_content("".join(map(_clean, text.body)), cte="quoted-printable")
    if plot is not None:
        message.add_attachment(plot, maintype="image", subtype="png", filename="tunnels.png")
    return message


class Mail:
    """Delivers notices through a mail server.

    The connection is encrypted and the certificate is verified, except on loopback: there, STARTTLS is used if the
    server has it, with any certificate, since nothing leaves the machine. `password` is used if the URL has none.
    """

    def __init__(
        self, server: MailServer, sender: str, reply_to: str = "", *, password: str = "", timeout: float = TIMEOUT
    ) -> None:
        self.context: ssl.SSLContext | None = None
        self.is_on_loopback = _is_loopback(server.host)
        self._server = server
        self._sender = sender
        self._reply_to = reply_to
        self._password = password or server.password
        self._timeout = timeout

    async def deliver(self, recipient: str, notice: Notice, text: Text, plot: bytes | None = None) -> Result:
        """Make one attempt."""
        try:
            envelope = Envelope(self._sender, recipient, self._reply_to)
            message = bytes(compose(notice, text, envelope, plot))
            async with asyncio.timeout(self._timeout):
                return Result(Outcome.ACCEPTED, _shorten(await self._send(recipient, message)))
        except TimeoutError:
            return Result(Outcome.FAILED, f"not sent within {self._timeout:g} s")
        except aiosmtplib.SMTPException as error:
            return _judge(error)
        except (OSError, ValueError) as error:
            return Result(Outcome.FAILED, _shorten(describe_failure(error)))

    async def _send(self, recipient: str, message: bytes) -> str:
        """Return the reply to the message."""
        server = self._server
        session = aiosmtplib.SMTP(
            hostname=server.host,
            local_hostname=_find_own_name(),
            use_tls=server.scheme == "smtps",
            start_tls=self._choose_starttls(),
            tls_context=self._find_context(),
            timeout=self._timeout,
            sock=await connect(server.host, server.port),
        )
        try:
            await session.connect()
            if server.user:
                await self._log_in(session)
            _, reply = await session.sendmail(self._sender, [recipient], message)
            # It is accepted, whatever happens from here on.
            with contextlib.suppress(aiosmtplib.SMTPException, OSError):
                await session.quit(timeout=QUIT_SECONDS)
            return str(reply)
        finally:
            session.close()

    async def _log_in(self, session: aiosmtplib.SMTP) -> None:
        """Log in by one method. `session.login` would try the next one after a wrong password, and be locked out."""
        await session.ehlo()
        methods = {"plain": session.auth_plain, "login": session.auth_login, "cram-md5": session.auth_crammd5}
        for name, log_in in methods.items():
            if name in session.server_auth_methods:
                await log_in(self._server.user, self._password)
                return
        raise aiosmtplib.SMTPException(f"its ways to log in are not supported: {' '.join(session.server_auth_methods)}")

    def _choose_starttls(self) -> bool | None:
        """Return whether to use STARTTLS; None is if the server has it."""
        if self._server.scheme == "smtps":
            return False
        return None if self.is_on_loopback else True

    def _find_context(self) -> ssl.SSLContext:
        if self.context is None:
            self.context = make_context()
            if self.is_on_loopback:
                self.context.check_hostname = False
                self.context.verify_mode = ssl.CERT_NONE
        return self.context


def _judge(error: aiosmtplib.SMTPException) -> Result:
    """Return the result of a session that failed.

    What is refused for good is a sender, a recipient or a mail (RFC 5321 section 4.2.1). A session that does not get as
    far as that can be put right: a password, a certificate. The error of a connection says more than the library's.
    """
    if isinstance(error, aiosmtplib.SMTPRecipientsRefused):
        error = error.recipients[0]
    if isinstance(error, aiosmtplib.SMTPResponseException):
        mail = isinstance(
            error, aiosmtplib.SMTPRecipientRefused | aiosmtplib.SMTPSenderRefused | aiosmtplib.SMTPDataError
        )
        permanent = mail and 500 <= error.code < 600 and error.code != _AUTHENTICATION_NEEDED
        return Result(Outcome.REFUSED if permanent else Outcome.FAILED, _shorten(f"{error.code} {error.message}"))
    cause = error.__cause__
    known = isinstance(cause, OSError) and not isinstance(cause, TimeoutError)
    return Result(Outcome.FAILED, _shorten(describe_failure(cause) if known and cause else str(error)))


def _clean(character: str) -> str:
    return character if character.isprintable() or character in TYPOGRAPHIC else "\ufffd"


def _to_address(mailbox: str) -> Address:
    local, _, domain = parse_mailbox(mailbox).rpartition("@")
    return Address(username=local, domain=domain)


def _make_one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _shorten(text: str) -> str:
    return shorten(_make_one_line(text.encode(errors="replace").decode()), MAX_REASON)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _find_own_name() -> str:
    """Return the name to say to the server, without asking the resolver, which may hang."""
    name = socket.gethostname()
    return name if name.isascii() and name.replace(".", "").replace("-", "").isalnum() else "localhost"
