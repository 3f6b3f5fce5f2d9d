"""A serving process carries out the commands that it knows, and refuses others."""

import asyncio

import pytest

from tlstunnel.commands.usage import Released, ReleaseSite
from tlstunnel.errors import ControlError
from tlstunnel.processes.answers.dispatch import Answers


async def release(command: ReleaseSite, who: str) -> Released:
    return Released(f"{command.site} for {who}", 2)


def test_a_command_is_carried_out() -> None:
    answers = Answers({ReleaseSite: release})
    fields = asyncio.run(answers.carry_out("release", {"site": "a.test"}, "alice"))
    assert fields == {"site": "a.test for alice", "throttles": 2}


@pytest.mark.parametrize("name", ["reload", "unknown"])
def test_other_commands_are_refused(name: str) -> None:
    with pytest.raises(ControlError, match=name):
        asyncio.run(Answers({ReleaseSite: release}).carry_out(name, {}, "alice"))
