"""The two tasks of a helper, loading and serving, over a real socket pair. Its process is in the promises."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.corpus.managed_rules import own_rules, require_libmodsecurity, subject
from tlstunnel.firewall.managed import helper
from tlstunnel.firewall.managed.messages import (
    END_OF_RULES,
    MAX_PACKET,
    EvaluationRequest,
    EvaluationResult,
    FromHelper,
    Ready,
    RuleSet,
    RulesLoaded,
    RuleSource,
)
from tlstunnel.firewall.managed.modsecurity import ModSecurity
from tlstunnel.firewall.managed.rule_sets import build

RULES = 'SecRule ARGS:x "@streq a" "id:1,phase:2,deny"\n'


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(15)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(scope="module")
def library() -> ModSecurity:
    require_libmodsecurity()
    return ModSecurity()


def heard(ours: socket.socket) -> FromHelper:
    message: FromHelper = msgspec.msgpack.decode(ours.recv(MAX_PACKET), type=FromHelper)
    return message


def ask(ours: socket.socket, number: int, target: str) -> None:
    ours.sendall(msgspec.msgpack.encode(EvaluationRequest(number, 0, subject(target))))


def test_load_and_serve(pair: tuple[socket.socket, socket.socket], library: ModSecurity, tmp_path: Path) -> None:
    ours, theirs = pair
    for rule_set in (build(own_rules(tmp_path, RULES)), RuleSet("off", (RuleSource(text="SecRuleEngine Off\n"),))):
        ours.sendall(msgspec.msgpack.encode(rule_set))
    ours.sendall(END_OF_RULES)
    loaded = helper.load(theirs, library)
    assert heard(ours) == RulesLoaded()
    assert loaded is not None
    assert len(loaded[1]) == 2

    ask(ours, 1, "/?x=a")  # a predecessor's, forgotten
    again: list[bool] = []
    server = threading.Thread(target=lambda: again.append(helper.serve(theirs, library, loaded[1], 3)))
    server.start()
    assert isinstance(heard(ours), Ready)
    answers = []
    for number, target in ((7, "/?x=a"), (8, "/?x=b"), (9, "/?x=a")):
        ask(ours, number, target)
        answers.append(heard(ours))
    server.join(15)
    assert again == [True]
    found = [(r.number, r.evaluation.denied_by, r.last) for r in answers if isinstance(r, EvaluationResult)]
    assert found == [(7, 1, False), (8, 0, False), (9, 1, True)]


def test_serving_ends_with_the_socket(pair: tuple[socket.socket, socket.socket], library: ModSecurity) -> None:
    ours, theirs = pair
    ours.shutdown(socket.SHUT_WR)
    assert not helper.serve(theirs, library, (), 3)
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with second:
        ended: list[bool] = []
        server = threading.Thread(target=lambda: ended.append(helper.serve(second, library, (), 3)))
        server.start()
        first.settimeout(15)
        assert isinstance(heard(first), Ready)
        first.close()
        server.join(15)
        assert ended == [False]


def test_load_error_is_reported(pair: tuple[socket.socket, socket.socket], library: ModSecurity) -> None:
    ours, theirs = pair
    ours.sendall(msgspec.msgpack.encode(RuleSet("bad", (RuleSource(text="SecNonsense\n"),))))
    ours.sendall(END_OF_RULES)
    assert helper.load(theirs, library) is None
    said = heard(ours)
    assert isinstance(said, RulesLoaded)
    assert "libmodsecurity cannot load it" in said.problem


def test_loading_ends_with_the_socket(pair: tuple[socket.socket, socket.socket], library: ModSecurity) -> None:
    ours, theirs = pair
    ours.shutdown(socket.SHUT_WR)
    assert helper.load(theirs, library) is None
