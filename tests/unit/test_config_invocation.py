"""The command line of `start` as one process passes it to another."""

from pathlib import Path

import pytest

from tlstunnel.config.invocation import Invocation

TEXT = '[[sites]]\nnames = ["*"]\norigins = ["unix:chat.sock"]\ncert = "chat.pem"\nkey = "chat-key.pem"\n'


@pytest.fixture
def removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder the current one, and remove it."""
    folder = tmp_path / "release"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        Path.cwd()
    return folder


def test_relative_paths_in_a_file_start_from_the_folder_of_the_start(removed: Path) -> None:
    invocation = Invocation(Path("conf/t.toml"), folder=removed)
    (site,) = Invocation.from_json(invocation.as_json()).configuration(TEXT).sites
    assert site.cert == removed / "conf" / "chat.pem"
    assert site.origins[0].address.path == str(removed / "conf" / "chat.sock")


def test_an_origin_does_not_need_the_current_folder(removed: Path) -> None:
    for origin, path in (("localhost:3000", None), ("unix:chat.sock", str(removed / "chat.sock"))):
        site = Invocation.from_json(Invocation(origin=origin, folder=removed).as_json()).site
        assert site is not None
        assert site.origins[0].address.path == path
