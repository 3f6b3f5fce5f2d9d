"""Plans, thresholds and where notices go: what the file may hold, the errors, and what is hidden when it is shown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.config import Config, Duration, decode
from tlstunnel.config.plans import BUILT_IN, PlanConfig, parse_contact
from tlstunnel.config.rendering import render_toml
from tlstunnel.config.urls import MailServer, WebURL, hide_key, parse_mailbox, parse_server
from tlstunnel.config.usage import Keep, Usage
from tlstunnel.errors import ConfigurationError

SITE = '[[sites]]\norigins = ["localhost:3000"]\n'
SECRET = '[usage.notices]\nwebhook = "https://example.com/x"\nsecret_file = "secret"\n'


def decoded(text: str) -> Config:
    return decode(text, Path("/etc/tlstunnel"), "t.toml")


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        decoded(text)
    return list(caught.value.problems)


def attempt(parse: Callable[[str], Any], text: str) -> tuple[Any, str]:
    """Return the value, and the reason why there is none."""
    try:
        return parse(text), ""
    except ValueError as error:
        return None, str(error)


def test_there_are_four_plans_without_any_configuration() -> None:
    plans = decoded("").plans
    assert plans == BUILT_IN
    assert {name: (plan.tunnels, plan.next_plan) for name, plan in plans.items()} == {
        "free": (100, "pro"),
        "pro": (1000, "business"),
        "business": (10_000, "enterprise"),
        "enterprise": (None, None),
    }


def test_the_file_changes_plans_and_adds_some() -> None:
    plans = decoded(
        '[plans.pro]\nguideline = 500\n[plans.team]\nguideline = 2000\nnext = "business"\n'
        '[plans.business]\nlabel = "Geschäft"\n'
    ).plans
    assert plans["pro"] == PlanConfig(guideline=500, label="Pro", next="business")
    assert plans["team"] == PlanConfig(guideline=2000, label="Team", next="business")
    assert plans["business"] == PlanConfig(guideline=10_000, label="Geschäft", next="enterprise")
    assert plans["free"] == BUILT_IN["free"]
    assert list(plans) == ["free", "pro", "business", "enterprise", "team"]


def test_a_site_has_a_plan_a_guideline_and_a_contact() -> None:
    site = decoded(f'{SITE}plan = "pro"\nguideline = 250\ncontact = "MAILTO:Ops@Bücher.example"\n').sites[0]
    assert (site.plan, site.guideline, site.contact) == ("pro", 250, "mailto:Ops@xn--bcher-kva.example")
    site = decoded(f'{SECRET}{SITE}guideline = "none"\ncontact = "https://Hooks.example:8443?a=b"\n').sites[0]
    assert (site.plan, site.guideline) == (None, "none")
    assert site.contact == WebURL("https://hooks.example:8443/?a=b")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f'{SITE}plan = "por"\n', 't.toml:3: sites[0].plan: there is no plan "por"; did you mean "pro"?'),
        (
            f'{SITE}plan = "x"\n',
            't.toml:3: sites[0].plan: there is no plan "x"; the plans are free, pro, business, enterprise',
        ),
        (f"{SITE}guideline = 0\n", "whole number from 1 to 1000000000"),
        (f'{SITE}guideline = "off"\n', 'or "none", got "off"'),
        ("[plans.pro]\nguidelines = 5\n", 'plans.pro: unknown key "guidelines"; did you mean "guideline"?'),
        ("[plans.gold]\nlabel = 'Gold'\n", "t.toml:1: plans.gold: the key guideline is missing"),
        ("[plans.pro]\nguideline = 0\n", "plans.pro.guideline: expected a whole number"),
        (
            '[plans.gold]\nguideline = 5\nnext = "bussines"\n',
            'plans.gold.next: there is no plan "bussines"; did you mean "business"?',
        ),
        ('[plans.gold]\nguideline = "none"\nnext = "pro"\n', "plans.gold.next: a plan without a guideline needs no"),
        (
            "[plans.free]\nguideline = 1000\n",
            't.toml:1: plans.free: "pro" has a guideline of 1000, which is no more than the 1000 of "free"',
        ),
        ('[plans.a]\nguideline = 5\nnext = "a"\n', "which is no more than the 5 of"),
        (
            '[plans."a b"]\nguideline = 5\n',
            "plans: expected the name of a plan: 1 to 64 letters, digits or one of _ . -",
        ),
        ("[plans.none]\nguideline = 5\n", '"none" means that there is no plan'),
        ('[plans.pro]\nlabel = "a\\nb"\n', "plans.pro.label: expected 1 to 100 printable characters"),
        ("plans = 5\n", "plans: expected a table such as"),
        ("[plans]\npro = 5\n", "plans.pro: expected a table, got 5"),
        ('[usage.keep]\nminutes = "1h"\n', 'usage.keep.minutes: expected a day at least, got "60m"'),
        ('[usage.keep]\nhours = "10h"\n', "usage.keep.hours: expected at least as long as minutes"),
        ('[usage.keep]\ndays = "59d"\n', "usage.keep.days: expected at least as long as hours"),
        ('[usage.keep]\ndays = "4000d"\n', "of at most 3660 days"),
        ('[usage.keep]\nhours = "20d"\n', "usage.repeated.within: is longer than keep.hours, which is 20d"),
        ('[usage.repeated]\nwithin = "2d"\n', "usage.repeated.days: 5 days are more than within, which is 2d"),
        ('[usage.sustained]\nwithin = "2d"\n', "usage.sustained.days: 3 days are more than within, which is 2d"),
        ('[usage.disproportionate]\nover = "2s"\n', "over: expected a minute at least, and a day at most"),
        ("[usage.busy]\ncpu = 101\n", "usage.busy.cpu: expected a whole number from 1 to 100, got 101"),
        ("[usage]\non_abuse = 'ban'\n", 'usage.on_abuse: expected "notice" or "throttle", got "ban"'),
        ('[usage.notices]\nwebhook = "https://a.example"\n', "usage.notices.webhook: requires secret_file"),
        ('[usage.notices]\noperator = "https://a.example"\n', "usage.notices.operator: requires secret_file"),
        (f'{SITE}contact = "https://a.example"\n', "sites[0].contact: requires usage.notices.secret_file"),
        ('[usage.notices]\nemail = "smtp://a.example"\n', "usage.notices.email: requires sender"),
        ('[usage.notices]\nsender = "a@b.example"\n', "usage.notices.sender: requires email"),
        (
            '[usage.notices]\nemail = "smtp://a.example"\nsender = "a@b.example"\npassword_file = "p"\n',
            "password_file: requires a user in email",
        ),
        (
            '[usage.notices]\nemail = "smtp://u:geheim@a.example"\nsender = "a@b.example"\npassword_file = "p"\n',
            "password_file: there is a password in email too; keep one of them",
        ),
        (
            '[usage.notices]\nlanguage = "fr"\n',
            "language: requires templates, a folder of texts; there are some for en and",
        ),
        ('[usage.notices]\nlanguage = "English"\n', 'expected a language such as "en", got "English"'),
        ("[usage]\ntolerence = 5\n", 'unknown key "tolerence"; did you mean "tolerance"?'),
    ],
)
def test_mistakes(text: str, problem: str) -> None:
    (found,) = problems(text)
    assert problem in found
    assert len(found.splitlines()) == 1
    assert "geheim" not in found


@pytest.mark.parametrize(
    "text",
    [
        *("ops@example.com", "mailto:", "mailto:ops", "mailto:@example.com", "mailto:a@b@c.example"),
        *("mailto:a@b.example,c@d.example", "mailto:a@b.example?bcc=c@d.example", "mailto:a@b.example&subject=x"),
        *(
            "mailto:a@b.example\nBcc: c@d.example",
            "mailto:a@b.example\r\n",
            "mailto:a\0@b.example",
            "mailto:a@b.ex\tample",
        ),
        *("mailto:a%0ab@c.example", 'mailto:"a b"@c.example', "mailto:Ada <a@b.example>", "mailto:a@*.example"),
        *("mailto:a..b@c.example", "mailto:ä@c.example", f"mailto:{'a' * 65}@c.example", "mailto:a@[::1]"),
        *("http://example.com/", "https://", "https://a b.example/", "https://a.example/\nX: y", "https://*.example/"),
        *("https://u:geheim@a.example/", "https://a.example:0/", "https://a.example:x/", "https://a.example/#x y"),
        *("https://a.example:/", "https://[::1/", "https://a.example/ü", "javascript:alert(1)", ""),
    ],
)
def test_a_contact_is_one_address_and_nothing_else(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_contact(text)
    assert "geheim" not in str(caught.value)
    assert str(caught.value).isprintable()


@given(text=st.text(max_size=60) | st.text(alphabet='mailto:@.a\r\n\0 <>,;"%?&', max_size=30).map("mailto:".__add__))
def test_no_contact_holds_more_than_one_line_and_one_address(text: str) -> None:
    contact, reason = attempt(parse_contact, text)
    assert reason.isprintable()
    if reason:
        return
    written = contact.text if isinstance(contact, WebURL) else contact
    assert written.isascii()
    assert written.isprintable()
    assert isinstance(contact, WebURL) or written.count("@") == 1
    assert not set(written) & set(' <>,;"')
    assert parse_contact(written) == contact


@given(text=st.text(max_size=40) | st.text(alphabet="a.@:/[]1%", max_size=30))
def test_servers_and_mailboxes_raise_nothing_else(text: str) -> None:
    for parse in (parse_server, parse_mailbox, MailServer.parse, WebURL.parse):
        assert attempt(parse, text)[1].isprintable()


@pytest.mark.parametrize(
    ("text", "server", "shown"),
    [
        ("smtp://mail.example", MailServer("smtp", "mail.example", 587), "smtp://mail.example:587"),
        ("SMTPS://mail.example/", MailServer("smtps", "mail.example", 465), "smtps://mail.example:465"),
        (
            "smtp://ada%40b.example:pass%3Aword@mail.example:25",
            MailServer("smtp", "mail.example", 25, "ada@b.example", "pass:word"),
            "smtp://ada%40b.example@mail.example:25",
        ),
        ("smtp://[::1]:2525", MailServer("smtp", "::1", 2525), "smtp://[::1]:2525"),
    ],
)
def test_mail_servers(text: str, server: MailServer, shown: str) -> None:
    assert MailServer.parse(text) == server
    assert str(server) == shown
    assert repr(server) == f"<MailServer {shown}>"
    assert MailServer.parse(str(server)).user == server.user


@pytest.mark.parametrize(
    "text", ["http://a.example", "smtp://", "smtp://:geheim@a.example", "smtp://a%0d:geheim@b.example", "smtp://a b"]
)
def test_wrong_mail_servers(text: str) -> None:
    with pytest.raises(ValueError, match=r"URL|user|control") as caught:
        MailServer.parse(text)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("text", ["http://127.0.0.1:8080/hook", "http://localhost/", "http://[::1]:1/"])
def test_a_webhook_on_this_machine_needs_no_tls(text: str) -> None:
    assert WebURL.parse(text).text == text


def test_a_webhook_elsewhere_needs_tls() -> None:
    with pytest.raises(
        ValueError, match=r'"hooks\.example" is on another machine, so its URL has to begin with https://'
    ):
        WebURL.parse("http://hooks.example/")


def test_secrets_are_hidden_when_the_configuration_is_shown() -> None:
    config = decoded(
        '[usage.notices]\nwebhook = "https://hooks.example/services/T000/B000/abcdefghijklmnopqrstuvwx?key=geheim"\n'
        'secret_file = "s"\nemail = "smtps://ada:geheim@mail.example"\nsender = "a@b.example"\n'
        'operator = "https://pager.example/0123456789abcdefghij"\n'
        f'{SITE}contact = "https://owner.example/a?token=geheim"\n'
    )
    shown = "\n".join(render_toml(config))
    assert "geheim" not in shown
    assert "geheim" not in repr(config)
    assert 'webhook = "https://hooks.example/services/T000/B000/(hidden)?(hidden)"' in shown
    assert 'email = "smtps://ada@mail.example:465"' in shown
    assert 'operator = "https://pager.example/(hidden)"' in shown
    assert 'contact = "https://owner.example/a?(hidden)"' in shown


def test_what_is_shown_loads_as_the_same() -> None:
    config = decoded(
        f'{SECRET}email = "smtp://ada@mail.example"\nsender = "a@b.example"\noperator = "mailto:ops@b.example"\n'
        'language = "de"\ntemplates = "texts"\n[usage.keep]\ndays = "800d"\n[plans.team]\nguideline = 2000\n'
        f'{SITE}plan = "team"\nguideline = "none"\ncontact = "mailto:a@b.example"\n'
    )
    assert decode("\n".join(render_toml(config)), Path("/elsewhere"), "shown") == config
    assert config.usage.keep.days == Duration(800 * 86_400)


def test_hours_and_days_are_whole() -> None:
    usage = decoded('[usage.repeated]\nwithin = "121.5h"\n[usage.sustained]\nwithin = "3.5d"\n').usage
    assert (usage.repeated.hours_looked_at, usage.sustained.days_looked_at) == (122, 4)
    assert Usage().repeated.hours_looked_at == 672
    assert str(Keep().minutes) == "24h"


def test_where_a_notice_goes_is_shown_without_the_key() -> None:
    assert hide_key("https://hooks.example/services/T0/" + "x" * 24) == "https://hooks.example/services/T0/(hidden)"
    assert hide_key("https://a.example/?token=x") == "https://a.example/?(hidden)"
    assert hide_key("mailto:ops@example.com") == "mailto:ops@example.com"
    assert hide_key("") == ""
