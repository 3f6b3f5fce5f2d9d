"""``tlstunnel reload``: its output and its exit status, with a real control socket."""

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tlstunnel.cli import main
from tlstunnel.errors import ControlError
from tlstunnel.processes.control import ControlSocket


def reloaded(path: Path, answer: Mapping[str, Any] | ControlError, *options: str) -> int:
    """Return the exit status of the command, with a tunnel that sends this response."""

    async def handler(_: Mapping[str, Any], __: int) -> Mapping[str, Any]:
        if isinstance(answer, ControlError):
            raise answer
        return answer

    async def run() -> int:
        server = ControlSocket.bind(path)
        await server.serve({"reload": handler})
        try:
            return await asyncio.to_thread(status, "--control", str(path), *options)
        finally:
            await server.close()

    return asyncio.run(run())


def status(*options: str) -> int:
    before, sys.argv = sys.argv, ["tlstunnel", "reload", *options]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def test_a_line_for_each_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["timeouts.idle: off -> 15m", "site a.example: added"]
    assert reloaded(tmp_path / "c.sock", {"changes": changes}) == 0
    assert capsys.readouterr() == ("timeouts.idle: off -> 15m\nsite a.example: added\n", "")


def test_nothing_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reloaded(tmp_path / "c.sock", {"changes": []}) == 0
    assert capsys.readouterr() == ("nothing has changed\n", "")


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reloaded(tmp_path / "c.sock", {"changes": ["a"]}, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "changes": ["a"]}


def test_a_file_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = 'nothing was changed: t.toml:3: listen[0]: "x" names no port'
    assert reloaded(tmp_path / "c.sock", ControlError(reason)) == 1
    assert capsys.readouterr() == ("", f"tlstunnel: {reason}\n")


def test_a_line_for_each_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = ControlError("nothing was changed: t.toml:3: a", "t.toml:4: b")
    assert reloaded(tmp_path / "c.sock", error) == 1
    assert capsys.readouterr() == ("", "tlstunnel: nothing was changed: t.toml:3: a\ntlstunnel: t.toml:4: b\n")
    assert reloaded(tmp_path / "c.sock", error, "--json") == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"] == "nothing was changed: t.toml:3: a; t.toml:4: b"
    assert answer["problems"] == ["nothing was changed: t.toml:3: a", "t.toml:4: b"]


def test_no_tunnel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    assert status() == 1
    assert capsys.readouterr().err.startswith(f"tlstunnel: no running tunnel has a control socket in {tmp_path};")
