"""Installs what a benchmark needs: Debian packages, and the load generator."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from scripts.load.running import BenchError

POLICY = Path("/usr/sbin/policy-rc.d")
NO_SERVICE = "#!/bin/sh\nexit 101\n"


def find_tunnel(root: Path) -> Path:
    """Return the tlstunnel of the virtual environment, else that of PATH, else install it with scripts/install."""
    environment = find_virtual_environment(root)
    if not (environment / "bin" / "tlstunnel").exists() and "TLSTUNNEL_VENV" not in os.environ:
        beside = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        if found := shutil.which("tlstunnel", path=os.pathsep.join(beside)):
            return Path(found)
        result = subprocess.run([str(root / "scripts" / "install"), "run"], check=False, stdout=sys.stderr)
        if result.returncode:
            raise BenchError("./scripts/install run failed; see above")
    if not (environment / "bin" / "tlstunnel").exists():
        raise BenchError(f"there is no tlstunnel in {environment}/bin")
    return environment / "bin" / "tlstunnel"


def find_virtual_environment(root: Path) -> Path:
    """Return the virtual environment that all scripts use."""
    return Path(os.environ.get("TLSTUNNEL_VENV", root / ".venv"))


def find_python_with_matplotlib(root: Path) -> str | None:
    """Return a Python with matplotlib, which is installed into .venv if necessary; None if that is not possible."""
    own = find_virtual_environment(root) / "bin" / "python"
    candidates = [sys.executable, str(own)]
    if found := next(filter(has_matplotlib, candidates), None):
        return found
    if "TLSTUNNEL_VENV" in os.environ or not own.exists():
        return None
    command = [
        str(own),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--editable",
        f"{root}[bench]",
    ]
    subprocess.run(command, check=False)
    return str(own) if has_matplotlib(str(own)) else None


def has_matplotlib(python: str) -> bool:
    """Return whether a Python can import matplotlib."""
    try:
        return not subprocess.run([python, "-c", "import matplotlib"], capture_output=True, check=False).returncode
    except OSError:
        return False


def build_load(root: Path) -> Path:
    """Build the load generator and the origin; return their folder, which git ignores."""
    install_packages({"gcc": "gcc", "make": "make", "openssl": "openssl"})
    result = make(root)
    if result.returncode and "No such file or directory" in result.stderr:  # the headers are in other packages
        apt_install(["libc6-dev", "libssl-dev"])
        result = make(root)
    if result.returncode:
        raise BenchError(f"building scripts/load failed: {result.stderr.strip()}")
    return root / "build" / "load"


def install_tools(groups: Iterable[str]) -> None:
    """Install the tools that the figures of these groups need."""
    needed = {"instructions": ("valgrind", "valgrind"), "calls": ("strace", "strace")}
    install_packages(dict(needed[group] for group in groups if group in needed))


def make(root: Path) -> subprocess.CompletedProcess[str]:
    """Run make in scripts/load."""
    command = ["make", "--silent", "-C", str(root / "scripts" / "load")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def install_packages(wanted: Mapping[str, str]) -> None:
    """Install the packages (values) of the programs (keys) that are missing."""
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
    with hold_back_services():
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
def hold_back_services() -> Iterator[None]:
    """Keep apt-get from starting services, as Debian documents it: policy-rc.d exits with 101, "action forbidden"."""
    if POLICY.exists():
        if subprocess.run([str(POLICY), "nginx", "start"], capture_output=True, check=False).returncode != 101:
            raise BenchError(f"{POLICY} allows services to start; install the packages first")
        yield
        return
    POLICY.write_text(NO_SERVICE)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()
