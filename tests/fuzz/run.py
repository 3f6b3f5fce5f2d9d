"""Attack one target with Atheris, which learns from the branches that an input takes.

    python -m tests.fuzz.run TARGET FOLDER [libFuzzer's options]

FOLDER holds the inputs found so far, one file each; new ones are added. In ./scripts/soak, tests/e2e/test_fuzz.py runs
this.
"""

import importlib
import sys

import atheris


def main() -> None:
    """Run until libFuzzer ends the process: after its time, or at the first failure, whose input it writes."""
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["tlstunnel", "h11"]):
        targets = importlib.import_module("tests.fuzz.targets")
    atheris.Setup(sys.argv, targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
