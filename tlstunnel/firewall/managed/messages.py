"""The messages between the tunnel and a helper: one msgpack value per packet of a SOCK_SEQPACKET socket pair.

Packets keep their boundaries, so a killed helper cannot leave half a message.

Tested by tests/unit/test_firewall_managed_helper.py.
"""

import msgspec

from tlstunnel.handshake.refusal import Fields


class RuleSource(msgspec.Struct, frozen=True, omit_defaults=True):
    """A source of a rule set: a text of the tunnel, or the absolute path of a file. One of them is set."""

    text: str = ""
    file: str = ""


class RuleSet(msgspec.Struct, frozen=True):
    """All that a site's managed rules load, in order. Equal rule sets have equal names."""

    name: str
    sources: tuple[RuleSource, ...]


class Subject(msgspec.Struct, frozen=True, array_like=True):
    """What is evaluated: the client's address, the method, and the target and fields as sent."""

    ip: str
    target: bytes
    fields: Fields
    method: str = "GET"


class EvaluationRequest(msgspec.Struct, frozen=True, array_like=True):
    """Evaluate a subject with the rule set of that index, in the order in which they were sent at the start."""

    number: int
    rule_set: int
    subject: Subject


class Match(msgspec.Struct, frozen=True, array_like=True):
    """A rule that matched. `data`, and in some rules `message`, quote what the client sent.

    `severity` is 0 (emergency) to 7 (debug); CRS uses 2 (critical, 5 points) to 5 (notice, 2 points).
    """

    id: int
    message: str
    severity: int
    data: str


class Evaluation(msgspec.Struct, frozen=True, array_like=True):
    """The result of the rules: the anomaly score, and the rules that matched.

    `denied_by` is the rule that denied the request by itself, whatever the score, with `status`. It is 0 if none did.
    """

    score: int
    matches: tuple[Match, ...] = ()
    denied_by: int = 0
    status: int = 0


class RulesLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    """All rule sets are loaded, or `problem` says in a sentence why one cannot be loaded."""

    problem: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """A new child, with this process id, is ready for requests. Earlier requests are lost."""

    pid: int


class EvaluationResult(msgspec.Struct, frozen=True, tag="answer"):
    """The result of the request of that number. After the `last` one the child exits, and the next sends `Ready`."""

    number: int
    evaluation: Evaluation
    last: bool = False


FromHelper = RulesLoaded | Ready | EvaluationResult
END_OF_RULES = b"\xc0"
"""msgpack's nil, which follows the rule sets at the start."""

MAX_PACKET = 131_072
"""Bytes. The kernel's default buffer holds 200 KiB. A request has at most the client's head, 16 KiB."""
