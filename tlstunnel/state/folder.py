"""The folder of what outlives the tunnel, such as the history."""

import contextlib
import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from tlstunnel.errors import StateError

FOLDER_MODE = 0o700
"""The history says when whose site was used, so only the user of the tunnel can read it."""

FILE_MODE = 0o600

INSTANCE_FILE = "instance"
"""Has the name of the tunnel that keeps the history here, or has kept it last."""

_INSTANCE = re.compile(r"[0-9A-Za-z]{1,64}")


def find_state_folder(configured: Path | None, environ: Mapping[str, str]) -> Path:
    """Return the state folder, which is created if it does not exist: that of `locate_state_folder`.

    Raises StateError if the folder cannot be created or written.
    """
    folder = locate_state_folder(configured, environ)
    try:
        folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
    except FileExistsError:
        raise StateError(f"{folder}: not a folder; set state.dir to another one") from None
    except OSError as error:
        raise StateError(f"{folder}: cannot be created: {error.strerror}; set state.dir to another folder") from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        reason = os.strerror(errno.EROFS if _is_read_only(folder) else errno.EACCES)
        raise StateError(f"{folder}: cannot be written: {reason}; set state.dir to another folder")
    return folder


def locate_state_folder(configured: Path | None, environ: Mapping[str, str]) -> Path:
    """Return where the state folder is, without looking: `configured`, or else the default.

    The default is $STATE_DIRECTORY, which systemd sets for a unit with `StateDirectory`: the first, if there are
    several, separated by colons (systemd.exec(5)). Without it $XDG_STATE_HOME/tlstunnel, or ~/.local/state/tlstunnel;
    the XDG Base Directory Specification says to ignore a relative $XDG_STATE_HOME. Raises StateError if none is set.
    """
    if configured is not None:
        return configured
    if given := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(given)
    session = Path(environ.get("XDG_STATE_HOME", ""))
    if session.is_absolute():
        return session / "tlstunnel"
    if home := environ.get("HOME", ""):
        return Path(home) / ".local" / "state" / "tlstunnel"
    raise StateError("no state folder: neither STATE_DIRECTORY, XDG_STATE_HOME nor HOME is set; set state.dir")


def replace_instance(folder: Path, instance: str) -> str:
    """Store the name of the tunnel that keeps the history here, and return that of the one before, "" if none is known.

    For whoever has the history's lock. A tunnel that was killed as a whole could not tell other machines that it ended.
    """
    path = folder / INSTANCE_FILE
    before = ""
    with contextlib.suppress(OSError):
        before = path.read_bytes()[:100].decode("ascii", "replace").strip()
    if before == instance or not _INSTANCE.fullmatch(before):
        before = ""
    new = path.with_name(path.name + ".new")
    with contextlib.suppress(OSError):  # on a full disk, the one before is withdrawn again at the next start
        new.touch(FILE_MODE)
        new.write_text(f"{instance}\n")
        new.replace(path)
    return before


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
