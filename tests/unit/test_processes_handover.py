"""What one program hands to the next, and how it is started."""

import json
import os
import sys
from pathlib import Path

import pytest

from tlstunnel import __version__
from tlstunnel.errors import ProcessError
from tlstunnel.processes.handover import FORMAT, VARIABLE, Handover
from tlstunnel.program import module_command, module_environment, starting_command

STATE = Handover(
    version="1.2.3",
    generation=4,
    slots={"next": 2, "open": [{"number": 1, "fd": 7, "written": "[::]:443"}], "passed": []},
    children=[{"pid": 1, "place": 1, "generation": 4, "version": "1", "started": 1.5, "finishing": False, "link": 8}],
    control_socket={"path": "/run/x", "fd": 9, "lock": 10},
    echo={"port": 1, "pid": 2, "pipe": 11},
    client=12,
)


def _given(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    file = os.memfd_create("test")
    os.write(file, text)
    monkeypatch.setenv(VARIABLE, str(file))


def test_the_next_gets_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(STATE.passed_on()))
    assert Handover.received() == STATE
    assert VARIABLE not in os.environ
    assert STATE.descriptors() == [7, 8, 9, 10, 11, 12]
    monkeypatch.setenv(VARIABLE, str(STATE.passed_on(probe=5)))
    found = Handover.received()
    assert found is not None
    assert found.probe == 5


def test_nothing_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Handover.received() is None


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _given(monkeypatch, json.dumps({"format": FORMAT + 1, "something": "else"}).encode())
    with pytest.raises(ProcessError, match=f"hands over in format {FORMAT + 1}, and {__version__} knows {FORMAT}"):
        Handover.received()


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", json.dumps({"format": FORMAT}).encode()])
def test_what_is_no_handover_is_refused(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    _given(monkeypatch, text)
    with pytest.raises(ProcessError, match="unset it"):
        Handover.received()


@pytest.mark.parametrize("value", ["x", "99999", "-1"])
def test_a_variable_that_somebody_else_has_set(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ProcessError, match="unset it"):
        Handover.received()


# --- how it was started -----------------------------------------------------------------------------------------------


def test_a_link_on_the_way_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "one" / "bin"
    real.mkdir(parents=True)
    (real / "tlstunnel").write_text("#!/bin/sh\n")
    (real / "tlstunnel").chmod(0o755)
    (tmp_path / "current").symlink_to("one")
    for argument, folder in (
        (str(tmp_path / "current" / "bin" / "tlstunnel"), Path("/")),
        ("current/bin/tlstunnel", tmp_path),
        ("bin/tlstunnel", tmp_path / "current"),
    ):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PWD", str(folder))
        monkeypatch.setattr(sys, "argv", [argument, "start", "--x"])
        assert starting_command() == [str(tmp_path / "current" / "bin" / "tlstunnel"), "start", "--x"]


def test_a_module_is_started_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/tlstunnel/__main__.py", "start"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "tlstunnel", "start"])
    assert starting_command() == [sys.executable, "-X", "dev", "-m", "tlstunnel", "start"]


def test_children_run_this_package() -> None:
    import tlstunnel  # noqa: PLC0415

    assert Path(module_command("name")[0]).samefile(sys.executable)
    folder = Path(tlstunnel.__file__).resolve().parent.parent
    path = module_environment().get("PYTHONPATH", "").split(os.pathsep)
    assert str(folder) in path or folder.name in {"site-packages", "dist-packages"}
