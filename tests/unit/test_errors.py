"""The errors that a user can correct: one problem or several, and how they are printed."""

import pickle

import pytest

from tlstunnel import cli
from tlstunnel.errors import ConfigurationError, ListenError


def test_one_problem() -> None:
    error = ConfigurationError("a")
    assert error.problems == ("a",)
    assert str(error) == "a"


def test_several_problems() -> None:
    error = ConfigurationError("a", "b", "c")
    assert error.problems == ("a", "b", "c")
    assert str(error) == "a; b; c"


def test_problems_survive_pickling() -> None:
    assert pickle.loads(pickle.dumps(ConfigurationError("a", "b"))).problems == ("a", "b")


def test_every_error_lists_its_problems() -> None:
    assert ListenError("a").problems == ("a",)


def test_the_command_line_prints_a_line_for_each_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise ConfigurationError("a", "b")

    monkeypatch.setattr(cli, "cli", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "tlstunnel: a\ntlstunnel: b\n"
