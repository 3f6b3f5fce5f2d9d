"""The commands about usage survive the way to the process that carries them out, and back."""

import msgspec
import pytest

from tlstunnel.commands.usage import (
    DeliveryStatus,
    MachineUse,
    Muted,
    NoticesResult,
    NoticeStatus,
    Throttled,
    ThrottleSite,
    UsageResult,
)
from tlstunnel.plans.values import Assessment, Notice, Standing

ASSESSMENT = Assessment(site="a.test", standing=Standing.SPIKE, holds=(Standing.SPIKE,), since=1.0, sentence="Why.")
NOTICE = Notice(
    id="notice-1",
    site="a.test",
    standing=Standing.REPEATED,
    created=2.0,
    recipient="contact",
    address="mailto:owner@a.test",
    assessment=ASSESSMENT,
    language="en",
)
DELIVERY = DeliveryStatus(channel="mail", address="owner@a.test", state="accepted", attempts=1, attempted=3.0)
THROTTLED = Throttled(site="a.test", rate="10/second", since=1.0, until=2.0, why="a flood", who="root", abuse=True)


@pytest.mark.parametrize(
    "value",
    [
        UsageResult(
            now=4.0,
            assessed=3.0,
            assessments=(ASSESSMENT,),
            throttles=(THROTTLED,),
            mutes=(Muted("a.test", 9.0, 1.0, "root"),),
            machine=MachineUse(0.5, 0.1, 0.2),
            warnings=("Descriptors run out.",),
        ),
        NoticesResult(now=4.0, notices=(NoticeStatus(notice=NOTICE, accepted=True, deliveries=(DELIVERY,)),)),
        ThrottleSite(site="a.test", rate="10/second", seconds=60.0, why="a flood", addresses=("192.0.2.1/32",)),
    ],
)
def test_values_survive_json(value: msgspec.Struct) -> None:
    assert msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value
    assert msgspec.convert(msgspec.to_builtins(value), type(value)) == value
