"""The configuration file: the values it results in, and the errors in a wrong one."""

import json
import re
import typing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.addresses import ListenAddress, Networks, OriginAddress
from tlstunnel.config import (
    MAX_PROBLEMS,
    CertificateConfig,
    Config,
    Duration,
    Ejection,
    Health,
    Limits,
    Lists,
    Log,
    ManagedRules,
    OriginConfig,
    RateLimitConfig,
    Release,
    RouteConfig,
    RuleConfig,
    SiteConfig,
    SiteManagedRules,
    State,
    StateURL,
    Timeout,
    Timeouts,
    decode,
    load,
)
from tlstunnel.config.admin import Admin, Token
from tlstunnel.config.plans import PlanConfig, Plans
from tlstunnel.config.tables import Table
from tlstunnel.config.usage import Abuse, Busy, Disproportion, Keep, Notices, RepeatedUse, SustainedUse, Usage
from tlstunnel.errors import ConfigurationError

FOLDER = Path("/etc/tlstunnel")
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "configuration.md"
SITE = '[[sites]]\norigins = ["localhost:3000"]\n'


def decoded(text: str) -> Config:
    return decode(text, FOLDER, "t.toml")


def refusal(text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        decoded(text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def rule(rest: str) -> str:
    return f"[[rules]]\nname = 'a'\nwhen = 'true'\n{rest}\n"


def test_an_empty_file_gives_the_defaults() -> None:
    config = decoded("")
    assert config == Config()
    assert config.listen == ()
    assert config.trusted_proxies == Networks()
    assert config.timeouts == Timeouts(
        tls_handshake=Timeout(10),
        request=Timeout(10),
        origin_connect=Timeout(5),
        origin_response=Timeout(30),
        idle=None,
        close=Timeout(30),
    )
    assert config.limits.unfinished_handshakes == 4096
    assert config.release == Release(drain_wait=Duration(0), drain_over=Duration(60))
    assert config.log == Log(format="text", opened=False)
    assert config.lists == {}
    assert (config.rules, config.rate_limits) == ((), ())
    assert (config.allow_addresses, config.block_addresses, config.addresses_mode) == ((), (), "block")
    assert config.managed_rules == ManagedRules(processes=1, queue=256)
    assert config.sites == ()


def test_every_key_arrives() -> None:
    config = decoded(
        """
        listen = ["127.0.0.1:8443", "unix:/run/t.sock"]
        trusted_proxies = ["10.0.0.0/8", "::1"]
        timeouts.tls_handshake = "1s"
        timeouts.request = "2s"
        timeouts.origin_connect = "3s"
        timeouts.origin_response = "4s"
        timeouts.idle = "5m"
        timeouts.close = "6s"
        limits.unfinished_handshakes = 10
        release = {drain_wait = "1h", drain_over = "0s"}
        log = {format = "json", opened = true}
        [[sites]]
        names = ["Chat.example.", "*.bücher.example"]
        default = true
        cert = "certs/chat.pem"
        key = "/etc/keys/chat.pem"
        origins = ["unix:chat.sock"]
        [[sites]]
        origins = ["ws://localhost"]
        """
    )
    assert config == Config(
        listen=(ListenAddress("127.0.0.1", 8443), ListenAddress(None, 0, "/run/t.sock")),
        trusted_proxies=Networks.parse(["10.0.0.0/8", "::1"]),
        timeouts=Timeouts(
            tls_handshake=Timeout(1),
            request=Timeout(2),
            origin_connect=Timeout(3),
            origin_response=Timeout(4),
            idle=Timeout(300),
            close=Timeout(6),
        ),
        limits=Limits(unfinished_handshakes=10),
        release=Release(drain_wait=Duration(3600), drain_over=Duration(0)),
        log=Log(format="json", opened=True),
        sites=(
            SiteConfig(
                names=("chat.example", "*.xn--bcher-kva.example"),
                default=True,
                cert=FOLDER / "certs/chat.pem",
                key=Path("/etc/keys/chat.pem"),
                origins=(OriginConfig(address=OriginAddress(None, 0, "/etc/tlstunnel/chat.sock")),),
            ),
            SiteConfig(names=("*",), origins=(OriginConfig(address=OriginAddress("localhost", 80)),)),
        ),
    )


def test_every_key_of_the_firewall_arrives() -> None:
    config = decoded(
        """
        allow_addresses = ["@office", "2001:DB8::/32"]
        block_addresses = ["192.0.2.1"]
        addresses_mode = "log"
        lists = {office = ["198.51.100.0/24", "a word"], "bot-nets" = "lists/bots.txt"}
        managed_rules = {processes = 2, queue = 10}
        [[rules]]
        name = "first"
        when = "true"
        action = "block"
        status = 404
        body = "no"
        on_error = "block"
        mode = "log"
        [[rate_limits]]
        name = "many"
        key = ["ip", "path"]
        limit = "30/minute"
        strategy = "moving"
        max_tunnels = 5
        when = "true"
        block_for = "1m"
        mode = "log"
        ipv6_prefix = 56
        [[sites]]
        origins = ["localhost:3000"]
        allow_addresses = ["10.0.0.0/8"]
        block_addresses = ["@bot-nets"]
        addresses_mode = "log"
        web_origins = ["same"]
        require_web_origin = true
        web_origins_mode = "log"
        strict_path = false
        [[sites.rules]]
        name = "first"
        when = "true"
        action = "skip"
        skip = ["managed_rules", "rate_limits"]
        [[sites.rate_limits]]
        name = "many"
        limit = "1/second"
        [sites.managed_rules]
        owasp_crs = true
        paranoia = 2
        mode = "log"
        threshold = 7
        exclude = [942100]
        profiles = ["kubernetes", "nextjs"]
        rules = "rules/*.conf"
        crs = "/srv/crs"
        timeout = "1s"
        on_failure = "allow"
        """
    )
    hash(config)
    assert config.lists == Lists({"office": ("198.51.100.0/24", "a word"), "bot-nets": "/etc/tlstunnel/lists/bots.txt"})
    assert config.managed_rules == ManagedRules(processes=2, queue=10)
    assert config.allow_addresses == ("@office", "2001:db8::/32")
    assert (config.block_addresses, config.addresses_mode) == (("192.0.2.1/32",), "log")
    assert config.rules == (
        RuleConfig(
            name="first", when="true", action="block", status=404, body="no", skip=(), on_error="block", mode="log"
        ),
    )
    assert config.rate_limits == (
        RateLimitConfig(
            name="many",
            key=("ip", "path"),
            limit="30/minute",
            strategy="moving",
            max_tunnels=5,
            when="true",
            block_for=Timeout(60),
            mode="log",
            ipv6_prefix=56,
        ),
    )
    assert config.sites == (
        SiteConfig(
            origins=(OriginConfig(address=OriginAddress("localhost", 3000)),),
            allow_addresses=("10.0.0.0/8",),
            block_addresses=("@bot-nets",),
            addresses_mode="log",
            web_origins=("same",),
            require_web_origin=True,
            web_origins_mode="log",
            strict_path=False,
            rules=(RuleConfig(name="first", when="true", action="skip", skip=("managed_rules", "rate_limits")),),
            rate_limits=(RateLimitConfig(name="many", limit="1/second"),),
            managed_rules=SiteManagedRules(
                owasp_crs=True,
                paranoia=2,
                mode="log",
                threshold=7,
                exclude=(942100,),
                profiles=("kubernetes", "nextjs"),
                rules="/etc/tlstunnel/rules/*.conf",
                crs=Path("/srv/crs"),
                timeout=Timeout(1),
                on_failure="allow",
            ),
        ),
    )


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("same", "same"),
        ("null", "null"),
        ("https://chat.example.com", "https://chat.example.com"),
        ("HTTPS://Chat.Example.COM.", "https://chat.example.com"),
        ("https://chat.example.com:443", "https://chat.example.com"),
        ("http://chat.example.com:443", "http://chat.example.com:443"),
        ("http://localhost:08080", "http://localhost:8080"),
        ("https://*.Bücher.example:8443", "https://*.xn--bcher-kva.example:8443"),
        ("https://[0::1]:8443", "https://[::1]:8443"),
        ("chrome-extension://ABCdef", "chrome-extension://abcdef"),
        ("capacitor://localhost", "capacitor://localhost"),
    ],
)
def test_web_origins_have_the_form_that_browsers_send(text: str, origin: str) -> None:
    assert decoded(f'{SITE}web_origins = ["{text}"]').sites[0].web_origins == (origin,)


def test_some_durations_can_be_off() -> None:
    assert decoded('timeouts.idle = "off"').timeouts.idle is None
    assert decoded('release.drain_after = "off"').release.drain_after is None
    assert decoded(f'{SITE}max_age = "off"').sites[0].max_age is None
    for key in ("request", "close", "origin_response"):
        assert refusal(f'timeouts.{key} = "off"').startswith(f"t.toml:1: timeouts.{key}: expected a duration such as")


def test_a_relative_folder_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    site = decode(f'{SITE}cert = "a.pem"\nkey = "b.pem"', Path("etc"), "t.toml").sites[0]
    assert (site.cert, site.key) == (tmp_path / "etc/a.pem", tmp_path / "etc/b.pem")


@pytest.mark.parametrize(
    ("text", "seconds", "again"),
    [
        ("250ms", 0.25, "0.25s"),
        ("0s", 0, "0s"),
        ("0d", 0, "0s"),
        ("1.5s", 1.5, "1.5s"),
        ("90s", 90, "90s"),
        ("900s", 900, "15m"),
        ("15m", 900, "15m"),
        ("24h", 86400, "24h"),
        ("60s", 60, "60s"),
        ("7d", 604800, "7d"),
        ("366d", 31622400, "366d"),
    ],
)
def test_durations(text: str, seconds: float, again: str) -> None:
    duration = Duration.parse(text)
    assert duration == seconds
    assert str(duration) == again
    assert Duration.parse(again) == duration


@pytest.mark.parametrize(
    "text", ["", "10", "s", "10 s", "-1s", "+1s", "1e3s", ".5s", "5.s", "10S", "10sec", "\uff11s", "1s\n"]
)
def test_invalid_durations(text: str) -> None:
    with pytest.raises(ValueError, match='expected a duration such as "10s", got "'):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Unknown keys.
        (
            'log.opened = true\n\n[timeouts]\n# why\nreqeust = "10s"',
            't.toml:5: timeouts: unknown key "reqeust"; did you mean "request"?',
        ),
        ("[site]", 't.toml:1: unknown key "site"; did you mean "sites"?'),
        (f"{SITE}{SITE}cret = 'a'", 't.toml:5: sites[1]: unknown key "cret"; did you mean "cert"?'),
        (
            "[release]\nx = 1",
            't.toml:2: release: unknown key "x"; the keys here are drain_after, drain_wait, drain_over, upgrade_t',
        ),
        ('"a\\nb` - at `$.log" = 1', 't.toml:1: unknown key "a\\nb` - at `$.log"; the keys here are listen,'),
        ("sites = [1, {x = 1}]", 't.toml:1: sites[1]: unknown key "x"; the keys here are names,'),
        # Values of another type.
        ("log = 3", "t.toml:1: log: expected a table, got 3"),
        ("[log]\nopened = 1", "t.toml:2: log.opened: expected true or false, got 1"),
        ("[log]\nopened = 'yes'", 't.toml:2: log.opened: expected true or false, got "yes"'),
        ("[log]\nformat = 'xml'", 't.toml:2: log.format: expected "text" or "json", got "xml"'),
        ("[log]\nformat = 1979-05-27", 't.toml:2: log.format: expected "text" or "json", got 1979-05-27'),
        ("[timeouts]\nrequest = 10", 't.toml:2: timeouts.request: expected a duration such as "10s", got 10'),
        ("[timeouts]\nrequest = nan", 't.toml:2: timeouts.request: expected a duration such as "10s", got nan'),
        ("[timeouts]\nrequest = {}", 't.toml:2: timeouts.request: expected a duration such as "10s", got a table'),
        ("[timeouts]\nrequest = '10'", 't.toml:2: timeouts.request: expected a duration such as "10s", got "10"'),
        ("[timeouts]\nidle = false", 't.toml:2: timeouts.idle: expected "off" or a duration such as "10s", got false'),
        ("[timeouts]\nidle = 'never'", 'expected "off" or a duration such as "10s", got "never"'),
        (
            "limits.unfinished_handshakes = '9'",
            'unfinished_handshakes: expected a whole number from 10 to 1000000, got "9"',
        ),
        (
            "limits.unfinished_handshakes = 10.0",
            "unfinished_handshakes: expected a whole number from 10 to 1000000, got 10.0",
        ),
        (
            "limits.unfinished_handshakes = 9",
            "unfinished_handshakes: expected a whole number from 10 to 1000000, got 9",
        ),
        ("limits.unfinished_handshakes = 1000001", "expected a whole number from 10 to 1000000, got 1000001"),
        ("limits.unfinished_handshakes = 0x" + "f" * 5000, "to 1000000, got a number of more than 64 bits"),
        ("listen = '127.0.0.1:8443'", 't.toml:1: listen: expected an array such as ["127.0.0.1:8443"], got "127'),
        ("listen = [8443]", 't.toml:1: listen[0]: expected a string such as "127.0.0.1:8443", got 8443'),
        ("trusted_proxies = {}", 't.toml:1: trusted_proxies: expected an array such as ["10.0.0.0/8"], got a table'),
        ("trusted_proxies = [[]]", 'trusted_proxies[0]: expected a string such as "10.0.0.0/8", got an array'),
        ("[sites]\norigins = []", "t.toml:1: sites: expected an array of tables, got a table; write [[sites]]"),
        ("sites = 1", "t.toml:1: sites: expected an array, got 1"),
        ("sites = [1]", "t.toml:1: sites[0]: expected a table, got 1"),
        (f"{SITE}cert = 1", "t.toml:3: sites[0].cert: expected the path of a PEM file, got 1"),
        (f"{SITE}key = ''", 't.toml:3: sites[0].key: expected the path of a PEM file, got ""'),
        (f'{SITE}key = "a\\u0000b"', 'sites[0].key: expected the path of a PEM file, got "a\\x00b"'),
        # Values out of range or malformed.
        (
            "[timeouts]\nclose = '0s'",
            't.toml:2: timeouts.close: expected a duration such as "10s", longer than zero, got',
        ),
        ("[timeouts]\nidle = '0s'", 'expected "off" or a duration such as "10s", longer than zero, got "0s"'),
        ("[timeouts]\nclose = '367d'", 'expected a duration such as "10s", of at most 366 days, got "367d"'),
        ('listen = [\n"127.0.0.1:1", # one\n\n"8443"\n]', 't.toml:4: listen[1]: "8443" has no host'),
        ('trusted_proxies = [ # 1\n"::1",\n"10.0.0.1/8"\n]', "t.toml:3: trusted_proxies[1]: "),
        ('[[sites]]\nnames = ["a b"]', 't.toml:2: sites[0].names[0]: "a b" is not a host name'),
        (
            '[[sites]]\norigins = ["https://a"]',
            't.toml:2: sites[0].origins[0]: "https://a": an origin is host:port, ws://host:port, wss://',
        ),
        # Contradictions.
        ('listen = ["[::1]:1", "[0::1]:1"]', "t.toml:1: listen[1]: [::1]:1 is listed twice"),
        ("[[sites]]\nnames = []", "t.toml:2: sites[0].names: expected at least one name"),
        ("\n[[sites]]\n", "t.toml:2: sites[0].origins: expected at least one origin, such as"),
        ("[[sites]]\norigins = []", "t.toml:2: sites[0].origins: expected at least one origin, such as"),
        (
            '[[sites]]\norigins = ["a:1", "b:1", "A:1"]',
            "t.toml:2: sites[0].origins[2]: a:1 is origins[0] already; to send it more",
        ),
        ("[[sites]]\norigins = [{ weight = 2 }]", "t.toml:2: sites[0].origins[0]: the key address is missing"),
        ("[[sites]]\norigins = [{ address = 5 }]", "sites[0].origins[0].address: expected a string such as"),
        ('[[sites]]\norigins = [{ address = "a:1", wieght = 2 }]', 'unknown key "wieght"; did you mean "weight"?'),
        (
            '[[sites]]\norigins = [{ address = "a:1", weight = 0 }]',
            "weight: expected a whole number from 1 to 1000, got 0",
        ),
        (
            '[[sites]]\norigins = [{ address = "a:1", backup = true }]',
            "sites[0].origins: at least one origin must not be a backup",
        ),
        (f'{SITE}client_allow = ["cn:a"]', "sites[0].client_allow: requires client_ca"),
        (f'{SITE}client_auth = "request"', "sites[0].client_auth: requires client_ca"),
        (
            f'{SITE}client_ca = "a"\nclient_allow = ["a"]',
            'client_allow[0]: expected "cn:NAME", "dns:NAME" or "uri:URI"',
        ),
        (f'{SITE}client_subject_header = "Host"', "client_subject_header: Host cannot be changed"),
        (f'{SITE}passphrase_env = "A"', "sites[0].passphrase_env: requires key"),
        (f'{SITE}[[sites.certificates]]\ncert = "a"', "sites[0].certificates[0]: the key key is missing"),
        (f'{SITE}origin_host = "a b"', 'sites[0].origin_host: expected "keep", "origin" or a host name, got "a b"'),
        (f'{SITE}origin_host = "*"', "sites[0].origin_host: expected "),
        (f'{SITE}max_age_jitter = "1s"', "sites[0].max_age_jitter: requires max_age"),
        (f'{SITE}max_age = "never"', 'sites[0].max_age: expected "off" or a duration such as "10s"'),
        (f"{SITE}set_headers = []", "sites[0].set_headers: expected a table such as"),
        (
            f'{SITE}set_headers = {{ Host = "a" }}',
            "set_headers: Host cannot be changed: the handshake or the connection depends on it; use origin_host",
        ),
        (f'{SITE}set_headers = {{ "A B" = "a" }}', "set_headers: expected a header name such as X-Site"),
        (f'{SITE}set_headers = {{ A = "a\\r\\nB: c" }}', "set_headers.A: expected printable ASCII characters"),
        (
            f'{SITE}remove_headers = ["Sec-WebSocket-Key"]',
            "remove_headers[0]: Sec-WebSocket-Key cannot be changed: the hand",
        ),
        (f'{SITE}send_proxy_protocol = "v3"', 'expected "off", "v1", "v2" or "v2-tls", got "v3"'),
        ('proxy_protocol = "required"', "proxy_protocol: every connection would be refused: list the proxies"),
        ('proxy_protocol_listen = ["127.0.0.1:1"]', "proxy_protocol_listen[0]: 127.0.0.1:1 is not in listen"),
        (f'{SITE}origin_ca = "a"', "sites[0].origin_ca: applies to origins with TLS (wss://) only"),
        (
            f'{SITE}origin_verify = "off"',
            "sites[0].origin_verify: applies to origins with TLS (wss://) only",
        ),
        (f'{SITE}balance = "random"', 'sites[0].balance: expected "round_robin", "least_tunnels", "hash:ip", '),
        (f'{SITE}balance = "hash:header:"', "sites[0].balance: expected "),
        (
            f'{SITE}health = {{ type = "ping" }}',
            'sites[0].health.type: expected "tcp", "websocket" or "http", got "ping"',
        ),
        (f'{SITE}health = {{ path = "/x" }}', 'sites[0].health.path: requires type = "websocket" or type = "http"'),
        (f'{SITE}health = {{ type = "http", path = "x" }}', "sites[0].health.path: expected a path such as"),
        (f'{SITE}ejection = {{ delay = "2m" }}', "sites[0].ejection.max_delay: must not be shorter than delay (2m)"),
        (f"{SITE}routes = {{}}", "sites[0].routes: expected an array of tables, got a table; write [[sites.routes]]"),
        (f'{SITE}[[sites.routes]]\npath = "/a"', "sites[0].routes[0].origins: expected at least one origin"),
        (f'{SITE}[[sites.routes]]\norigins = ["a:1"]', "sites[0].routes[0]: the key path is missing"),
        (f'{SITE}[[sites.routes]]\npath = "a"\norigins = ["a:1"]', "routes[0].path: expected the beginning of a"),
        (
            f'{SITE}routes = [{{ path = "/a", origins = ["a:1"] }}, {{ path = "/ab", origins = ["a:1"] }}]',
            "sites[0].routes[1].path: this route is never used: routes[0] matches first",
        ),
        (f"{SITE}cert = 'a'", "t.toml:3: sites[0].cert: requires key"),
        (f"{SITE}key = 'a'", "t.toml:3: sites[0].key: requires cert"),
        (
            f"{SITE}names = ['A.b']\n{SITE}names = [\n'c.d',\n'a.b.',\n]",
            't.toml:8: sites[1].names[1]: sites[0] already has the name "a.b"',
        ),
        (f"{SITE}names = ['a', 'a']", 't.toml:3: sites[0].names[1]: sites[0] already has the name "a"'),
        (
            SITE + SITE,
            't.toml:3: sites[1].names[0]: sites[0] already has the name "*", like every site without names',
        ),
        (
            f"{SITE}default = true\n{SITE}names=['a']\n{SITE}names=['b']\ndefault = true",
            "t.toml:10: sites[2].default: sites[0] is the default already; there can be only one",
        ),
        # The firewall.
        ("[rules]", "t.toml:1: rules: expected an array of tables, got a table; write [[rules]], in double brackets"),
        (
            f"{SITE}[sites.rate_limits]",
            "sites[0].rate_limits: expected an array of tables, got a table; write [[sites.",
        ),
        ("[[rules]]\nname = 'a'\n", "t.toml:1: rules[0]: the key when is missing"),
        (
            rule("action = 'deny'"),
            't.toml:4: rules[0].action: expected "block", "allow", "log" or "skip", got "deny"',
        ),
        (rule("action = 'skip'"), "t.toml:4: rules[0].action: requires skip, such as skip = ["),
        (rule("action = 'log'\nskip = ['rate_limits']"), 't.toml:5: rules[0].skip: requires action = "skip"'),
        (rule("action = 'skip'\nskip = ['rules']"), 'rules[0].skip[0]: expected "rate_limits" or "managed_rules", got'),
        (rule("action = 'block'\nstatus = 399"), "rules[0].status: expected a whole number from 400 to 599, got 399"),
        (
            rule("action = 'block'\nstatus = 499"),
            "rules[0].status: 499 is not an HTTP status code; the usual one is 403",
        ),
        (rule("action = 'allow'\nstatus = 404"), 'rules[0].status: requires action = "block" or on_error ='),
        (rule("action = 'log'\nbody = ''"), 'rules[0].body: requires action = "block" or on_error = "block"'),
        (rule(f"action = 'block'\nbody = '{'a' * 4097}'"), "rules[0].body: expected at most 4096 characters, got 4097"),
        (rule("action = 'log'") * 2, 't.toml:6: rules[1].name: rules[0] already has the name "a"'),
        (
            "rules = [{name = '', when = '', action = 'log'}]",
            "rules[0].name: expected a name of 1 to 100 printable characters",
        ),
        ("rules = [{name = \"a\\n\", when = '', action = 'log'}]", 'printable characters, got "a\\n"'),
        (
            "[[rate_limits]]\nname = 'a'",
            "t.toml:1: rate_limits[0]: a rate limit needs limit or max_tunnels, such as limit",
        ),
        (
            "[[rate_limits]]\nname = 'a'\nmax_tunnels = 1\nblock_for = '1m'",
            "t.toml:4: rate_limits[0].block_for: requires limit",
        ),
        (
            "[[rate_limits]]\nname = 'a'\nmax_tunnels = '1'",
            'max_tunnels: expected a whole number from 1 to 1000000, got "1"',
        ),
        ("lists = 1", "t.toml:1: lists: expected a table such as { partners = "),
        ("lists = {'a b' = 'x'}", 't.toml:1: lists: "a b" is not a valid name of a list'),
        ("lists = {a = 1}", "t.toml:1: lists.a: expected the path of a text file, or an array of entries, got 1"),
        ("lists = {a = ''}", 't.toml:1: lists.a: expected the path of a text file, got ""'),
        ("lists = {a = [1]}", 't.toml:1: lists.a[0]: expected a string such as "10.0.0.0/8", got 1'),
        ("block_addresses = ['@a']", 't.toml:1: block_addresses[0]: there is no list "a"; define it in [lists]'),
        (
            f"lists = {{bots = 'a'}}\n{SITE}allow_addresses = ['@bot']",
            't.toml:4: sites[0].allow_addresses[0]: there is no list "bot"; did you mean "@bots"?',
        ),
        (f"{SITE}block_addresses = ['10.0.0.1/8']", 'block_addresses[0]: "10.0.0.1/8" has bits set after the /8'),
        (f"{SITE}web_origins = ['a.example']", 'web_origins[0]: "a.example" is not a web origin such as'),
        (f"{SITE}web_origins = ['https://a/']", '"https://a/" has a path; a web origin is scheme, host and port'),
        (
            f"{SITE}web_origins = ['app://a/b']",
            '"app://a/b" has more than it may: a web origin is scheme, host and port',
        ),
        (
            f"{SITE}web_origins = ['https://*']",
            '"https://*" would allow every web page; to allow all, leave web_origins out',
        ),
        (f"{SITE}web_origins = ['https://a:65536']", '"65536" in "https://a:65536" is not a port'),
        (f"{SITE}web_origins = ['https://a b']", '"a b" is not a host name'),
        (
            f"{SITE}require_web_origin = true",
            "sites[0].require_web_origin: requires web_origins, such as",
        ),
        (
            f"{SITE}managed_rules = {{}}",
            "t.toml:3: sites[0].managed_rules: no rules are enabled; set owasp_crs = true, or",
        ),
        (
            f"{SITE}managed_rules = {{rules = ''}}",
            "managed_rules.rules: expected the path of a file of rules, or a glob",
        ),
        (f"{SITE}managed_rules = {{crs = 1}}", "expected the path of the folder of a Core Rule Set release, got 1"),
        (
            f"{SITE}managed_rules = {{owasp_crs = true, profiles = ['x']}}",
            'profiles[0]: expected "kubernetes", "signalr", "grafana", "keycloak", "proxmox", "guacamole" or "nextjs"',
        ),
        # Not TOML.
        ("listen = [\n", "t.toml:1: not TOML: "),
        ("a = 1\na = 2", "t.toml:2: not TOML: cannot overwrite a value"),
        ("a = " + "[" * 100_000, "t.toml: arrays or tables are nested too deeply"),
        ("a = " + "1" * 5000, "t.toml: a number has too many digits"),
    ],
)
def test_the_error(text: str, message: str) -> None:
    assert message in refusal(text)


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        decoded(text)
    return list(caught.value.problems)


def test_every_problem_is_reported_in_the_order_of_the_lines() -> None:
    text = """\
listen = ["8443", "127.0.0.1:1", "127.0.0.1:1"]
proxy_protocol = "required"
prosesses = 2
[timeouts]
request = "soon"
close = 3
[[rules]]
when = "true"
action = "skip"
[[sites]]
names = ["a.example", "b example", "c example"]
origins = ["localhost:3000", "localhost", { address = "a:1", weight = 0 }]
cert = "a.pem"
require_web_origin = true
[[sites]]
names = ["d.example"]
origins = []
balance = "random"
max_age_jitter = "1s"
block_addresses = ["@nowhere"]
[[sites]]
names = ["e.example", "d.example"]
origins = ["localhost:3000"]
default = "yes"
"""
    places = [re.sub(r"^t\.toml:|: [^:]* .*$", "", problem) for problem in problems(text)]
    assert places == [
        "1: listen[0]",
        "2: proxy_protocol",
        "3",
        "5: timeouts.request",
        "6: timeouts.close",
        "7: rules[0]",
        "9: rules[0].action",
        "11: sites[0].names[1]",
        "11: sites[0].names[2]",
        "12: sites[0].origins[1]",
        "12: sites[0].origins[2].weight",
        "13: sites[0].cert",
        "14: sites[0].require_web_origin",
        "17: sites[1].origins",
        "18: sites[1].balance",
        "19: sites[1].max_age_jitter",
        "20: sites[1].block_addresses[0]",
        "22: sites[2].names[1]",
        "24: sites[2].default",
    ]


def test_checks_that_depend_on_a_wrong_value_are_skipped() -> None:
    """The key is there, so it is not reported as missing; nor is its default compared with other values."""
    assert len(problems(f"{SITE}cert = 1\nkey = 'a'")) == 1
    assert len(problems(f"{SITE}max_age = 'never'\nmax_age_jitter = '1s'")) == 1
    assert len(problems("[[sites]]\norigins = ['localhost']\norigin_ca = 'a'")) == 1
    assert len(problems("proxy_protocol = 'required'\ntrusted_proxies = ['a']")) == 1
    assert len(problems(f"{SITE}allowed_origins = ['same']\nrequire_web_origin = true")) == 1
    assert len(problems(f"lists = 1\n{SITE}block_addresses = ['@a']")) == 1


def test_the_state_arrives() -> None:
    state = decoded(
        """
        [state]
        url = "valkeys://ledger@counts.example:6380/2"
        password_file = "secrets/valkey"
        prefix = "chat"
        dir = "/var/lib/tlstunnel"
        timeout = "20ms"
        on_failure = "refuse"
        """
    ).state
    assert state == State(
        url=StateURL("valkeys://ledger@counts.example:6380/2"),
        password_file=FOLDER / "secrets/valkey",
        prefix="chat",
        dir=Path("/var/lib/tlstunnel"),
        timeout=Timeout(0.02),
        on_failure="refuse",
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("valkey://host:6379/0", "valkey://host:6379/0"),
        ("redis://:word@host", "redis://host"),
        ("rediss://ada:wo@rd@host:1/2", "rediss://ada@host:1/2"),
        ("valkey+sentinel://:w@a:26379,b:26379/main/0", "valkey+sentinel://a:26379,b:26379/main/0"),
    ],
)
def test_a_url_is_shown_without_its_password(text: str, shown: str) -> None:
    url = StateURL.parse(text)
    assert (str(url), url.text) == (shown, text)
    assert "word" not in repr(url)
    assert url.has_password == (text.partition("://")[2].rpartition("@")[0].find(":") >= 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("url = 'http://host'", 'url: expected a URL such as "valkey://HOST:6379/0", got "http"'),
        ("url = 'host:6379'", 'url: expected a URL such as "valkey://HOST:6379/0", got "host:6379"'),
        ("url = 'x:secret@host'", 'url: expected a URL such as "valkey://HOST:6379/0", got "host"'),
        ("url = 'redis://a:se cret@b'", "of printable ASCII characters without spaces"),
        ("url = 6379", "expected a string such as"),
        ("prefix = '{a}'", 'prefix: expected 1 to 64 letters, digits or one of _ . : -, got "{a}"'),
        ("password_file = 'a'", "password_file: requires url"),
        ("url = 'redis://:a@b'\npassword_file = 'a'", "there is a password in url too; keep one of them"),
        ("timeout = '0s'", "longer than zero"),
        ("on_failure = 'allow'", 'expected "local" or "refuse", got "allow"'),
    ],
)
def test_a_wrong_state_is_refused(text: str, expected: str) -> None:
    (problem,) = problems(f"[state]\n{text}")
    assert expected in problem
    assert "cret" not in problem


def test_a_file_full_of_problems_is_reported_in_part() -> None:
    found = problems("".join(f"key{number} = 1\n" for number in range(200)))
    assert len(found) == MAX_PROBLEMS + 1
    assert found[-1] == f"t.toml: {200 - MAX_PROBLEMS} more problems"


TABLE_TEXTS: dict[type[Table], tuple[str, str]] = {
    Config: ("", ""),
    Timeouts: ("[timeouts]\n", "timeouts: "),
    Release: ("[release]\n", "release: "),
    SiteConfig: (SITE, "sites[0]: "),
    Ejection: (f"{SITE}[sites.ejection]\n", "sites[0].ejection: "),
}


@pytest.mark.parametrize(
    ("table", "old", "new"),
    [(table, old, new) for table in TABLE_TEXTS for old, new in table.renamed.items()],
)
def test_a_renamed_key_is_refused_with_its_new_name(table: type[Table], old: str, new: str) -> None:
    before, place = TABLE_TEXTS[table]
    text = f'{before}{old} = "10s"'
    line = text.count("\n") + 1
    assert problems(text) == [f't.toml:{line}: {place}unknown key "{old}"; it was renamed to "{new}"']
    assert new in table.__struct_fields__
    assert old not in table.__struct_fields__


def test_every_renamed_key_is_known() -> None:
    assert {old: new for table in TABLE_TEXTS for old, new in table.renamed.items()} == {
        "origin_resolve": "resolve_interval",
        "end_removed": "drain_removed",
        "origin_answer": "origin_response",
        "linger": "drain_after",
        "allowed_origins": "web_origins",
        "require_origin": "require_web_origin",
        "origins_mode": "web_origins_mode",
        "verify": "origin_verify",
        "longest": "max_delay",
    }
    assert {table for table in Table.__subclasses__() if table.renamed} == set(TABLE_TEXTS)


@pytest.mark.parametrize("before", ["", "\n# log.opened = 1\n", "log.format = 'text'\nlimits = {}\n"])
@pytest.mark.parametrize("after", ["", "[release]\n\ndrain_over = '1s'", "[[sites]]\nnames = [\n]\n"])
def test_a_value_of_several_lines_is_at_its_first(before: str, after: str) -> None:
    text = f'{before}log.opened = """\n[log]\nopened = 1\n"""\n{after}'
    line = before.count("\n") + 1
    assert refusal(text).startswith(f"t.toml:{line}: log.opened: expected true or false, got ")


def test_the_line_in_a_large_file() -> None:
    sites = [f'[[sites]]\nnames = ["n{number}.example"]\norigins = ["localhost:1"]\n' for number in range(300)]
    sites[123] = sites[123].replace("localhost:1", "localhost")
    assert refusal("".join(sites)).startswith(f"t.toml:{123 * 3 + 3}: sites[123].origins[0]: ")


def test_the_line_in_a_file_with_carriage_returns() -> None:
    text = "[log]\nopened = true\n[timeouts]\nrequest = '1'\nclose = '1s'\n"
    assert refusal(text.replace("\n", "\r\n")).startswith("t.toml:4: timeouts.request: ")


def test_load(tmp_path: Path) -> None:
    file = tmp_path / "tlstunnel.toml"
    file.write_bytes(b"\xef\xbb\xbf" + f"{SITE}cert = 'a.pem'\r\nkey = 'b.pem'\r\n".encode())
    assert load(file).sites[0].cert == tmp_path / "a.pem"


def test_load_refuses(tmp_path: Path) -> None:
    file = tmp_path / "tlstunnel.toml"
    with pytest.raises(ConfigurationError, match=re.escape(f"{file}: cannot be read: No such file or directory")):
        load(file)
    file.write_bytes(b"[log]\n# \xff\n")
    with pytest.raises(ConfigurationError, match=re.escape(f"{file}:2: the file is not UTF-8")):
        load(file)
    file.write_text("log = 1")
    with pytest.raises(ConfigurationError, match=re.escape(f"{file}:1: log: expected a table")):
        load(file)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",\n".join(map(toml, value)) + "]"
    return str(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


TABLES: tuple[type[msgspec.Struct], ...] = (
    *(Config, Timeouts, Limits, Release, Log, State, Admin, Token, SiteConfig),
    *(PlanConfig, Usage, Keep, RepeatedUse, SustainedUse, Disproportion, Busy, Abuse, Notices),
    *(RuleConfig, RateLimitConfig, ManagedRules, SiteManagedRules),
)
KEYS = [name for table in TABLES for name in table.__struct_fields__]
VALUES = [
    "10s",
    "0s",
    "off",
    "json",
    "*",
    "a.example",
    "localhost:3000",
    "127.0.0.1:1",
    "10.0.0.0/8",
    "a.pem",
    "unix:/a",
    "block",
    "log",
    "same",
    "@a",
    "ip",
    "30/minute",
    "valkey://:word@a.example/0",
]
keys = st.one_of(st.sampled_from(KEYS), st.text(max_size=5))
values = st.recursive(
    st.one_of(st.sampled_from(VALUES), st.text(max_size=8), st.integers(), st.booleans(), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=12,
)
fields: dict[str, st.SearchStrategy[Any]] = {
    "listen": st.lists(st.one_of(st.sampled_from(VALUES), values), max_size=3),
    "trusted_proxies": st.lists(st.one_of(st.sampled_from(VALUES), values), max_size=3),
    "timeouts": st.dictionaries(
        st.sampled_from(Timeouts.__struct_fields__), st.one_of(st.sampled_from(VALUES), values)
    ),
    "log": st.dictionaries(st.sampled_from(Log.__struct_fields__), values),
    "state": st.dictionaries(st.sampled_from(State.__struct_fields__), values),
    "plans": st.dictionaries(keys, st.one_of(st.dictionaries(st.sampled_from(PlanConfig.__struct_fields__), values))),
    "usage": st.dictionaries(st.sampled_from(Usage.__struct_fields__), values),
    "lists": st.dictionaries(keys, values, max_size=3),
    "rules": st.lists(st.dictionaries(st.sampled_from(RuleConfig.__struct_fields__), values), max_size=2),
    "rate_limits": st.lists(st.dictionaries(st.sampled_from(RateLimitConfig.__struct_fields__), values), max_size=2),
    "sites": st.lists(
        st.fixed_dictionaries(
            {"origins": st.one_of(st.just(["localhost:3000"]), values)},
            optional={
                **dict.fromkeys(("names", "default", "cert", "key", "other"), values),
                **dict.fromkeys(("web_origins", "block_addresses"), st.lists(values, max_size=2)),
                "managed_rules": st.dictionaries(st.sampled_from(SiteManagedRules.__struct_fields__), values),
                "rules": values,
            },
        ),
        max_size=3,
    ),
}
documents = st.one_of(st.fixed_dictionaries({}, optional=fields), st.dictionaries(keys, values, max_size=5))


@given(document=documents)
def test_no_document_raises_anything_else(document: dict[str, Any]) -> None:
    text = "\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in document.items())
    messages: list[str] = []
    try:
        config = decoded(text)
    except ConfigurationError as error:
        messages.extend(error.problems)
    else:
        assert isinstance(config, Config)
        hash(config)
    for message in messages:
        assert re.match(r"t\.toml:[0-9]+: |t\.toml: [0-9]+ more problems", message)
        assert len(message.splitlines()) == 1


@given(text=st.one_of(st.text(), st.text(alphabet="[]{}=\"'.#\nlogsite 1", max_size=40)))
def test_no_text_raises_anything_else(text: str) -> None:
    try:
        decoded(text)
    except ConfigurationError as error:
        message = str(error)
    else:
        message = ""
    assert len(message.splitlines()) <= 1


def section(heading: str) -> str:
    _, _, rest = DOCUMENTATION.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    return rest.partition("\n## ")[0]


def documented(heading: str) -> dict[str, tuple[str, str]]:
    """Return the default and the reason of each key in a section's table."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]*)\| ([^|]+) \|$", section(heading), re.MULTILINE)
    return {key: (default.strip(), reason) for key, default, reason in rows}


def written(value: object) -> str:
    """Render a default as the documentation does."""
    match value:
        case msgspec.Struct() | Plans():
            return ""
        case None:
            return "none"
        case Duration():
            return f'`"{value}"`'
        case ListenAddress():
            return f'`"{value}"`'
        case tuple() | Networks():
            return f"`{json.dumps(list(value))}`"
        case _:
            return f"`{json.dumps(value)}`"


@pytest.mark.parametrize(
    ("heading", "table"),
    [
        ("The top of the file", Config),
        ("`[timeouts]`", Timeouts),
        ("`[limits]`", Limits),
        ("`[release]`", Release),
        ("`[log]`", Log),
        ("`[state]`", State),
        ("`[admin]`", Admin),
        ("`[[admin.tokens]]`", Token),
        ("`[plans.NAME]`", PlanConfig),
        ("`[usage]`", Usage),
        ("`[usage.keep]`", Keep),
        ("`[usage.repeated]`", RepeatedUse),
        ("`[usage.sustained]`", SustainedUse),
        ("`[usage.disproportionate]`", Disproportion),
        ("`[usage.busy]`", Busy),
        ("`[usage.abuse]`", Abuse),
        ("`[usage.notices]`", Notices),
        ("`[[sites]]`", SiteConfig),
        ("`[[rules]]`", RuleConfig),
        ("`[[rate_limits]]`", RateLimitConfig),
        ("`[managed_rules]`", ManagedRules),
        ("`[sites.managed_rules]`", SiteManagedRules),
        ("`[[sites.certificates]]`", CertificateConfig),
        ("`[[sites.origins]]`", OriginConfig),
        ("`[sites.health]`", Health),
        ("`[sites.ejection]`", Ejection),
        ("`[[sites.routes]]`", RouteConfig),
    ],
)
def test_the_documentation_has_every_key_and_its_default(heading: str, table: type[msgspec.Struct]) -> None:
    found = {field.name: field.default for field in msgspec.structs.fields(table)}
    defaults = {
        name: "required" if default is msgspec.NODEFAULT else written(default) for name, default in found.items()
    }
    exceptions = {"idle": '`"off"`', "max_age": '`"off"`', "origins": "required", "sites": "`[]`"}
    expected = {name: exceptions.get(name, default) for name, default in defaults.items()}
    assert {key: default for key, (default, _) in documented(heading).items()} == expected


def test_every_table_is_documented() -> None:
    tables = {name for name, kind in typing.get_type_hints(Config).items() if isinstance(kind, type(Config))}
    headings = set(re.findall(r"^## `\[+(\w+)\]+`$", DOCUMENTATION.read_text(encoding="utf-8"), re.MULTILINE))
    assert headings == tables | {"admin", "sites", "rules", "rate_limits"}


def test_the_example_of_the_documentation_works() -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```$", section("A complete example"), re.MULTILINE | re.DOTALL)
    config = decoded(example)
    assert len(config.sites) == 2
    for key in KEYS:
        assert re.search(rf"^(?:\[+(?:(?:sites|usage|admin)\.)?{key}(?:\.\w+)?\]+$|{key} = )", example, re.MULTILINE), (
            key
        )
