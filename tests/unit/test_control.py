"""The control socket: both sides, over a real socket."""

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tlstunnel.errors import ControlError
from tlstunnel.processes import control, reach
from tlstunnel.processes.control import (
    MAX_LINE,
    ControlSocket,
    Handler,
    default_path,
)
from tlstunnel.processes.reach import find_control_socket, send_command

T = TypeVar("T")


async def reload(request: Mapping[str, Any], _: int) -> Mapping[str, Any]:
    return {"changes": [str(request.get("more", ""))]}


async def refuse(_: Mapping[str, Any], __: int) -> Mapping[str, Any]:
    raise ControlError("nothing was changed: no")


HANDLERS: Mapping[str, Handler] = {"reload": reload, "refuse": refuse}


def served(path: Path, use: Callable[[], T], handlers: Mapping[str, Handler] = HANDLERS) -> T:
    """Return the result of `use`, which runs in a thread while a control socket is served at `path`."""

    async def run() -> T:
        return await beside(path, lambda: asyncio.to_thread(use), handlers)

    return asyncio.run(run())


async def beside(path: Path, use: Callable[[], Awaitable[T]], handlers: Mapping[str, Handler] = HANDLERS) -> T:
    server = ControlSocket.bind(path)
    await server.serve(handlers)
    try:
        return await use()
    finally:
        await server.close()


def raw(path: Path, sent: bytes) -> dict[str, Any]:
    """Send these bytes; return the response, after which the connection must end."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        with contextlib.suppress(BrokenPipeError):  # it may have responded and closed, without reading
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as stream:
            answer: dict[str, Any] = json.loads(stream.readline())
            assert stream.read() == b""
    return answer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty default folder of control sockets."""
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(reach, "SYSTEM_FOLDER", tmp_path / "system")
    return tmp_path


def test_a_request_and_its_response(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    request = {"do": "reload", "more": "grüße"}
    assert served(path, lambda: send_command(path, request)) == {"ok": True, "changes": ["grüße"]}


def test_the_response_comes_when_the_command_is_done(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"

    async def run() -> None:
        may_end = asyncio.Event()

        async def slow(_: Mapping[str, Any], __: int) -> Mapping[str, Any]:
            await may_end.wait()
            return {}

        async def use() -> None:
            pending = asyncio.create_task(asyncio.to_thread(send_command, path, {"do": "slow"}))
            # Another client is served meanwhile.
            assert (await asyncio.to_thread(send_command, path, {"do": "reload"}))["ok"]
            assert not pending.done()
            may_end.set()
            assert await pending == {"ok": True}

        await beside(path, use, {**HANDLERS, "slow": slow})

    asyncio.run(run())


def test_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    assert served(path, lambda: raw(path, b'{"do": "refuse"}\n')) == {"ok": False, "error": "nothing was changed: no"}
    with pytest.raises(ControlError, match=r"^nothing was changed: no$"):
        served(path, lambda: send_command(path, {"do": "refuse"}))


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b'{"do": "relaod"}\n', 'unknown command "relaod"; did you mean "reload"?'),
        (b'{"do": "x\\u001b"}\n', 'unknown command "x\\x1b"; the commands are refuse, reload'),
        (b'{"do": 1}\n', 'expected an object with "do"'),
        (b"{}\n", 'expected an object with "do"'),
        (b"[]\n", 'expected an object with "do"'),
        (b"reload\n", "expected one JSON object"),
        (b"\xff\n", "expected one JSON object"),
        (b"\n", "expected one JSON object"),
        (b"", "expected one JSON object"),
        (b"[" * (MAX_LINE - 1) + b"\n", "expected one JSON object"),
        (b'"' + b"x" * MAX_LINE + b'"\n', f"of at most {MAX_LINE} bytes"),
    ],
)
def test_invalid_requests(tmp_path: Path, sent: bytes, said: str) -> None:
    path = tmp_path / "c.sock"
    answer = served(path, lambda: raw(path, sent))
    assert answer["ok"] is False
    assert said in answer["error"]


def test_a_silent_client_is_disconnected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "FIRST_LINE_SECONDS", 0.05)
    path = tmp_path / "c.sock"

    def use() -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(path))
            return sock.recv(1)

    assert served(path, use) == b""


def test_the_number_of_clients_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_CLIENTS", 1)
    path = tmp_path / "c.sock"

    async def run() -> None:
        entered, may_end = asyncio.Event(), asyncio.Event()

        async def slow(_: Mapping[str, Any], __: int) -> Mapping[str, Any]:
            entered.set()
            await may_end.wait()
            return {}

        async def use() -> None:
            pending = asyncio.create_task(asyncio.to_thread(send_command, path, {"do": "slow"}))
            await entered.wait()
            assert (await asyncio.to_thread(raw, path, b""))["error"] == "more than 1 clients at once"
            may_end.set()
            assert (await pending)["ok"]

        await beside(path, use, {"slow": slow})

    asyncio.run(run())


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_only_its_user_may_connect(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "new" / "c.sock"
    before = os.umask(mask)
    try:
        modes = served(path, lambda: (path.stat().st_mode, path.parent.stat().st_mode))
    finally:
        os.umask(before)
    assert [stat.S_IMODE(mode) for mode in modes] == [0o600, 0o700]


def test_the_socket_is_removed_and_the_lock_released(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    for _ in range(2):
        assert served(path, path.is_socket)
        assert not path.exists()


def test_a_second_start_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"

    async def run() -> None:
        async def use() -> dict[str, Any]:
            with pytest.raises(ControlError, match=f"{path}: another tunnel has this control socket"):
                ControlSocket.bind(path)
            return await asyncio.to_thread(send_command, path, {"do": "reload"})

        assert (await beside(path, use))["ok"]  # the first one continues

    asyncio.run(run())


def test_the_socket_of_a_dead_tunnel_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    path.with_name("c.sock.lock").touch()
    assert served(path, lambda: send_command(path, {"do": "reload"}))["ok"]


def test_no_other_user_can_lock_it(tmp_path: Path) -> None:
    lock = tmp_path / "c.sock.lock"
    lock.touch(0o644)  # as earlier releases created it
    served(tmp_path / "c.sock", lambda: None)
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    before = os.umask(0)
    try:
        served(tmp_path / "new.sock", lambda: None)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.sock.lock").stat().st_mode) == 0o600


def test_a_lock_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "c.sock.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ControlError, match=r"c\.sock\.lock: is a symbolic link"):
        ControlSocket.bind(tmp_path / "c.sock")
    assert not (tmp_path / "precious").exists()
    os.mkfifo(tmp_path / "d.sock.lock")
    with pytest.raises(ControlError, match=r"d\.sock\.lock: is not a file of this user"):
        ControlSocket.bind(tmp_path / "d.sock")


def test_another_kind_of_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    path.write_text("mine")
    with pytest.raises(ControlError, match="exists and is not a socket"):
        ControlSocket.bind(path)
    assert path.read_text() == "mine"


def test_the_file_of_another_program_is_kept_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"

    async def run() -> None:
        async def replace() -> None:
            path.unlink()
            path.write_text("another's")

        await beside(path, replace)

    asyncio.run(run())
    assert path.read_text() == "another's"


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="longer than the 107 bytes"):
        ControlSocket.bind(tmp_path / ("x" * 107))


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ControlError, match="choose another with --control"):
        ControlSocket.bind(tmp_path / "file" / "c.sock")


@pytest.mark.parametrize(
    ("runtime", "session", "found"),
    [
        ("/run/a:/run/b", "/run/user/7", "/run/a/control-8443.sock"),
        ("", "/run/user/7", "/run/user/7/tlstunnel/control-8443.sock"),
        ("", "", "/run/tlstunnel/control-8443.sock"),
    ],
)
def test_the_default_path(runtime: str, session: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", runtime)
    monkeypatch.setenv("XDG_RUNTIME_DIR", session)
    assert default_path(8443) == Path(found)


def listening(path: Path) -> socket.socket:
    """Return a listening socket, which `find_control_socket` takes for a tunnel's."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(1)
    return sock


def test_the_only_socket_is_found(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "control-1.sock"))
    (folder / "control-2.sock").touch()
    path = folder / "control-8443.sock"
    with listening(path):
        assert find_control_socket() == path


def test_a_busy_socket_is_found(folder: Path) -> None:
    path = folder / "control-8443.sock"
    with listening(path), socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        one.connect(str(path))
        two.connect(str(path))  # the backlog of 1 takes two (listen(2)'s old habit), and is full now
        assert find_control_socket() == path


@pytest.mark.parametrize("place", ["s/tlstunnel", "system"])
def test_a_socket_elsewhere_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A tunnel of the session or of the system, from a session."""
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "s"))
    (folder / place).mkdir(parents=True)
    path = folder / place / "control-8443.sock"
    with listening(path):
        assert find_control_socket() == path


def test_no_socket_is_found(folder: Path) -> None:
    with pytest.raises(ControlError, match=f"no running tunnel has a control socket in {folder};"):
        find_control_socket()


def test_several_are_listed(folder: Path) -> None:
    one, two = folder / "control-1.sock", folder / "control-2.sock"
    with listening(one), listening(two), pytest.raises(ControlError, match=f"--control: {one}, {two}$"):
        find_control_socket()


def test_a_service_finds_only_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the reload of one unit could reach the tunnel of another."""
    (folder / "system").mkdir()
    with listening(folder / "system" / "control-1.sock"):
        with pytest.raises(ControlError, match="no running tunnel"):
            find_control_socket()
        monkeypatch.delenv("RUNTIME_DIRECTORY")
        assert find_control_socket() == folder / "system" / "control-1.sock"


def test_several_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    for name in ("tlstunnel", "system"):
        (folder / name).mkdir()
    one, two = folder / "tlstunnel" / "control-1.sock", folder / "system" / "control-1.sock"
    with listening(one), listening(two), pytest.raises(ControlError, match=f"--control: {one}, {two}$"):
        find_control_socket()


def test_no_tunnel_to_connect_to(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="cannot reach the tunnel: No such file"):
        send_command(tmp_path / "none.sock", {"do": "reload"})


def test_a_tunnel_that_closes_without_a_response(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"

    async def run() -> None:
        async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.close()

        async with await asyncio.start_unix_server(leave, path):
            with pytest.raises(ControlError, match="closed the connection without a response"):
                await asyncio.to_thread(send_command, path, {"do": "reload"})

    asyncio.run(run())
