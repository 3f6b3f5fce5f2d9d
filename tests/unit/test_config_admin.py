"""The table `[admin]`: what may be served where, and to whom."""

from pathlib import Path

import pytest

from tlstunnel.addresses import ListenAddress
from tlstunnel.config import Config, decode
from tlstunnel.config.admin import Admin, is_local
from tlstunnel.config.invocation import Invocation
from tlstunnel.config.together import keeps_history
from tlstunnel.errors import ConfigurationError

TLS = 'cert = "a.pem"\nkey = "a.key"\n'
TOKEN = '[[admin.tokens]]\nname = "alice"\nfile = "alice"\n'


def admin(text: str) -> Admin:
    found = decode(f"[admin]\n{text}", Path("/etc"), "t.toml").admin
    assert found is not None
    return found


def refusal(text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        admin(text)
    return str(caught.value)


def test_without_the_table_nothing_is_served() -> None:
    assert Config().admin is None
    assert decode("", Path("/etc"), "t.toml").admin is None


def test_an_empty_table_serves_on_loopback() -> None:
    assert admin("") == Admin()
    assert str(Admin().listen) == "127.0.0.1:9180"
    assert Admin().is_local


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/a.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("tunnel.example:1", False),
        ("localhost.example:1", False),
    ],
)
def test_which_addresses_only_this_machine_reaches(address: str, local: bool) -> None:
    assert is_local(ListenAddress.parse(address)) is local


@pytest.mark.parametrize("rest", ["", TLS, TOKEN])
def test_another_address_requires_tls_and_somebody_to_let_in(rest: str) -> None:
    assert "admin.listen: 0.0.0.0:9180 requires TLS" in refusal(f'listen = "0.0.0.0:9180"\n{rest}')


@pytest.mark.parametrize("rest", [TLS + TOKEN, TLS + 'client_ca = "ca.pem"\n'])
def test_another_address_with_both(rest: str) -> None:
    assert not admin(f'listen = "0.0.0.0:9180"\n{rest}').is_local


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('cert = "a"', "admin.cert: requires the other one of cert and key"),
        ('key = "a"', "admin.key: requires the other one of cert and key"),
        ('client_ca = "a"', "admin.client_ca: requires cert and key"),
        (f'listen = "unix:/a"\n{TLS}', "admin.cert: a Unix socket is served without TLS"),
        (TOKEN + TOKEN, 'admin.tokens[1].name: "alice" is the name of another token too'),
        ('[[admin.tokens]]\nname = "a b"\nfile = "a"', "admin.tokens[0].name: expected 1 to 64 letters"),
        ('[[admin.tokens]]\nname = "a"', "admin.tokens[0]: the key file is missing"),
        ('hosts = ["a:1"]', "admin.hosts[0]: expected a host name without a port"),
        ('hosts = ["https://a"]', "admin.hosts[0]: expected a host name"),
        ("metric_sites = -1", "admin.metric_sites: expected a whole number"),
    ],
)
def test_what_does_not_fit_together(text: str, reason: str) -> None:
    assert reason in refusal(text)


def test_hosts_are_compared_in_lower_case() -> None:
    assert admin('hosts = ["Tunnel.Example.com", "[::FF]"]').hosts == ("tunnel.example.com", "[::ff]")


def test_the_command_line_overrides_the_address_and_goes_to_other_processes() -> None:
    address = ListenAddress.parse("127.0.0.1:7")
    invocation = Invocation(file=Path("t.toml"), admin=address)
    config = Invocation.from_json(invocation.as_json()).configuration("[admin]\nmetric_sites = 3")
    assert config.admin == Admin(listen=address, metric_sites=3)
    assert Invocation(admin=address).configuration(None).admin == Admin(listen=address)


def test_the_command_line_does_not_override_what_an_address_requires() -> None:
    invocation = Invocation(admin=ListenAddress.parse("0.0.0.0:7"))
    with pytest.raises(ConfigurationError, match=r"--admin: 0\.0\.0\.0:7 requires TLS"):
        invocation.configuration(None)


def test_earlier_releases_write_no_address() -> None:
    fields = Invocation().as_json()
    del fields["admin"]
    assert Invocation.from_json(fields).admin is None


def test_the_dashboard_has_a_history() -> None:
    assert not keeps_history(Config(), {})
    assert keeps_history(Config(admin=Admin()), {})
