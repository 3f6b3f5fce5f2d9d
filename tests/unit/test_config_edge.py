"""The `worker*` keys of a site: their values, the errors in wrong ones, and what `config show` hides."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.commands import run_main
from tlstunnel.cli.config import command
from tlstunnel.config import Config, SiteConfig, Timeout, WorkerTable, decode, load
from tlstunnel.errors import ConfigurationError
from tlstunnel.serving.changes import describe_changes

FOLDER = Path("/etc/tlstunnel")
SITE = '[[sites]]\norigins = ["localhost:3000"]\n'
WORKER = f'{SITE}worker = "edge/chat.py:fetch"\n'


def decoded(text: str) -> SiteConfig:
    (site,) = decode(text, FOLDER, "t.toml").sites
    return site


def refusal(text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        decode(text, FOLDER, "t.toml")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_without_one() -> None:
    site = decoded(SITE)
    assert (site.worker, site.worker_config, site.worker_origins) == (None, WorkerTable(), ())
    assert (site.worker_timeout, site.worker_on_error) == (Timeout(1), "refuse")


def test_every_key() -> None:
    site = decoded(
        WORKER + 'worker_config = { url = "valkey://localhost", deep = { a = [1, { b = 2.5 }] }, on = true }\n'
        'worker_origins = ["10.0.0.0/8", "*.Shards.internal."]\nworker_timeout = "250ms"\nworker_on_error = "forward"\n'
    )
    assert site.worker == "/etc/tlstunnel/edge/chat.py:fetch"
    assert site.worker_config == {"url": "valkey://localhost", "deep": {"a": [1, {"b": 2.5}]}, "on": True}
    assert site.worker_origins == ("10.0.0.0/8", "*.shards.internal")
    assert (site.worker_timeout, site.worker_on_error) == (Timeout(0.25), "forward")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("chat.py:fetch", "/etc/tlstunnel/chat.py:fetch"),
        ("./edge/../chat.py:fetch", "/etc/tlstunnel/edge/../chat.py:fetch"),
        ("/srv/a b/chat.py:_fetch2", "/srv/a b/chat.py:_fetch2"),
        ("/srv/a:b/chat.py:fetch", "/srv/a:b/chat.py:fetch"),
        ("C.py.py:f", "/etc/tlstunnel/C.py.py:f"),
        ("package:fetch", "package:fetch"),
        ("package.module_2:fetch", "package.module_2:fetch"),
        ("bücher.modul:fetch", "bücher.modul:fetch"),
    ],
)
def test_references(written: str, meant: str) -> None:
    assert decoded(f'{SITE}worker = "{written}"\n').worker == meant


@pytest.mark.parametrize(
    "written",
    [
        '""',
        '"chat"',
        '"chat.py"',
        '"chat.py:"',
        '":fetch"',
        '".py:fetch"',
        '"chat.py:fetch()"',
        '"chat.py:a.b"',
        '"chat.py:2a"',
        '"edge/chat:fetch"',
        '".relative:fetch"',
        '"package..module:fetch"',
        '"package.:fetch"',
        '"2package:fetch"',
        '"package-module:fetch"',
        '"package:fetch:more"',
        '"a\\u0000b.py:fetch"',
        '"chat.py:fetch\\n"',
        "5",
        "true",
        '["chat.py:fetch"]',
        "{}",
    ],
)
def test_invalid_references(written: str) -> None:
    message = refusal(f"{SITE}worker = {written}\n")
    assert ":3: sites[0].worker: " in message or "line 3: sites[0].worker: " in message
    assert 'expected "edge/chat.py:fetch" or "package.module:fetch", got ' in message


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.1", "10.0.0.1/32"),
        ("2001:DB8:0::/32", "2001:db8::/32"),
        ("::1", "::1/128"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("Chat.Internal.", "chat.internal"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("*.shards.internal", "*.shards.internal"),
        ("localhost", "localhost"),
        ("_tcp_service", "_tcp_service"),
    ],
)
def test_origins(written: str, meant: str) -> None:
    assert decoded(f'{WORKER}worker_origins = ["{written}"]\n').worker_origins == (meant,)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ('["*"]', "open relay"),
        ('["10.0.0.1/8"]', "bits set after the /8"),
        ('["10.0.0.0/33"]', "is not a network"),
        ('["::ffff:10.0.0.0/104"]', "IPv4-mapped"),
        ('["fe80::1%eth0"]', "is not a network"),
        ('["127.1"]', "is not a network"),
        ('["2130706433"]', "is not a network"),
        ('["0x7f.1"]', "is not a host name"),
        ('["127.0.0.1:80"]', "has a port"),
        ('["chat.internal:80"]', "has a port"),
        ('["*.1"]', "is not a host name"),
        ('["*."]', "is not a host name"),
        ('["a.*.internal"]', "is not a host name"),
        ('["**.internal"]', "is not a host name"),
        ('["ws://chat.internal"]', ""),
        ('["unix:/run/chat.sock"]', ""),
        ('["chat.internal/"]', "is not a network"),
        ('[""]', ""),
        ('["a b"]', ""),
        ("[5]", ""),
        ('"10.0.0.0/8"', ""),
    ],
)
def test_invalid_origins(written: str, said: str) -> None:
    message = refusal(f"{WORKER}worker_origins = {written}\n")
    assert "sites[0].worker_origins" in message
    assert said in message


@pytest.mark.parametrize("written", ['""', "5", "[]", "true", '["a"]'])
def test_invalid_tables(written: str) -> None:
    message = refusal(f"{WORKER}worker_config = {written}\n")
    assert "sites[0].worker_config: expected a table such as { url =" in message


@pytest.mark.parametrize("written", ['"0s"', '"1"', "1", '"off"', '"-1s"', '"367d"'])
def test_invalid_timeouts(written: str) -> None:
    assert "sites[0].worker_timeout" in refusal(f"{WORKER}worker_timeout = {written}\n")


@pytest.mark.parametrize("written", ['"block"', "true", '""'])
def test_invalid_on_error(written: str) -> None:
    assert "sites[0].worker_on_error" in refusal(f"{WORKER}worker_on_error = {written}\n")


@pytest.mark.parametrize(
    "line",
    [
        "worker_config = { a = 1 }",
        'worker_origins = ["10.0.0.0/8"]',
        'worker_timeout = "2s"',
        'worker_on_error = "forward"',
    ],
)
def test_keys_without_a_worker(line: str) -> None:
    message = refusal(f"{SITE}{line}\n")
    key = line.partition(" ")[0]
    assert f"sites[0].{key}: requires worker" in message
    assert ":3" in message or "line 3" in message


def test_an_unknown_key_has_a_hint() -> None:
    assert "worker_origins" in refusal(f'{WORKER}worker_origin = ["a"]\n')


def test_a_route_has_no_worker() -> None:
    route = '[[sites.routes]]\npath = "/a"\norigins = ["a:1"]\nworker = "a.py:f"\n'
    assert "sites[0].routes[0]" in refusal(SITE + route)


def test_trust_in_origins_may_be_for_origins_that_a_worker_chooses() -> None:
    assert decoded(f'{WORKER}worker_origins = ["a.internal"]\norigin_ca = "ca.pem"\n').origin_ca
    assert "origin_ca" in refusal(f'{WORKER}origin_ca = "ca.pem"\n')


def test_equal_tables_have_one_hash() -> None:
    """Whatever the order of their keys."""
    one, two = WorkerTable({"a": 1, "b": {"c": 2, "d": 3}}), WorkerTable({"b": {"d": 3, "c": 2}, "a": 1})
    assert one == two
    assert hash(WorkerTable(a=1)) == hash(WorkerTable(a=1))
    hash(WorkerTable(a=[1, {"b": 2}]))
    assert hash(one) == hash(two)


def test_the_changes_that_a_reload_reports_hold_no_secret() -> None:
    def config(secret: str) -> Config:
        return decode(f'{WORKER}worker_config = {{ token = "{secret}" }}\n', FOLDER, "t.toml")

    assert describe_changes(config("s3cret-1"), config("s3cret-2")) == ["site *: changed: worker_config"]


# --- config show, config schema, config check -------------------------------------------------------------------------


def shown(tmp_path: Path, text: str, what: str = "show") -> str:
    (tmp_path / "t.toml").write_text(text)
    result = CliRunner().invoke(command, [what, str(tmp_path / "t.toml")])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_is_shown_reads_back(tmp_path: Path) -> None:
    text = (
        WORKER + 'worker_origins = ["10.0.0.0/8", "a.internal"]\nworker_timeout = "2s"\nworker_on_error = "forward"\n'
        '[sites.worker_config]\ntext = "a \\"b\\" \\u007f ü"\nnumbers = [1, 2.5, -3]\nempty = {}\nnone = []\n'
        "when = 2026-01-02T03:04:05Z\n"
        'day = 2026-01-02\nbig = 1e100\ninf = inf\n"odd name" = false\n'
        'tables = [{ a = 1 }, { b = { c = [[1], [2, 3]] } }]\nmixed = [1, "a", { b = 1 }]\n'
        "[sites.worker_config.deep.deeper]\nlast = 1\n"
    )
    found = decode(shown(tmp_path, text), Path("/elsewhere"), "shown")
    assert found == load(tmp_path / "t.toml")
    assert found.sites[0].worker == f"{tmp_path}/edge/chat.py:fetch"


def test_secrets_are_hidden_at_any_depth(tmp_path: Path) -> None:
    secrets = {
        "token": '"s3cret"',
        "API_KEY": '"s3cret"',
        "client_secret": "31337",
        "Passwords": '["s3cret", "s3cret"]',
        "credentials": '{ user = "s3cret", deep = ["s3cret"] }',
        "url": '"redis://:s3cret@localhost:6379/0"',
        "urls": '["redis://a:s3cret@localhost", "redis://localhost"]',
        "deep": '{ deeper = [{ authorization = "s3cret" }, { x = ["amqp://s3cret@a"] }] }',
    }
    table = ", ".join(f"{name} = {value}" for name, value in secrets.items())
    text = f'{WORKER}worker_config = {{ {table}, plain = "said", port = 6379 }}\n'
    found = shown(tmp_path, text)
    assert "s3cret" not in found
    assert "31337" not in found
    assert 'plain = "said"' in found
    assert "port = 6379" in found
    assert "redis://localhost" in found
    assert decode(found, FOLDER, "shown").sites[0].worker_config["token"] == "(hidden)"


@pytest.mark.parametrize(
    "value",
    [
        'url = "postgres://localhost/db?user=a&password=s3cret"',
        'dsn = "host=localhost password=s3cret"',
        'pwd = "s3cret"',
    ],
)
def test_other_secrets_are_hidden(tmp_path: Path, value: str) -> None:
    assert "s3cret" not in shown(tmp_path, f"{WORKER}worker_config = {{ {value} }}\n")


def test_the_schema_has_the_keys(tmp_path: Path) -> None:
    import json  # noqa: PLC0415

    result = CliRunner().invoke(command, ["schema"])
    site: dict[str, Any] = json.loads(result.stdout)["properties"]["sites"]["items"]["properties"]
    assert site["worker_config"] == {"type": "object", "additionalProperties": True}
    assert site["worker_on_error"]["enum"] == ["refuse", "forward"]
    assert site["worker_timeout"]["default"] == "1s"
    assert set(site) >= {"worker", "worker_origins"}


def test_the_documentation_has_the_keys() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    example = text.partition("```toml\n")[2].partition("```")[0]
    keys = {"worker", "worker_config", "worker_origins", "worker_timeout", "worker_on_error"}
    assert keys <= {key for site in tomllib.loads(example)["sites"] for key in site}


def _checked(tmp_path: Path, worker: str | None) -> tuple[int, str]:
    (tmp_path / "t.toml").write_text(f'{SITE}web_origins = []\nworker = "worker.py:fetch"\n')
    if worker is not None:
        (tmp_path / "worker.py").write_text(worker)
    result = run_main("config", "check", str(tmp_path / "t.toml"))
    return result.exit_code, result.stdout + result.stderr


def test_check_loads_it(tmp_path: Path) -> None:
    status, said = _checked(tmp_path, "async def fetch(request, env): ...\n")
    assert status == 0, said
    assert f"{tmp_path}/worker.py:fetch" in said


@pytest.mark.parametrize(
    ("worker", "wrong"),
    [
        (None, "worker.py: cannot be read: No such file"),
        ("async def fetch(request, env)\n", "worker.py:1: is not valid Python"),
        ("import none_such\n", "worker.py:1: cannot be imported"),
        ("async def other(request, env): ...\n", "there is no fetch"),
    ],
)
def test_check_reports_what_is_wrong(tmp_path: Path, worker: str | None, wrong: str) -> None:
    status, said = _checked(tmp_path, worker)
    assert status == 1
    assert f"tlstunnel: {tmp_path}/t.toml:4: sites[0].worker: the edge worker " in said
    assert wrong in said
