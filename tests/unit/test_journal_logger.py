"""The log does not bring rich into processes that serve."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["tlstunnel.processes.child", "tlstunnel.cli.start"])
def test_a_process_that_serves_does_not_import_rich(module: str) -> None:
    code = f"import sys, {module}; print('structlog' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["True", "False"]


def test_rich_can_be_imported_afterwards() -> None:
    code = "import tlstunnel.journal.logger, rich.console; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "ok\n"
