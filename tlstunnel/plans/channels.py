"""What notices are sent through, as the configuration says: the log, a webhook, a mail server; and the texts.

Tested by tests/unit/test_plans_delivery.py.
"""

from tlstunnel.config import Config
from tlstunnel.config.urls import WebURL
from tlstunnel.journal.events import Event
from tlstunnel.journal.logger import structlog
from tlstunnel.plans.credentials import load_password, load_secrets
from tlstunnel.plans.guidelines import find_plans
from tlstunnel.plans.mail import Mail
from tlstunnel.plans.notice_file import Channel, Target
from tlstunnel.plans.notices import Addresses, Outcome, Result
from tlstunnel.plans.plot import Labels
from tlstunnel.plans.templates import Texts, load_texts
from tlstunnel.plans.values import Notice
from tlstunnel.plans.webhook import Webhook

_MAILTO = "mailto:"


class Channels:
    """Where notices go, and how. Another one takes its place at a reload.

    `webhook_url` gets every notice. `webhook` is also what delivers to contacts with a URL, and `mail` to those with a
    mailbox; None if there is none.
    """

    def __init__(
        self,
        texts: Texts,
        addresses: Addresses,
        *,
        webhook_url: str = "",
        webhook: Webhook | None = None,
        mail: Mail | None = None,
    ) -> None:
        self.addresses = addresses
        self._texts = texts
        self._webhook_url = webhook_url
        self._webhook = webhook
        self._mail = mail
        self._log = structlog.get_logger()

    def list_targets(self, notice: Notice) -> list[Target]:
        """Return where to deliver a notice."""
        targets = [Target(Channel.LOG)]
        if self._webhook_url:
            targets.append(Target(Channel.WEBHOOK))
        if notice.address.startswith(_MAILTO):
            if self._mail is not None:
                targets.append(Target(Channel.MAIL, notice.address.removeprefix(_MAILTO)))
        elif notice.address not in ("", self._webhook_url) and self._webhook is not None:
            targets.append(Target(Channel.WEBHOOK, notice.address))
        return targets

    def find_url(self, target: Target) -> str:
        """Return the URL of a webhook, "" for other targets."""
        return (target.address or self._webhook_url) if target.channel is Channel.WEBHOOK else ""

    def wants_plot(self, target: Target) -> bool:
        """Return whether a plot goes with the notice: to a contact or the operator, not to a program that gets all."""
        return bool(target.address)

    def find_labels(self, notice: Notice) -> Labels:
        """Return the words on the plot for a notice."""
        return self._texts.find_labels(notice.language)

    async def deliver(self, notice: Notice, target: Target, plot: bytes | None = None) -> Result:
        """Make one attempt. The configuration of now counts, not that of when the notice was made."""
        if target.channel is Channel.LOG:
            self._log.warning(
                Event.NOTICE,
                id=notice.id,
                site=notice.site,
                standing=notice.standing.value,
                recipient=notice.recipient,
                sentence=notice.assessment.sentence,
            )
            return Result(Outcome.ACCEPTED, "")
        text = self._texts.render(notice, _strip(self.addresses.operator))
        if target.channel is Channel.MAIL and self._mail is not None:
            return await self._mail.deliver(target.address, notice, text, plot)
        url = self.find_url(target)
        if url and self._webhook is not None:
            return await self._webhook.deliver(url, notice, text, plot, contact=bool(target.address))
        return Result(Outcome.REFUSED, "it is no longer configured")


def load_channels(config: Config) -> Channels:
    """Return the channels that a configuration describes. Raises ConfigurationError."""
    notices = config.usage.notices
    texts = load_texts(notices.templates)
    texts.check_language(notices.language)
    secrets = load_secrets(notices.secret_file) if notices.secret_file is not None else ()
    operator = _to_url(notices.operator)
    mail = None
    if notices.email is not None and notices.sender is not None:
        password = load_password(notices.password_file) if notices.password_file is not None else ""
        reply_to = _strip(operator) if operator.startswith(_MAILTO) else ""
        mail = Mail(notices.email, notices.sender, reply_to, password=password)
    return Channels(
        texts,
        Addresses({site.site: site.contact for site in find_plans(config).values()}, operator, notices.language),
        webhook_url=_to_url(notices.webhook),
        webhook=Webhook(secrets) if secrets else None,
        mail=mail,
    )


def _to_url(contact: str | WebURL | None) -> str:
    return contact.text if isinstance(contact, WebURL) else contact or ""


def _strip(url: str) -> str:
    return url.removeprefix(_MAILTO)
