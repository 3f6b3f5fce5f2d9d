"""Versions of the package side by side, and a link to the installed one, which is a common way to deploy."""

import compileall
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import tlstunnel
from tests.harness import Tunnel
from tlstunnel.processes.reach import send_command


class Versions:
    """Folders that each hold the package, and `current`, a link to the one that a start or an upgrade takes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.install("1.0.0")

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment in which a program finds the package through the link."""
        before = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([str(self._folder / "current"), *([before] if before else [])])}

    def install(self, version: str) -> Path:
        """Make that version the current one, atomically; return the folder of its package."""
        package = self._folder / version / "tlstunnel"
        if not package.exists():
            source = Path(tlstunnel.__file__).parent
            # With the compiled modules, except those that are being written.
            shutil.copytree(source, package, ignore=shutil.ignore_patterns("*.pyc.*"))
            init = package / "__init__.py"
            text, count = re.subn('__version__ = ".*"', f'__version__ = "{version}"', init.read_text())
            assert count == 1
            init.write_text(text)
        self.choose(version)
        return package

    def install_folder(self, folder: Path, version: str) -> None:
        """Copy an installed version and make it the current one."""
        shutil.copytree(folder, self._folder / version)
        self.choose(version)

    def choose(self, version: str) -> None:
        """Point the link at an installed version, atomically."""
        new = self._folder / "new"
        new.symlink_to(version)
        new.replace(self._folder / "current")

    def remove(self, version: str) -> None:
        """Delete it from the disk."""
        shutil.rmtree(self._folder / version)


def unpack(wheel: Path, folder: Path) -> None:
    """Install a wheel in a folder, as ``pip install --no-deps --target`` does."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    assert compileall.compile_dir(folder, quiet=1)


def upgraded(tunnel: Tunnel, status: int = 0) -> str:
    """Upgrade; return the line that the command prints."""
    if not status:
        response = send_command(tunnel.control, {"do": "upgrade"})
        return f"{response['before']} -> {response['version']}, generation {response['generation']}"
    said = tunnel.run_command("upgrade", status=status)
    assert len(said) == 1, said
    return said[0]
