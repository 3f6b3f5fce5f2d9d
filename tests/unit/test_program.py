"""Whether the package on disk was replaced, also while files come and go. The rest is tested with upgrades."""

import os
import subprocess
import sys
from pathlib import Path

from tests.promises.versions import Versions

SCRIPT = """
import sys
from pathlib import Path
from tlstunnel.program import is_package_replaced

print(is_package_replaced())
Path(sys.argv[1]).unlink()
print(is_package_replaced())
"""


def test_a_file_that_cannot_be_read_is_no_error(tmp_path: Path) -> None:
    """Such as one that has just been removed, or an editor's lock, which is a link to nowhere."""
    versions = Versions(tmp_path)
    gone = versions.install("1.0.0") / "edge" / ".#values.py"
    gone.symlink_to("nobody@nowhere.1234")
    command = [sys.executable, "-c", SCRIPT, str(gone)]
    environment = {**os.environ, **versions.environment}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")
