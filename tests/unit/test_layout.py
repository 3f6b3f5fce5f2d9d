"""The documents that describe the tree name what is in it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tlstunnel"
LAYERS = (ROOT / "docs" / "architecture.md").read_text().partition("## The layers")[2].partition("\n## ")[0]

_PATH = re.compile(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+(?:\.py|/))`")


def test_the_layers_name_every_package_and_module_at_the_top() -> None:
    rows = [line for line in LAYERS.splitlines() if line.startswith("| ")][1:]
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row.split("|")[2])}
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert named == there - {"__init__", "__main__"}


@pytest.mark.parametrize("document", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_paths_in_the_documents_exist(document: str) -> None:
    paths = set(_PATH.findall((ROOT / document).read_text()))
    assert paths
    missing = sorted(path for path in paths if not any((folder / path).exists() for folder in (PACKAGE, ROOT)))
    assert not missing


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__main__.py" and not path.read_text().startswith(('"""', 'r"""'))
    ]
    assert not silent


def _unit_tests(module: Path) -> list[Path]:
    """Return where the unit test of a module may be."""
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    names = ("_".join(parts), "_".join(parts[-2:]), parts[-1])
    return [ROOT / "tests" / "unit" / f"test_{name}.py" for name in names]


def _named_tests(module: Path) -> list[Path]:
    """Return the tests that the module's docstring names after "Tested by"."""
    docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
    line = " ".join(docstring.partition("Tested by ")[2].partition("\n\n")[0].split())
    folder, found = "", []
    for path in re.findall(r"[a-z0-9_/]+\.py", line):
        folder = path.rpartition("/")[0] or folder
        found.append(ROOT / folder / path.rpartition("/")[2])
    return found


@pytest.mark.parametrize(
    "module",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in {"__init__.py", "__main__.py"}],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_every_module_has_its_test(module: Path) -> None:
    """A unit test of its name, or a line in its docstring that names the tests that prove it."""
    named = _named_tests(module)
    assert [path for path in named if not path.exists()] == []
    assert named or any(path.exists() for path in _unit_tests(module))


def test_the_parent_does_without_what_only_serving_processes_need() -> None:
    """It holds no state that is worth losing, so it is to stay small and quick to start."""
    heavy = ("cryptography", "h11", "hiredis", "starlette", "uvicorn", "tlstunnel.tunnel.sites")
    program = f"import sys, tlstunnel.cli.start; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ran.stdout == "[]\n"
