"""The inputs that fuzzing has found so far: a line of base64 each in tests/corpus/fuzz, one file a target.

    python -m tests.fuzz.corpus

adds what build/fuzz has: ./scripts/soak leaves there what took a branch that nothing before it took.
"""

import base64
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent.parent
_FOLDER = _ROOT / "tests" / "corpus" / "fuzz"
FOUND = _ROOT / "build" / "fuzz"
"""Where ./scripts/soak keeps what it finds, in one folder a target."""

MAX_INPUTS, MAX_SIZE = 150, 2048
"""How many inputs a file keeps, and of how many bytes each at most: the replay takes a moment of every test run."""


def read(name: str) -> list[bytes]:
    """Return the inputs of the target `name`."""
    path = _FOLDER / f"{name}.txt"
    return [base64.b64decode(line) for line in path.read_text().split()] if path.exists() else []


def unpack(name: str, folder: Path) -> None:
    """Write the inputs of the target `name` to `folder`, one file each, as libFuzzer reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(read(name)):
        (folder / f"kept-{number:03}").write_bytes(data)


def keep(name: str) -> None:
    """Add what was found for the target `name`: an even choice of sizes, if there is too much of it."""
    found = {path.read_bytes() for path in (FOUND / name).iterdir()} | set(read(name))
    inputs = sorted((data for data in found if len(data) <= MAX_SIZE), key=lambda data: (len(data), data))
    step = max(1.0, len(inputs) / MAX_INPUTS)
    chosen = [inputs[int(number * step)] for number in range(int(len(inputs) / step))]
    (_FOLDER / f"{name}.txt").write_text("".join(f"{base64.b64encode(data).decode()}\n" for data in chosen))


if __name__ == "__main__":
    for _folder in sorted(FOUND.iterdir()):
        keep(_folder.name)
