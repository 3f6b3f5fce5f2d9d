"""Loading a worker's code: a file is executed at each load, a module is imported once; and the errors."""

import importlib
import os
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tlstunnel.addresses import OriginAddress
from tlstunnel.config import OriginConfig, SiteConfig
from tlstunnel.edge.loading import Loader, explain, find_line
from tlstunnel.edge.workers import Workers
from tlstunnel.errors import ConfigurationError
from tlstunnel.metrics.registry import Registry

GOOD = "async def fetch(request, env):\n    return request\n"


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("tlstunnel.edge.", "edge_module_")):
            del sys.modules[name]


def ours() -> set[str]:
    """The modules that were executed from files."""
    return {name for name in sys.modules if name.startswith("tlstunnel.edge.worker_")}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(GOOD)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which modules can be imported, without bytecode being written."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def refusal(reference: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Loader().load(reference)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    return message


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_executed_anew_under_a_fresh_name(file: Path) -> None:
    one, two = Loader().load(f"{file}:fetch"), Loader().load(f"{file}:fetch")
    assert one.fetch is not two.fetch
    assert one.module_name != two.module_name
    assert {one.module_name, two.module_name} <= ours()
    assert one.fetch.__module__ == one.module_name
    assert one.file == str(file)
    one.discard()
    assert one.module_name not in sys.modules
    assert two.module_name in sys.modules


def test_a_file_is_executed_once_per_configuration(file: Path) -> None:
    """Two functions of one file share its globals."""
    file.write_text(f"shared = []\n{GOOD}\nasync def other(request, env): ...\n")
    loader = Loader()
    one, two = loader.load(f"{file}:fetch"), loader.load(f"{file}:other")
    assert one.fetch.__globals__["shared"] is two.fetch.__globals__["shared"]


def test_a_change_with_the_same_size_and_time_is_noticed(file: Path) -> None:
    """Python would use its cached bytecode; and none is written."""
    file.write_text("VERSION = 1\n" + GOOD)
    stamp = file.stat()
    py_compile.compile(str(file))
    assert Loader().load(f"{file}:fetch").fetch.__globals__["VERSION"] == 1
    file.write_text("VERSION = 2\n" + GOOD)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file.stat().st_size == stamp.st_size
    assert Loader().load(f"{file}:fetch").fetch.__globals__["VERSION"] == 2
    assert len(list((file.parent / "__pycache__").iterdir())) == 1


def test_dataclasses_and_encodings_work(file: Path) -> None:
    """Dataclasses with string annotations look into `sys.modules`; a file may declare its encoding."""
    file.write_bytes(
        b"# -*- coding: latin-1 -*-\nfrom __future__ import annotations\nimport dataclasses, typing\n"
        b"@dataclasses.dataclass\nclass Env:\n    kind: typing.ClassVar[str] = 'J\xfcrgen'\n    count: int = 0\n"
        b"assert __name__ != '__main__' and __file__\n" + GOOD.encode()
    )
    found = Loader().load(f"{file}:fetch").fetch.__globals__["Env"]
    assert found().kind == "Jürgen"
    assert found.__match_args__ == ("count",)


@pytest.mark.parametrize("name", ["chat-worker.v2.py", "ünïcode.py", "a b.py", "a:b.py"])
def test_any_file_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(GOOD)
    assert Loader().load(f"{tmp_path / name}:fetch").file == str(tmp_path / name)


def test_setup_and_teardown_are_found(file: Path) -> None:
    assert (Loader().load(f"{file}:fetch").setup, Loader().load(f"{file}:fetch").teardown) == (None, None)
    file.write_text(GOOD + "async def setup(config): ...\nasync def teardown(env): ...\n")
    code = Loader().load(f"{file}:fetch")
    assert code.setup is not None
    assert code.setup.__name__ == "setup"
    assert code.teardown is not None


@pytest.mark.parametrize(
    "definition",
    [
        "async def fetch(*arguments): ...",
        "async def fetch(request, env, more=None): ...",
        "import functools\nasync def inner(more, request, env): ...\nfetch = functools.partial(inner, 1)",
        "class Worker:\n    async def ask(self, request, env): ...\nfetch = Worker().ask",
        "import functools\nasync def inner(request, env): ...\n@functools.wraps(inner)\nasync def fetch(*a): ...",
    ],
)
def test_accepted_signatures(file: Path, definition: str) -> None:
    file.write_text(definition + "\n")
    assert Loader().load(f"{file}:fetch").file == str(file)


# --- modules ----------------------------------------------------------------------------------------------------------


def test_a_module_is_imported_once(package: Path) -> None:
    (package / "edge_module_a.py").write_text("VERSION = 1\n" + GOOD)
    one = Loader().load("edge_module_a:fetch")
    (package / "edge_module_a.py").write_text("VERSION = 22\n" + GOOD)
    two = Loader().load("edge_module_a:fetch")
    assert one.fetch is two.fetch
    assert one.module_name == ""
    assert one.file == str(package / "edge_module_a.py")
    one.discard()
    assert sys.modules["edge_module_a"] is importlib.import_module("edge_module_a")


def test_a_module_in_a_package(package: Path) -> None:
    (package / "edge_module_b").mkdir()
    (package / "edge_module_b" / "__init__.py").write_text("LIMIT = 5\n")
    (package / "edge_module_b" / "chat.py").write_text("from . import LIMIT\n" + GOOD)
    assert Loader().load("edge_module_b.chat:fetch").fetch.__globals__["LIMIT"] == 5


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("edge_module_none:fetch", "there is no module edge_module_none; install it"),
        ("edge_module_none.chat:fetch", "there is no module edge_module_none; install it"),
        ("edge_module_c.none:fetch", "there is no module edge_module_c.none; install it"),
        ("edge_module_c.chat:fetch", "cannot be imported: ModuleNotFoundError: No module named 'no_such_library'"),
        ("edge_module_c.exits:fetch", "cannot be imported: SystemExit: 3"),
        ("edge_module_c:fetch", "there is no fetch in edge_module_c"),
    ],
)
def test_modules_that_are_missing_or_fail(package: Path, reference: str, said: str) -> None:
    """A missing import inside a module is a different error from a wrong name."""
    (package / "edge_module_c").mkdir()
    (package / "edge_module_c" / "__init__.py").touch()
    (package / "edge_module_c" / "chat.py").write_text("import no_such_library\n" + GOOD)
    (package / "edge_module_c" / "exits.py").write_text("raise SystemExit(3)\n")
    assert said in refusal(reference)


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("async def fetch(request, env)\n", ":1: is not valid Python: SyntaxError: expected ':'"),
        ("x = 1\ny = (\n", ":2: is not valid Python: SyntaxError"),
        ("x\0y\n", "is not valid Python: "),
        ("if x:\npass\n", ":2: is not valid Python: IndentationError"),
        ("# coding: no-such-coding\n", "is not valid Python: SyntaxError"),
        ("x = " + "(" * 500 + "\n", "is not valid Python: "),
        (
            "x = 1\n\nraise ValueError('bad \\x1b[2J\\nthing')\n",
            ":3: cannot be imported: ValueError: bad \\x1b[2J thing",
        ),
        ("def f():\n    return 1 / 0\n\nf()\n", ":2: cannot be imported: ZeroDivisionError"),
        ("import json\njson.loads('{')\n", ":2: cannot be imported: JSONDecodeError"),
        ("import sys\nsys.exit()\n", ":2: cannot be imported: SystemExit"),
        ("import no_such_module\n", ":1: cannot be imported: ModuleNotFoundError"),
        ("raise ValueError('x' * 10_000)\n", ":1: cannot be imported: ValueError: xxx"),
        ("", "there is no fetch in"),
        ("fetch = None\n", "there is no fetch in"),
        ("fetch = 5\n", "expected a coroutine function, async def fetch(request, env)"),
        ("def fetch(request, env): ...\n", "expected a coroutine function, async def fetch(request, env)"),
        ("async def fetch(request, env):\n    yield\n", "expected a coroutine function, async def fetch(request, env)"),
        ("class fetch: ...\n", "expected a coroutine function, async def fetch(request, env)"),
        ("async def fetch(): ...\n", "too many positional arguments"),
        ("async def fetch(request): ...\n", "too many positional arguments"),
        ("async def fetch(request, env, more): ...\n", "missing a required argument: 'more'"),
        ("async def fetch(*, request, env): ...\n", "too many positional arguments"),
        (GOOD + "def setup(config): ...\n", "expected a coroutine function, async def setup(config)"),
        (GOOD + "setup = 5\n", "expected a coroutine function, async def setup(config)"),
        (GOOD + "async def setup(): ...\n", "expected async def setup(config): too many"),
        (GOOD + "async def setup(config, more): ...\n", "expected async def setup(config): missing"),
        (GOOD + "def teardown(env): ...\n", "expected a coroutine function, async def teardown(env)"),
        (GOOD + "async def teardown(): ...\n", "expected async def teardown(env): too many"),
    ],
)
def test_errors_name_the_problem_and_the_line(file: Path, code: str, said: str) -> None:
    file.write_text(code)
    message = refusal(f"{file}:fetch")
    assert message.startswith(f"the edge worker {file}")
    assert said in message
    assert len(message) < 700


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert refusal(f"{tmp_path}/none.py:fetch").endswith("none.py: cannot be read: No such file or directory")
    (tmp_path / "folder.py").mkdir()
    assert refusal(f"{tmp_path}/folder.py:fetch").endswith("cannot be read: Is a directory")


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "asyncio.CancelledError", "GeneratorExit", "Own"])
def test_any_exception_at_the_import_is_an_error(file: Path, raised: str) -> None:
    """The process that loads the file neither exits nor hangs."""
    file.write_text(f"import asyncio\nclass Own(BaseException): ...\nraise {raised}\n")
    try:
        message = refusal(f"{file}:fetch")
    except BaseException as error:  # a CancelledError would end the test's own task
        pytest.fail(f"{type(error).__name__} was not caught")
    assert f":3: cannot be imported: {raised.rpartition('.')[2]}" in message


def test_an_exception_without_a_text(file: Path) -> None:
    file.write_text("class Mute(Exception):\n    def __str__(self): raise RuntimeError\nraise Mute\n")
    assert ":3: cannot be imported: Mute" in refusal(f"{file}:fetch")


def test_a_failed_file_leaves_no_module(file: Path) -> None:
    before = ours()
    for code in ("raise ValueError\n", "x = (\n"):
        file.write_text(code)
        refusal(f"{file}:fetch")
    assert ours() == before


def _site(reference: str) -> SiteConfig:
    return SiteConfig(worker=reference, origins=(OriginConfig(address=OriginAddress("localhost", 1)),))


@pytest.mark.parametrize("code", ["async def other(request, env): ...\n", "def fetch(request, env): ...\n"])
def test_a_file_without_a_worker_leaves_no_module(file: Path, code: str) -> None:
    """Otherwise each refused reload would leave one more."""
    before = ours()
    file.write_text(code)
    with pytest.raises(ConfigurationError, match=r"sites\[0\].worker: the edge worker"):
        Workers([_site(f"{file}:fetch")], Registry())
    assert ours() == before


def test_an_error_in_the_second_discards_the_first(file: Path) -> None:
    before = ours()
    with pytest.raises(ConfigurationError, match=r"sites\[1\].worker: the edge worker .*none.py"):
        Workers([_site(f"{file}:fetch"), _site(f"{file.parent}/none.py:fetch")], Registry())
    assert ours() == before


def test_every_invalid_worker_is_reported_and_executed_once(file: Path) -> None:
    log = file.with_name("executed")
    file.write_text(f"import os\nos.mkdir({str(log)!r})\nraise ValueError\n")
    with pytest.raises(ConfigurationError) as caught:
        Workers([_site(f"{file}:a"), _site(f"{file}:b"), _site("no.such.module:fetch")], Registry())
    first, second, third = caught.value.problems
    assert first.startswith("sites[0].worker: ")
    assert second == first.replace("sites[0]", "sites[1]")
    assert third.startswith("sites[2].worker: ")
    assert log.is_dir()
    assert "ValueError" in second


def test_explain_returns_one_line() -> None:
    assert explain(ValueError(" a\n\tb ")) == "ValueError: a b"
    assert explain(ValueError()) == "ValueError"
    assert len(explain(ValueError("x" * 10_000))) < 400


def test_find_line_returns_the_innermost_of_that_file() -> None:
    def inner() -> None:
        raise LookupError("here")

    with pytest.raises(LookupError, match="here") as caught:
        inner()
    assert find_line(caught.value, __file__) == inner.__code__.co_firstlineno + 1
    assert find_line(caught.value, "other.py") == 0
