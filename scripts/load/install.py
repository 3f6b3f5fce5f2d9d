"""What a benchmark needs from outside: Debian packages, and the load generator built."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from scripts.load.running import BenchError

POLICY = Path("/usr/sbin/policy-rc.d")
NO_SERVICE = "#!/bin/sh\nexit 101\n"


def build_load(root: Path) -> Path:
    """Build the load generator and the origin; gives the folder they are in, which git ignores."""
    packages({"gcc": "gcc", "make": "make", "openssl": "openssl"})
    result = make(root)
    if result.returncode and "openssl" in result.stderr:
        apt_install(["libssl-dev"])
        result = make(root)
    if result.returncode:
        raise BenchError(f"building scripts/load failed: {result.stderr.strip()}")
    return root / "build" / "load"


def make(root: Path) -> subprocess.CompletedProcess[str]:
    """Run make in scripts/load."""
    command = ["make", "--silent", "-C", str(root / "scripts" / "load")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def packages(wanted: Mapping[str, str]) -> None:
    """Install the packages (values) of those programs (keys) that are missing."""
    sbin = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    os.environ["PATH"] = sbin
    if missing := sorted({package for program, package in wanted.items() if not shutil.which(program)}):
        apt_install(missing)


def apt_install(names: list[str]) -> None:
    """Install Debian packages without starting or enabling the services in them."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise BenchError(f"missing Debian packages, install them first: {' '.join(names)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *names]
    with services_held_back():
        result = subprocess.run(install, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:  # the package lists may be absent or old
            subprocess.run(["apt-get", "update"], env=environment, capture_output=True, check=False)
            result = subprocess.run(install, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BenchError(f"apt-get could not install {' '.join(names)}: {result.stderr.strip()}")
    if Path("/run/systemd/system").exists():
        for name in names:
            subprocess.run(["systemctl", "disable", name.removesuffix("-light")], capture_output=True, check=False)


@contextlib.contextmanager
def services_held_back() -> Iterator[None]:
    """Debian's own way to install without starting: policy-rc.d answers 101, "action forbidden by policy"."""
    if POLICY.exists():
        if subprocess.run([str(POLICY), "nginx", "start"], capture_output=True, check=False).returncode != 101:
            raise BenchError(f"{POLICY} would let the packages' services start: install the packages first")
        yield
        return
    POLICY.write_text(NO_SERVICE)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
