"""What all commands have in common.

Tested by tests/unit/test_commands.py.
"""

from typing import Any, ClassVar, Generic, TypeVar

import msgspec

ResultT = TypeVar("ResultT", bound=msgspec.Struct)


class Command(msgspec.Struct, Generic[ResultT], frozen=True):
    """Something that a running tunnel is to do.

    `name` is what it is called on the control socket, and `result` is the type of its result. A command that `acts`
    changes something: it needs more rights than one that only reports, and who has given it is logged.
    """

    name: ClassVar[str]
    result: ClassVar[type[msgspec.Struct]]
    acts: ClassVar[bool] = False


AnyCommand = Command[Any]
