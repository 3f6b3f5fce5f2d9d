"""Where the state folder is, and what is said when there can be none."""

import stat
from pathlib import Path

import pytest

from tlstunnel.errors import StateError
from tlstunnel.state.folder import INSTANCE_FILE, find_state_folder, locate_state_folder, replace_instance


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"STATE_DIRECTORY": "{tmp}/a", "XDG_STATE_HOME": "{tmp}/x", "HOME": "{tmp}/h"}, "a"),
        ({"STATE_DIRECTORY": "{tmp}/a:{tmp}/b"}, "a"),
        ({"STATE_DIRECTORY": "", "XDG_STATE_HOME": "{tmp}/x", "HOME": "{tmp}/h"}, "x/tlstunnel"),
        ({"XDG_STATE_HOME": "relative", "HOME": "{tmp}/h"}, "h/.local/state/tlstunnel"),
        ({"HOME": "{tmp}/h"}, "h/.local/state/tlstunnel"),
    ],
)
def test_the_default_comes_from_the_environment(tmp_path: Path, environ: dict[str, str], expected: str) -> None:
    folder = find_state_folder(None, {name: value.format(tmp=tmp_path) for name, value in environ.items()})
    assert folder == tmp_path / expected
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_configured_folder_is_used_whatever_the_environment_says(tmp_path: Path) -> None:
    assert find_state_folder(tmp_path / "own", {"STATE_DIRECTORY": str(tmp_path / "a")}) == tmp_path / "own"
    assert not (tmp_path / "a").exists()


def test_whoever_only_looks_makes_no_folder(tmp_path: Path) -> None:
    assert locate_state_folder(None, {"STATE_DIRECTORY": str(tmp_path / "a")}) == tmp_path / "a"
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(0o755)
    find_state_folder(tmp_path / "own", {})
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o755


def test_without_any_variable_the_key_is_named() -> None:
    with pytest.raises(StateError, match=r"neither STATE_DIRECTORY, XDG_STATE_HOME nor HOME is set; set state\.dir"):
        find_state_folder(None, {})


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"/file: not a folder; set state\.dir"):
        find_state_folder(tmp_path / "file", {})
    with pytest.raises(StateError, match=r"/file/below: cannot be created: Not a directory; set state\.dir"):
        find_state_folder(tmp_path / "file" / "below", {})


def test_a_folder_that_cannot_be_written() -> None:
    """Not even root may write into the first, or make the second."""
    with pytest.raises(StateError, match=r"^/proc/sys: cannot be written: Permission denied; set state\.dir"):
        find_state_folder(Path("/proc/sys"), {})
    with pytest.raises(StateError, match=r"^/proc/sys/tlstunnel: cannot be created: "):
        find_state_folder(Path("/proc/sys/tlstunnel"), {})


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"a b", b"x" * 100_000, b"*"])
def test_what_is_no_name_of_a_tunnel_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INSTANCE_FILE).write_bytes(content)
    assert replace_instance(tmp_path, "a1") == ""
    assert [replace_instance(tmp_path, name) for name in ("a1", "b2", "c3")] == ["", "a1", "b2"]


def test_a_name_that_cannot_be_stored_is_no_error(tmp_path: Path) -> None:
    (tmp_path / INSTANCE_FILE).mkdir()
    assert replace_instance(tmp_path, "a1") == ""
