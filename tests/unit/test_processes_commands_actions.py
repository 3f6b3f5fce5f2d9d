"""What is logged of an action has addresses of clients only as they may be shown."""

import pytest
from structlog.testing import capture_logs

from tlstunnel.commands.tunnels import EndTunnels, Tunnels
from tlstunnel.commands.usage import ThrottleSite
from tlstunnel.errors import ControlError
from tlstunnel.journal.style import Style
from tlstunnel.processes.commands.actions import log_action


def test_addresses_are_written_as_configured() -> None:
    show = Style(address="prefix").show_network
    throttle = ThrottleSite(
        site="a.test", rate="1/second", seconds=9.0, why="a flood", addresses=("192.0.2.1/32", "198.51.100.7/32")
    )
    with capture_logs() as logs:
        with log_action(EndTunnels(client="192.0.2.77"), "alice", "HTTP", show):
            pass
        with log_action(throttle, "alice", "HTTP", show):
            pass
    assert logs[0]["fields"]["client"] == "192.0.2.0/24"
    assert logs[1]["fields"]["addresses"] == "('192.0.2.0/24', '198.51.100.0/24')"


def test_a_refusal_is_logged_and_what_only_reports_is_not() -> None:
    with capture_logs() as logs, pytest.raises(ControlError), log_action(EndTunnels(id="x"), "bob", "control socket"):
        raise ControlError("no")
    assert [(one["result"], one["reason"], one["who"]) for one in logs] == [("refused", "no", "bob")]
    with capture_logs() as logs, log_action(Tunnels(), "bob", "HTTP"):
        pass
    assert not logs
