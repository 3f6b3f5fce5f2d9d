"""A reload loads the workers again and affects no tunnel. An invalid worker refuses it, and the old one stays."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness import (
    Certificate,
    RawOrigin,
    Tunnel,
    connect_tls,
    echo_bytes,
    eventually,
    receive_exactly,
    upgrade,
)
from tests.promises.edged import FETCH, edged, not_reloaded, reloaded, written
from tests.promises.firewalled import config_for
from tests.promises.versions import Versions, upgraded
from tests.promises.wire import read_until_end

NOTES = '''
import asyncio, json, os, pathlib, threading, time
from tlstunnel.edge import Reply

FOLDER = pathlib.Path(os.environ["EDGE_NOTES"])


def note(*words):
    """Note what has happened in this process."""
    with (FOLDER / "notes").open("a") as file:
        file.write(f"{os.getpid()} {' '.join(map(str, words))}\\n")
'''
"""The beginning of the workers in this file."""


def worker(version: str, more: str = "") -> str:
    """Return the code of a worker that replies with its version, and notes its calls."""
    return f'''{NOTES}
async def setup(config):
    note("{version} setup", threading.current_thread().name, json.dumps(config))
    return {{"version": "{version}"}}


async def teardown(env):
    note("{version} teardown", env["version"])


async def fetch(request, env):
    if "slow" in request.path:
        note("{version} begun")
        while not (FOLDER / "go").exists():
            await asyncio.sleep(0.02)
        note("{version} through")
    return Reply(418, env["version"]) if "version" in request.path else request

{more}
'''


@pytest.fixture(scope="module")
def origin() -> Iterator[RawOrigin]:
    with RawOrigin(echo_bytes) as origin:
        yield origin


class Notes:
    """What workers have noted. `environment` names the file to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"EDGE_NOTES": str(folder)}

    def read(self) -> list[str]:
        """Return the notes so far, without their processes."""
        return [line.partition(" ")[2] for line in self._lines()]

    def pids(self, beginning: str) -> list[int]:
        """Return the processes that have noted this."""
        return [int(line.split()[0]) for line in self._lines() if line.partition(" ")[2].startswith(beginning)]

    def _lines(self) -> list[str]:
        file = self.folder / "notes"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    (tmp_path / "notes-of-workers").mkdir()
    return Notes(tmp_path / "notes-of-workers")


Started = Callable[..., Tunnel]


@pytest.fixture
def started(origin: RawOrigin, certificate: Certificate, notes: Notes) -> Started:
    """Start tunnels whose workers can take notes."""

    def make(code: str, **options: Any) -> Tunnel:
        environment = notes.environment | options.pop("environment", {})
        return edged(origin.address, certificate, code, environment=environment, **options)

    return make


def _says(tunnel: Tunnel, path: str = "/version") -> str:
    """Return the version that replies; "" if the request is forwarded."""
    with connect_tls(tunnel) as client:
        answer = upgrade(client, path)
        if answer.status == 101:
            return ""
        return f"{answer.status} {(answer.leftover + read_until_end(client)).decode()}"


def _echoes(client: Any) -> None:
    client.sendall(b"ping")
    assert receive_exactly(client, 4) == b"ping"


# --- a changed file ---------------------------------------------------------------------------------------------------


def test_a_changed_file_takes_effect_and_tunnels_stay_open(started: Started, notes: Notes) -> None:
    with started(worker("one")) as tunnel, connect_tls(tunnel) as client:
        assert upgrade(client).status == 101
        for version in ("two", "six"):  # as long as the one before, and perhaps within one tick of the file's clock
            written(tunnel, worker(version))
            assert _says(tunnel) != f"418 {version}", "a file is read only at a reload"
            reloaded(tunnel)
            assert _says(tunnel) == f"418 {version}"
            _echoes(client)
        reloaded(tunnel)
        assert _says(tunnel) == "418 six"
        _echoes(client)
        eventually(lambda: notes.read().count("six teardown six") == 1)
        tunnel.stop()
        assert notes.read().count("six teardown six") == 2
    setups = [line.split()[0] for line in notes.read() if " setup " in line]
    teardowns = [line.split()[0] for line in notes.read() if " teardown " in line]
    assert setups == teardowns == ["one", "two", "six", "six"]
    assert {" ".join(line.split()[2:4]) for line in notes.read() if " setup " in line} == {"edge workers"}


def test_a_changed_setting_takes_effect(started: Started, origin: RawOrigin, certificate: Certificate) -> None:
    code = f"""{NOTES}
async def setup(config):
    return config


async def fetch(request, env):
    return Reply(418, json.dumps(env))
"""
    with started(code, site='worker_config = { a = 1, deep = { b = ["c"] } }\n') as tunnel:
        assert _says(tunnel) == '418 {"a": 1, "deep": {"b": ["c"]}}'
        new = config_for(origin.address, certificate, site=FETCH + "worker_config = { a = 2 }\n")
        assert reloaded(tunnel, new) == ["site localhost: changed: worker_config"]
        assert _says(tunnel) == '418 {"a": 2}'
        # And without a worker, and with one again.
        assert reloaded(tunnel, config_for(origin.address, certificate)) == [
            "site localhost: changed: worker, worker_config"
        ]
        assert _says(tunnel) == ""
        assert reloaded(tunnel, new) == ["site localhost: changed: worker, worker_config"]
        assert _says(tunnel) == '418 {"a": 2}'


def test_a_reload_may_add_the_first_worker(origin: RawOrigin, certificate: Certificate, notes: Notes) -> None:
    config = config_for(origin.address, certificate)
    with Tunnel(None, certificate, config=config, environment=notes.environment) as tunnel:
        assert _says(tunnel) == ""
        written(tunnel, worker("one"))
        reloaded(tunnel, config_for(origin.address, certificate, site=FETCH))
        assert _says(tunnel) == "418 one"


def test_a_request_in_flight_is_finished_by_the_old_worker(started: Started, notes: Notes) -> None:
    """The teardown of the old worker comes after it."""
    with started(worker("one"), site='worker_timeout = "1m"\n') as tunnel, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(_says, tunnel, "/slow/version")
        eventually(lambda: "one begun" in notes.read())
        written(tunnel, worker("two"))
        reloaded(tunnel)
        assert _says(tunnel) == "418 two"
        assert not slow.done()
        assert "one teardown one" not in notes.read()
        (notes.folder / "go").touch()
        assert slow.result() == "418 one"
        eventually(lambda: "one teardown one" in notes.read())
        assert notes.read().index("one through") < notes.read().index("one teardown one")


# --- what refuses one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (None, "worker.py: cannot be read: No such file or directory"),
        ("async def fetch(request, env)\n    pass\n", "worker.py:1: is not valid Python: SyntaxError: expected ':'"),
        ("import json\nimport no_such_module_here\n", "worker.py:2: cannot be imported: ModuleNotFoundError"),
        ("import sys\n\nsys.exit('no')\n", "worker.py:3: cannot be imported: SystemExit: no"),
        ("async def other(request, env): ...\n", "there is no fetch in"),
        ("def fetch(request, env): ...\n", "expected a coroutine function, async def fetch(request, env)"),
        ("async def fetch(request): ...\n", "expected async def fetch(request, env)"),
        (
            "async def fetch(request, env): ...\nasync def setup(config):\n    raise LookupError(config['url'])\n",
            "its setup failed: ",
        ),
        (
            "async def fetch(request, env): ...\ndef setup(config): ...\n",
            "expected a coroutine function, async def setup(config)",
        ),
        (
            "import sys\nasync def fetch(request, env): ...\nasync def setup(config):\n    sys.exit(1)\n",
            "its setup failed: ",
        ),
    ],
)
def test_an_invalid_worker_refuses_the_reload_and_the_old_one_stays(
    shared: Tunnel, code: str | None, said: str
) -> None:
    tunnel = shared
    before = _says(tunnel)
    with connect_tls(tunnel) as client:
        assert upgrade(client).status == 101
        if code is None:
            (tunnel.folder / "worker.py").unlink()
        else:
            written(tunnel, code)
        line = not_reloaded(tunnel)
        assert said in line
        assert "sites[0].worker" in line or "its setup failed" in line
        assert f"{tunnel.folder}/worker.py" in line
        assert _says(tunnel) == before
        _echoes(client)


@pytest.fixture(scope="module")
def shared(origin: RawOrigin, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tunnel]:
    environment = {"EDGE_NOTES": str(tmp_path_factory.mktemp("notes"))}
    with edged(origin.address, certificate, worker("one"), environment=environment) as tunnel:
        yield tunnel


def test_the_command_says_why(shared: Tunnel) -> None:
    written(shared, "async def fetch(request, env): ...\nimport no_such_module_here\n")
    (line,) = shared.reload(status=1)
    assert line.startswith("tlstunnel: nothing was changed: ")
    assert f"sites[0].worker: the edge worker {shared.folder}/worker.py:2: cannot be imported: " in line


def test_a_refused_reload_tears_down_the_other_new_workers(
    started: Started, notes: Notes, certificate: Certificate
) -> None:
    """Of two new workers, the first is set up, and torn down again because the second fails."""
    with started(worker("one")) as tunnel:
        written(tunnel, worker("two"))
        written(tunnel, "async def fetch(r, e): ...\nasync def setup(c):\n    raise ValueError\n", "bad.py")
        more = (
            f'[[sites]]\nnames = ["b.example"]\norigins = ["localhost:1"]\nworker = "bad.py:fetch"\n'
            f'cert = "{certificate.cert}"\nkey = "{certificate.key}"\n'
        )
        before = tunnel.file.read_text()
        line = not_reloaded(tunnel, before + more)
        assert "bad.py:3: ValueError" in line
        assert notes.read()[-2:] == ["two setup edge workers {}", "two teardown two"]
        assert _says(tunnel) == "418 one"
        reloaded(tunnel, before)
        assert _says(tunnel) == "418 two"


# --- processes and releases -------------------------------------------------------------------------------------------


def test_setup_is_called_once_per_process(started: Started, notes: Notes) -> None:
    with started(worker("one"), arguments=("--processes", "2")) as tunnel:
        pids = tunnel.pids
        assert sorted(notes.pids("one setup")) == pids
        written(tunnel, worker("two"))
        reloaded(tunnel)
        assert sorted(notes.pids("two setup")) == pids
        eventually(lambda: sorted(notes.pids("one teardown")) == pids)
        assert {_says(tunnel) for _ in range(10)} == {"418 two"}
        tunnel.stop()
        assert sorted(notes.pids("two teardown")) == pids


def test_a_reload_that_one_process_refuses_is_refused_by_all(started: Started, notes: Notes) -> None:
    """In the other process, the new worker is torn down again."""
    first_alone = (
        "import os\nfrom pathlib import Path\n"
        "def taken():\n"
        "    try:\n"
        "        (FOLDER / 'taken').touch(exist_ok=False)\n"
        "    except FileExistsError:\n"
        "        raise ValueError('taken') from None\n"
    )
    code = worker("two", first_alone).replace('note("two setup"', 'taken()\n    note("two setup"')
    with started(worker("one"), arguments=("--processes", "2")) as tunnel:
        written(tunnel, code)
        line = not_reloaded(tunnel)
        assert "ValueError: taken" in line
        assert {_says(tunnel) for _ in range(10)} == {"418 one"}
        eventually(lambda: notes.pids("two teardown") == notes.pids("two setup"))
        assert len(notes.pids("two setup")) == 1
        assert not notes.pids("one teardown")


def test_a_module_changes_only_with_an_upgrade(
    origin: RawOrigin, certificate: Certificate, notes: Notes, tmp_path: Path
) -> None:
    """A reload keeps it with its `env`; tunnels stay open through both."""
    versions = Versions(tmp_path / "versions")
    package = tmp_path / "modules" / "edge_of_a_test"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "chat.py").write_text(worker("one"))
    path = os.pathsep.join([str(package.parent), versions.environment["PYTHONPATH"]])
    environment = notes.environment | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    config = config_for(origin.address, certificate, site='worker = "edge_of_a_test.chat:fetch"\n')
    with (
        Tunnel(None, certificate, config=config, environment=environment) as tunnel,
        connect_tls(tunnel) as client,
    ):
        assert upgrade(client).status == 101
        assert _says(tunnel) == "418 one"
        (package / "chat.py").write_text(worker("two"))
        reloaded(tunnel)
        reloaded(tunnel)
        assert _says(tunnel) == "418 one"
        assert [line.split()[1] for line in notes.read()] == ["setup"]
        upgraded(tunnel)
        assert _says(tunnel) == "418 two"
        _echoes(client)
        assert not notes.pids("one teardown")
    old, new = notes.pids("one setup")[0], notes.pids("two setup")[-1]
    # The upgrade's probe has a setup of its own; each process that served has its teardown at its end.
    assert old in notes.pids("one teardown")
    assert new in notes.pids("two teardown")


def test_an_upgrade_loads_the_present_files(started: Started, notes: Notes, tmp_path: Path) -> None:
    versions = Versions(tmp_path / "versions")
    with (
        started(worker("one"), environment=dict(versions.environment)) as tunnel,
        connect_tls(tunnel) as client,
    ):
        assert upgrade(client).status == 101
        written(tunnel, worker("two"))
        upgraded(tunnel)
        assert _says(tunnel) == "418 two"
        _echoes(client)
        written(tunnel, "nonsense\n")
        said = upgraded(tunnel, status=1)
        assert "worker.py:1" in said
        assert _says(tunnel) == "418 two"
        _echoes(client)


# --- workers that are held --------------------------------------------------------------------------------------------

HOLD = f"""{NOTES}
async def setup(config):
    return "held"


async def fetch(request, env):
    if "hold" in request.path:
        while not (FOLDER / "let go").exists():
            time.sleep(0.02)
    return Reply(418, env) if "version" in request.path else request
"""


def test_a_thread_that_never_responds_is_replaced(started: Started, notes: Notes) -> None:
    with (
        started(HOLD, site='worker_timeout = "300ms"\n', errors_expected=True) as tunnel,
        connect_tls(tunnel) as client,
    ):
        assert upgrade(client).status == 101
        reloaded(tunnel)
        threads = _threads(tunnel)
        assert _says(tunnel, "/hold").startswith("504 ")
        assert _says(tunnel).startswith("504 ")
        written(tunnel, worker("two"))
        reloaded(tunnel)
        (record,) = tunnel.records("edge thread replaced")
        assert f"{tunnel.folder}/worker.py:" in record["place"]
        assert _says(tunnel) == "418 two"
        _echoes(client)
        (notes.folder / "let go").touch()
        eventually(lambda: _threads(tunnel) <= threads)
        assert _says(tunnel) == "418 two"


def test_a_blocked_thread_and_a_refused_reload(started: Started, notes: Notes) -> None:
    """The old worker works again once it is released, and the next reload takes effect."""
    with started(HOLD, site='worker_timeout = "300ms"\n', errors_expected=True) as tunnel:
        assert _says(tunnel, "/hold").startswith("504 ")
        written(tunnel, "async def fetch(r, e): ...\nasync def setup(c):\n    raise ValueError\n")
        line = not_reloaded(tunnel)
        assert "worker.py:3: ValueError" in line
        (notes.folder / "let go").touch()
        eventually(lambda: _says(tunnel) == "418 held", timeout=4)
        written(tunnel, worker("two"))
        reloaded(tunnel)
        assert _says(tunnel) == "418 two"


def test_a_refused_first_worker_and_then_a_valid_one(
    started: Started, origin: RawOrigin, certificate: Certificate
) -> None:
    with started(worker("one")) as tunnel:
        reloaded(tunnel, config_for(origin.address, certificate))
        written(tunnel, "async def fetch(r, e): ...\nasync def setup(c):\n    raise ValueError\n")
        with_one = config_for(origin.address, certificate, site=FETCH)
        line = not_reloaded(tunnel, with_one)
        assert "ValueError" in line
        written(tunnel, worker("two"))
        reloaded(tunnel, with_one)
        assert _says(tunnel) == "418 two"


@pytest.mark.parametrize(
    "ends",
    [
        "raise ValueError('no')",
        "import sys; sys.exit(1)",
        "task = asyncio.ensure_future(asyncio.sleep(60)); task.cancel(); await task",
    ],
)
def test_a_failed_teardown_does_not_block_the_others(started: Started, notes: Notes, ends: str) -> None:
    """At a reload and at exit: it is logged, and the rest continues. The third case is how tasks are cancelled."""
    code = worker("one").replace('note("one teardown", env["version"])', f'note("one teardown"); {ends}')
    with started(code) as tunnel:
        reloaded(tunnel)
        record = tunnel.wait_record(lambda record: record["event"] == "edge worker teardown failed")
        assert record["worker"].endswith("worker.py:fetch")
        assert _says(tunnel) == "418 one"
        assert tunnel.stop() == 0
        assert len(tunnel.records("edge worker teardown failed")) == 2
        assert len(notes.pids("one teardown")) == 2


# --- many -------------------------------------------------------------------------------------------------------------


def test_many_reloads_leave_nothing(started: Started, notes: Notes) -> None:
    """No memory, thread or descriptor, whether they are refused or not."""
    megabyte = f"DATA = bytearray(os.urandom(1 << 20))\n{worker('one')}".replace("DATA", "import os\nDATA", 1)
    with started(megabyte, measured=True) as tunnel:

        def reload(count: int) -> None:
            for number in range(count):
                written(tunnel, megabyte if number % 2 else "x = bytearray(1 << 20)\n" + "raise ValueError\n")
                (reloaded if number % 2 else not_reloaded)(tunnel)
                assert _says(tunnel) == "418 one"

        reload(4)
        eventually(lambda: len(notes.pids("one teardown")) == len(notes.pids("one setup")) - 1)
        memory, descriptors, threads = tunnel.rss(), tunnel.descriptors(), _threads(tunnel)
        reload(16)
        eventually(lambda: len(notes.pids("one teardown")) == len(notes.pids("one setup")) - 1)
        eventually(lambda: tunnel.rss() < memory + (5 << 20))
        assert tunnel.descriptors() <= descriptors + 2
        assert _threads(tunnel) <= threads + 1


def _threads(tunnel: Tunnel) -> int:
    return len(list(Path(f"/proc/{tunnel.pid}/task").iterdir()))
