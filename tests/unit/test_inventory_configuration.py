"""The configuration as it is served: with defaults, without secrets, and with where its values come from."""

from pathlib import Path

from tlstunnel.addresses import ListenAddress
from tlstunnel.config import decode
from tlstunnel.config.invocation import Invocation
from tlstunnel.inventory.configuration import find_sources, list_arguments, render_configuration

TEXT = """
listen = ["127.0.0.1:8443"]
[timeouts]
idle = "5m"
[state]
url = "valkey://tunnel:secret@localhost:6379/0"
[[sites]]
names = ["a.test"]
origins = ["127.0.0.1:1"]
set_headers = { Authorization = "Bearer secret" }
[[sites]]
names = ["b.test"]
origins = ["127.0.0.1:1"]
http = "pass"
"""


def test_it_has_defaults_and_no_secrets() -> None:
    config = decode(TEXT, Path("/"), "tlstunnel.toml")
    rendered = render_configuration(config, config.sites[:1])
    assert rendered["timeouts"]["idle"] == "5m"
    assert rendered["timeouts"]["request"] == "10s"
    assert [site["names"] for site in rendered["sites"]] == [["a.test"]]
    assert "secret" not in str(rendered)


def test_values_come_from_the_file_or_the_command_line() -> None:
    sources = find_sources(TEXT, ["listen"], [1])
    assert sources["listen"] == "command line"
    assert sources["timeouts.idle"] == sources["sites[1].http"] == "file"
    assert "timeouts.request" not in sources
    assert not any(path.startswith("sites[0]") for path in sources)
    assert find_sources(None, ["sites"], [0]) == {"sites": "command line"}


def test_arguments_that_were_not_given_are_left_out() -> None:
    invocation = Invocation(origin="localhost:3000", listen=(ListenAddress.parse("127.0.0.1:1"),))
    assert list_arguments(invocation) == {"origin": "localhost:3000", "listen": ["127.0.0.1:1"]}
