"""Commands can be sent as JSON, and so can their results."""

import msgspec
import pytest

from tlstunnel.commands.catalogue import COMMANDS, parse_command
from tlstunnel.commands.command import AnyCommand
from tlstunnel.commands.usage import Usage
from tlstunnel.errors import ControlError


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_command_and_its_result_have_a_schema(command: type[AnyCommand]) -> None:
    assert msgspec.json.schema(command)
    assert msgspec.json.schema(command.result)


def test_a_command_is_parsed_by_its_name() -> None:
    assert parse_command("usage", {"site": "a.test"}) == Usage(site="a.test")


def test_an_unknown_command_and_wrong_fields_are_refused() -> None:
    with pytest.raises(ControlError, match="unknown command: nothing"):
        parse_command("nothing", {})
    with pytest.raises(ControlError, match=r"invalid request: .*`\$\.site`"):
        parse_command("usage", {"site": 1})
