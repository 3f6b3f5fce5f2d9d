"""The handover to the next program, and how that is started."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tlstunnel import __version__
from tlstunnel.errors import ProcessError
from tlstunnel.origins.embedded import EchoHandover
from tlstunnel.processes import previous
from tlstunnel.processes.children import ChildHandover, Identity, Role
from tlstunnel.processes.control import ControlHandover
from tlstunnel.processes.handover import REFUSAL, VARIABLE, Handover
from tlstunnel.processes.messages import FORMAT
from tlstunnel.processes.slots import SlotHandover, SlotsHandover
from tlstunnel.program import build_module_command, build_module_environment, find_starting_command

STATE = Handover(
    version="1.2.3",
    generation=4,
    slots=SlotsHandover(next=2, open=[SlotHandover(number=1, fd=7, written="[::]:443")], passed=[]),
    children=[ChildHandover(Identity(Role.SERVING, 1, 4, "1", FORMAT, 1.5), pid=1, draining=True, link=8)],
    control_socket=ControlHandover(path="/run/x\udcff", fd=9, lock=10),
    echo=EchoHandover(port=1, pid=2, pipe=11),
    client=12,
    config="listen = []",
    instance="d6a3",
)

PREVIOUS: dict[str, Any] = {
    "format": 2,
    "version": "1.2.3",
    "generation": 4,
    "slots": {"next": 2, "open": [{"number": 1, "fd": 7, "written": "[::]:443"}], "passed": []},
    "children": [
        {
            "identity": {
                "role": "serving",
                "place": 1,
                "generation": 4,
                "version": "1",
                "format": FORMAT,
                "started": 1.5,
            },
            "pid": 1,
            "draining": True,
            "link": 8,
            "metrics": None,
            "pulse": None,
            "stacks": None,
        }
    ],
    "control_socket": {"path": "/run/x\udcff", "fd": 9, "lock": 10},
    "echo": {"port": 1, "pid": 2, "pipe": 11},
    "client": 12,
    "config": "listen = []",
    "metrics": None,
    "instance": "d6a3",
    "probe": None,
}
"""The same handover in format 2."""


def _hand_over(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    file = os.memfd_create("test")
    os.write(file, text)
    monkeypatch.setenv(VARIABLE, str(file))


def test_the_next_program_receives_the_handover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(STATE.write(FORMAT)))
    assert Handover.receive() == STATE
    assert VARIABLE not in os.environ
    assert STATE.list_descriptors() == [7, 8, 9, 10, 11, 12]
    monkeypatch.setenv(VARIABLE, str(STATE.write(FORMAT, probe=5)))
    found = Handover.receive()
    assert found is not None
    assert found.probe == 5


def test_the_previous_format_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    _hand_over(monkeypatch, json.dumps(PREVIOUS).encode())
    found = Handover.receive()
    assert found is not None
    assert found == STATE


def test_the_previous_format_is_written_without_the_ledger() -> None:
    ledger = ChildHandover(Identity(Role.LEDGER, 1, 4, "1", FORMAT, 1.5), pid=2, draining=False, link=13)
    state = msgspec.structs.replace(STATE, children=[ledger, *STATE.children])
    with os.fdopen(state.write(previous.FORMAT), "rb") as file:
        assert json.load(file) == PREVIOUS


def test_without_a_handover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Handover.receive() is None


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _hand_over(monkeypatch, json.dumps({"format": FORMAT + 1, "something": "else"}).encode())
    with pytest.raises(ProcessError, match=f"{REFUSAL} {FORMAT + 1}, and {__version__} supports 2 and {FORMAT}"):
        Handover.receive()


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"\xff", b'{"format": 2}', b'{"format": 2, "children": [{}]}', b'{"format": 3}'],
)
def test_an_invalid_handover_is_refused(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    _hand_over(monkeypatch, text)
    with pytest.raises(ProcessError, match="unset it"):
        Handover.receive()


@pytest.mark.parametrize("value", ["x", "99999", "-1"])
def test_an_invalid_environment_variable_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ProcessError, match="unset it"):
        Handover.receive()


# --- how the program was started --------------------------------------------------------------------------------------


def test_symbolic_links_in_the_command_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert find_starting_command() == [str(tmp_path / "current" / "bin" / "tlstunnel"), "start", "--x"]


def test_a_module_is_started_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/tlstunnel/__main__.py", "start"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "tlstunnel", "start"])
    assert find_starting_command() == [sys.executable, "-X", "dev", "-m", "tlstunnel", "start"]


def test_children_run_this_package() -> None:
    import tlstunnel  # noqa: PLC0415

    assert Path(build_module_command("name")[0]).samefile(sys.executable)
    folder = Path(tlstunnel.__file__).resolve().parent.parent
    path = build_module_environment().get("PYTHONPATH", "").split(os.pathsep)
    assert str(folder) in path or folder.name in {"site-packages", "dist-packages"}
