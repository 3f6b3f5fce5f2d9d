"""Mail: what is composed, whatever is in the values; and servers that refuse, hang and close."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any

import msgspec
import pytest
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword, Session
from aiosmtpd.smtp import Envelope as Received
from hypothesis import given
from hypothesis import strategies as st

from tests.harness import Certificate
from tests.unit.test_plans_templates import TEXTS, make_notice
from tlstunnel.config.urls import MailServer
from tlstunnel.plans.connection import make_context
from tlstunnel.plans.mail import Envelope, Mail, compose
from tlstunnel.plans.notices import Outcome, Result
from tlstunnel.plans.templates import Text

SENDER = "tunnel@example.net"
RECIPIENT = "ops@chat.example.com"
NOTICE = make_notice()
ENVELOPE = Envelope(SENDER, RECIPIENT)
TEXT = TEXTS.render(NOTICE, "help@example.net")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def parse(message: EmailMessage) -> EmailMessage:
    parsed = message_from_bytes(bytes(message), policy=default)
    assert isinstance(parsed, EmailMessage)
    return parsed


def read_body(mail: EmailMessage) -> str:
    part = mail.get_body()
    assert part is not None
    content = part.get_content()
    assert isinstance(content, str)
    return content.replace("\r\n", "\n")


# Composing


def test_a_mail_has_the_text() -> None:
    mail = parse(compose(NOTICE, TEXT, Envelope(SENDER, RECIPIENT, "help@example.net")))
    assert dict(mail.items()) == {
        "From": SENDER,
        "To": RECIPIENT,
        "Reply-To": "help@example.net",
        "Subject": "chat.example.com: steadily above its guideline of 1,000 tunnels",
        "Date": "Sat, 16 Jan 2027 08:00:00 +0000",
        "Message-ID": "<notice-0123456789abcdef@example.net>",
        "Auto-Submitted": "auto-generated",
        "Content-Type": 'text/plain; charset="utf-8"',
        "Content-Transfer-Encoding": "quoted-printable",
        "MIME-Version": "1.0",
    }
    assert read_body(mail) == TEXT.body


def test_the_spaces_of_a_language_arrive() -> None:
    text = Text("Anteil", "10\u00a0% de\u202f:\n\u2028\x07")
    assert read_body(parse(compose(NOTICE, text, Envelope(SENDER, RECIPIENT)))) == "10\u00a0% de\u202f:\n\ufffd\ufffd\n"


def test_a_mail_is_the_same_each_time() -> None:
    first, second = (bytes(compose(NOTICE, TEXT, ENVELOPE)) for _ in range(2))
    assert first == second
    assert first.isascii()
    assert b"\n" not in first.replace(b"\r\n", b"")
    assert max(map(len, first.split(b"\r\n"))) <= 998


def test_a_plot_is_attached() -> None:
    mail = parse(compose(NOTICE, TEXT, ENVELOPE, PNG))
    assert read_body(mail) == TEXT.body
    (attachment,) = mail.iter_attachments()
    assert (attachment.get_content_type(), attachment.get_filename()) == ("image/png", "tunnels.png")
    assert attachment.get_content() == PNG


FIELDS = {"From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "Content-Type", "MIME-Version"}
HOSTILE = st.text() | st.sampled_from(
    ["\r\nBcc: a@b", "\n\nx", "\r.\r\n", "\x0b\x0c\x85\u2028\u2029", "=?utf-8?q?=0A?="]
)


@given(HOSTILE, HOSTILE, HOSTILE)
def test_no_value_adds_a_header_or_a_line(site: str, sentence: str, label: str) -> None:
    assessment = msgspec.structs.replace(NOTICE.assessment, label=label, sentence=sentence)
    notice = msgspec.structs.replace(NOTICE, site=site, assessment=assessment)
    text = TEXTS.render(notice, "help@example.net")
    mail = parse(compose(notice, text, ENVELOPE))
    assert set(mail.keys()) == FIELDS | {"Content-Transfer-Encoding"}
    assert len(mail.keys()) == len(FIELDS) + 1
    assert mail["To"] == RECIPIENT
    assert read_body(mail).count("\n") == TEXT.body.count("\n")
    assert read_body(mail) == text.body


@given(HOSTILE)
def test_an_id_that_is_none_is_refused(identifier: str) -> None:
    notice = msgspec.structs.replace(NOTICE, id=f"{identifier} ")
    with pytest.raises(ValueError, match="expected one address"):
        compose(notice, TEXT, ENVELOPE)


@given(HOSTILE, HOSTILE)
def test_nor_does_a_text(subject: str, body: str) -> None:
    mail = compose(NOTICE, Text(subject, body), ENVELOPE)
    head, _, rest = bytes(mail).partition(b"\r\n\r\n")
    names = [line.partition(b":")[0].decode() for line in head.split(b"\r\n") if line[:1] not in b" \t"]
    assert sorted(names) == sorted(FIELDS | {"Content-Transfer-Encoding"})
    assert b"\r" not in (head + rest).replace(b"\r\n", b"")
    assert b"\n" not in (head + rest).replace(b"\r\n", b"")


@pytest.mark.parametrize("mailbox", ["a@b.example\r\nBcc: c@d.example", "a@b.example, c@d.example", "", "a"])
def test_what_is_no_mailbox_is_refused(mailbox: str) -> None:
    with pytest.raises(ValueError, match="expected one address"):
        compose(NOTICE, TEXT, Envelope(SENDER, mailbox))
    assert deliver_to(MailServer("smtp", "127.0.0.1", 1), recipient=mailbox).outcome is Outcome.FAILED


# Delivering


class Mailboxes:
    """Keeps what it is sent, with replies of the test."""

    def __init__(self, **replies: str) -> None:
        self.envelopes: list[Received] = []
        self.encrypted: list[bool] = []
        self._replies = replies

    async def handle_RCPT(  # noqa: N802 - names of aiosmtpd
        self, server: SMTP, session: Session, envelope: Received, address: str, options: list[str]
    ) -> str:
        envelope.rcpt_tos.append(address)
        return self._replies.get("rcpt", "250 OK")

    async def handle_MAIL(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Received, address: str, options: list[str]
    ) -> str:
        envelope.mail_from = address
        return self._replies.get("mail", "250 OK")

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Received) -> str:  # noqa: N802
        self.envelopes.append(envelope)
        self.encrypted.append(session.ssl is not None)
        return self._replies.get("data", "250 queued as 7")


def authenticate(server: SMTP, session: Session, envelope: Received, mechanism: str, data: Any) -> AuthResult:
    assert isinstance(data, LoginPassword)
    return AuthResult(success=data.login == b"user" and data.password == b"p@ss w\xc3\xb6rd", handled=False)


@contextlib.asynccontextmanager
async def serving(factory: Callable[[], asyncio.BaseProtocol], context: ssl.SSLContext | None) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def deliver_to(server: MailServer, recipient: str = RECIPIENT) -> Result:
    return asyncio.run(Mail(server, SENDER).deliver(recipient, NOTICE, TEXT))


def deliver(
    boxes: Mailboxes,
    *,
    scheme: str = "smtp",
    user: str = "",
    password: str = "",
    context: ssl.SSLContext | None = None,
    implicit: ssl.SSLContext | None = None,
    plot: bytes | None = None,
    remote: bool = False,
    **options: Any,
) -> Result:
    """Deliver a notice to such a server. `remote` makes it believe that the server is on another machine."""

    async def run() -> Result:
        async with serving(lambda: SMTP(boxes, hostname="localhost", **options), implicit) as port:
            mail = Mail(MailServer(scheme, "127.0.0.1", port, user), SENDER, password=password)
            mail.context = context
            mail.is_on_loopback = not remote
            return await mail.deliver(RECIPIENT, NOTICE, TEXT, plot)

    return asyncio.run(run())


@pytest.fixture
def server_context(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    return context


@pytest.fixture
def trusting(certificate: Certificate) -> ssl.SSLContext:
    context = make_context()
    context.load_verify_locations(certificate.ca)
    return context


def test_a_mail_arrives() -> None:
    boxes = Mailboxes()
    assert deliver(boxes, plot=PNG) == Result(Outcome.ACCEPTED, "queued as 7")
    (envelope,) = boxes.envelopes
    assert (envelope.mail_from, envelope.rcpt_tos) == (SENDER, [RECIPIENT])
    assert isinstance(envelope.content, bytes)
    mail = message_from_bytes(envelope.content, policy=default)
    assert isinstance(mail, EmailMessage)
    assert mail["Message-ID"] == "<notice-0123456789abcdef@example.net>"
    assert read_body(mail) == TEXT.body


def test_a_line_with_a_dot_arrives() -> None:
    boxes = Mailboxes()

    async def run() -> Result:
        async with serving(lambda: SMTP(boxes, hostname="localhost"), None) as port:
            mail = Mail(MailServer("smtp", "127.0.0.1", port), SENDER)
            return await mail.deliver(RECIPIENT, NOTICE, Text("x", "a\n.\n..\n.b\nQUIT\n"))

    assert asyncio.run(run()).outcome is Outcome.ACCEPTED
    (envelope,) = boxes.envelopes
    assert isinstance(envelope.content, bytes)
    assert envelope.content.endswith(b"\r\n\r\na\r\n.\r\n..\r\n.b\r\nQUIT\r\n")


def test_starttls_is_used_and_verified(server_context: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    boxes = Mailboxes()
    settings: dict[str, Any] = {"tls_context": server_context, "require_starttls": True, "remote": True}
    assert deliver(boxes, context=trusting, **settings).outcome is Outcome.ACCEPTED
    assert boxes.encrypted == [True]
    result = deliver(boxes, context=make_context(), **settings)
    assert result.outcome is Outcome.FAILED
    assert result.reason.startswith("certificate not trusted: ")
    assert len(boxes.envelopes) == 1


def test_without_starttls_nothing_is_sent_to_another_machine(trusting: ssl.SSLContext) -> None:
    boxes = Mailboxes()
    result = deliver(boxes, context=trusting, remote=True)
    assert result == Result(Outcome.FAILED, "SMTP STARTTLS extension not supported by server.")
    assert boxes.envelopes == []


def test_on_loopback_any_certificate_will_do(server_context: ssl.SSLContext) -> None:
    boxes = Mailboxes()
    assert deliver(boxes, tls_context=server_context, require_starttls=True).outcome is Outcome.ACCEPTED
    assert boxes.encrypted == [True]


def test_smtps_is_tls_from_the_start(server_context: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    boxes = Mailboxes()
    assert deliver(boxes, scheme="smtps", implicit=server_context, context=trusting).outcome is Outcome.ACCEPTED
    result = deliver(boxes, scheme="smtps", implicit=server_context, context=make_context())
    assert (result.outcome, result.reason[:25]) == (Outcome.FAILED, "certificate not trusted: ")
    result = deliver(boxes, scheme="smtps", context=trusting)  # it does not speak TLS
    assert result.outcome is Outcome.FAILED
    assert len(boxes.envelopes) == 1


def test_a_user_logs_in(server_context: ssl.SSLContext, trusting: ssl.SSLContext) -> None:
    boxes = Mailboxes()
    settings: dict[str, Any] = {
        "tls_context": server_context,
        "authenticator": authenticate,
        "auth_required": True,
        "context": trusting,
        "remote": True,
    }
    assert deliver(boxes, user="user", password="p@ss wörd", **settings).outcome is Outcome.ACCEPTED
    result = deliver(boxes, user="user", password="wrong", **settings)
    assert (result.outcome, result.reason[:3]) == (Outcome.FAILED, "535")
    result = deliver(boxes, **settings)
    assert (result.outcome, result.reason[:3]) == (Outcome.FAILED, "530")
    assert len(boxes.envelopes) == 1


@pytest.mark.parametrize("command", ["mail", "rcpt", "data"])
@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("550 5.1.1 no such mailbox", Outcome.REFUSED),
        ("554 no spam here", Outcome.REFUSED),
        ("530 5.7.0 Must issue a STARTTLS command first", Outcome.FAILED),
        ("450 greylisted", Outcome.FAILED),
        ("421 closing", Outcome.FAILED),
    ],
)
def test_a_reply_decides(command: str, reply: str, outcome: Outcome) -> None:
    assert deliver(Mailboxes(**{command: reply})) == Result(outcome, reply)


# Servers that misbehave

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def deliver_script(script: Script, timeout: float = 10.0) -> Result:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await script(reader, writer)
        writer.transport.abort()

    async def run() -> Result:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await Mail(MailServer("smtp", "127.0.0.1", port), SENDER, timeout=timeout).deliver(
                RECIPIENT, NOTICE, TEXT
            )
        finally:
            server.close()

    return asyncio.run(run())


async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *replies: bytes) -> None:
    """Send each reply, the first one unasked."""
    for number, reply in enumerate(replies):
        if number:
            await reader.readuntil(b"\r\n.\r\n" if replies[number - 1].startswith(b"354") else b"\r\n")
        writer.write(reply)
        await writer.drain()


ACCEPTING = (b"220 hello\r\n", b"250 hello\r\n", b"250 OK\r\n", b"250 OK\r\n", b"354 go on\r\n", b"250 queued\r\n")


@pytest.mark.parametrize("number", range(len(ACCEPTING)))
def test_a_server_that_closes_midway(number: int) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await converse(reader, writer, *ACCEPTING[:number])
        if number:
            await reader.readuntil(b"\r\n.\r\n" if ACCEPTING[number - 1].startswith(b"354") else b"\r\n")

    result = deliver_script(script)
    assert result.outcome is Outcome.FAILED
    assert result.reason


@pytest.mark.parametrize("number", range(len(ACCEPTING)))
def test_a_server_that_hangs(number: int) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await converse(reader, writer, *ACCEPTING[:number])
        await asyncio.Event().wait()

    began = time.monotonic()
    result = deliver_script(script, timeout=0.3)
    assert result.outcome is Outcome.FAILED
    assert "imed out" in result.reason or "within" in result.reason
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("end", [b"", b"421 x\r\n", b"\xff\r\n"])
def test_what_was_accepted_stays_accepted(end: bytes) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await converse(reader, writer, *ACCEPTING)
        await reader.readuntil(b"QUIT\r\n")
        writer.write(end)
        await writer.drain()

    assert deliver_script(script) == Result(Outcome.ACCEPTED, "queued")


async def continue_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"220-x\r\n" * 1000)
        await writer.drain()


async def send_one_line_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"220 " * 1000)
        await writer.drain()


async def send_no_smtp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x1b[2J\xff hello\r\n")
    await reader.read()


@pytest.mark.parametrize("script", [continue_for_ever, send_one_line_for_ever, send_no_smtp])
def test_what_is_no_smtp_is_a_failure(script: Script) -> None:
    result = deliver_script(script)
    assert result.outcome is Outcome.FAILED
    assert result.reason.isprintable()
    assert len(result.reason) <= 300


def test_a_port_that_nothing_listens_on() -> None:
    assert deliver_to(MailServer("smtp", "127.0.0.1", 1)) == Result(Outcome.FAILED, "Connection refused")
