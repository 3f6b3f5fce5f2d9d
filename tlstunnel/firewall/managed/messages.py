"""What the tunnel and a helper say to each other: one msgpack value a packet of a SOCK_SEQPACKET socket pair.

Packets keep their bounds, so there is no framing that a killed helper could leave half written.
"""

import msgspec

from tlstunnel.handshake.refusal import Fields


class RuleSource(msgspec.Struct, frozen=True, omit_defaults=True):
    """A part of a rule set, loaded in order: a text of ours, or the absolute path of a file. One of them is set."""

    text: str = ""
    file: str = ""


class RuleSet(msgspec.Struct, frozen=True):
    """Everything that one site's policy loads. Equal policies have equal names."""

    name: str
    sources: tuple[RuleSource, ...]


class Subject(msgspec.Struct, frozen=True, array_like=True):
    """What is judged: the client's address, the method, and the target and fields as sent."""

    ip: str
    target: bytes
    fields: Fields
    method: str = "GET"


class EvaluationRequest(msgspec.Struct, frozen=True, array_like=True):
    """Judge a subject by the rule set of that number, in the order in which they were sent at the start."""

    number: int
    rule_set: int
    subject: Subject


class Match(msgspec.Struct, frozen=True, array_like=True):
    """A rule that matched. `data`, and in some rules `message`, quote the client.

    `severity` is 0 (emergency) to 7 (debug); CRS uses 2 (critical, 5 points) to 5 (notice, 2 points).
    """

    id: int
    message: str
    severity: int
    data: str


class Evaluation(msgspec.Struct, frozen=True, array_like=True):
    """What the rules say: the anomaly score, and the rules that matched.

    `denied_by` is the rule that refused by itself, without regard to a score, with the status `status`; 0 when none
    did.
    """

    score: int
    matches: tuple[Match, ...] = ()
    denied_by: int = 0
    status: int = 0


class RulesLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    """Every rule set is loaded, or `problem` says in a sentence why one cannot be."""

    problem: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """A new evaluating process takes questions; what was asked before is forgotten."""

    pid: int


class EvaluationResult(msgspec.Struct, frozen=True, tag="answer"):
    """To the question of that number. After a `last` one the process ends, and a `Ready` of the next follows."""

    number: int
    evaluation: Evaluation
    last: bool = False


FromHelper = RulesLoaded | Ready | EvaluationResult
END_OF_RULES = b"\xc0"
"""msgpack's nil: what follows the rule sets at the start."""

MAX_PACKET = 131_072
"""Bytes; the kernel's default buffer takes 200 KiB. A question has at most a request's head, 16 KiB."""
