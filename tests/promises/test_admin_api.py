"""The API says what its description promises, and the same as the control socket."""

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest
from openapi_schema_validator import OAS31Validator

from tests.harness import Certificate, RawOrigin
from tests.promises.administered import ALICE, RITA, Admin, Reply, administered
from tests.promises.counted import hold
from tests.promises.listed import clients_of
from tlstunnel.admin.openapi import describe


@pytest.fixture(scope="module")
def admin(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    folder = tmp_path_factory.mktemp("api")
    site = "guideline = 1\n[[sites.rate_limits]]\nname = 'r'\nlimit = '1000/minute'"
    with (
        RawOrigin(hold) as origin,
        administered(certificate, folder, origin=origin.address, site=site, top="processes = 2") as tunnel,
        clients_of(tunnel, 3),
    ):
        yield Admin(tunnel)


def check(path: str, method: str, reply: Reply) -> Any:
    """Compare a response with the description, and return its JSON."""
    description = describe()
    operation = description["paths"][path][method.lower()]
    found = operation["responses"].get(str(reply.status), operation["responses"]["default"])
    schema = {**found["content"]["application/json"]["schema"], "components": description["components"]}
    errors = [f"{error.json_path}: {error.message}" for error in OAS31Validator(schema).iter_errors(reply.json)]
    assert errors == [], (path, reply)
    return reply.json


GETS = [
    path
    for path, item in describe()["paths"].items()
    if "get" in item and "{" not in path and path not in {"/metrics", "/api/v1/history"}
]


@pytest.mark.parametrize("path", GETS)
def test_what_can_be_read(admin: Admin, path: str) -> None:
    reply = admin.ask("GET", path)
    assert reply.status == 200, reply
    check(path, "GET", reply)


def test_one_of_each(admin: Admin) -> None:
    paths = describe()["paths"]
    values: dict[str, Callable[[], str]] = {
        "/api/v1/tunnels/{id}": lambda: str(admin.get("/api/v1/tunnels")["tunnels"][0]["id"]),
        "/api/v1/sites/{name}": lambda: "localhost",
        "/api/v1/usage/{site}": lambda: "localhost",
    }
    for path, item in paths.items():
        if "get" not in item or "{" not in path:
            continue
        inside = path[path.index("{") : path.index("}") + 1]
        if path in values:
            reply = admin.ask("GET", path.replace(inside, quote(values[path]())))
            assert reply.status == 200, (path, reply)
            check(path, "GET", reply)
        missing = admin.ask("GET", path.replace(inside, "nothing"))
        assert missing.status in {404, 409}, (path, missing)
        check(path, "GET", missing)


def test_the_same_as_on_the_control_socket(admin: Admin) -> None:
    by_http = admin.get("/api/v1/status")
    by_control = {name: value for name, value in admin.tunnel.status().items() if name != "ok"}
    assert by_http.keys() == by_control.keys()
    for name in ("version", "generation", "process", "listening", "dashboard"):
        assert by_http[name] == by_control[name]
    assert sum(one["tunnels"] for one in by_http["processes"]) == 3


def test_the_overview(admin: Admin) -> None:
    overview = admin.get("/api/v1/overview")
    assert overview["tunnels"] == 3
    assert overview["totals"]["opened"] == 3
    assert [one["process"] for one in overview["processes"]] == admin.tunnel.pids
    assert overview["memory"] > 1 << 20


@pytest.mark.parametrize("query", ["", "?since=7d&points=10", "?site=localhost&since=30d"])
def test_the_history(admin: Admin, query: str) -> None:
    reply = admin.ask("GET", f"/api/v1/history{query}")
    # There is no file before the ledger has made it.
    assert reply.status in {200, 503}
    check("/api/v1/history", "GET", reply)


@pytest.mark.parametrize(
    "target",
    [
        "/api/v1/status?x=1",
        "/api/v1/usage?site=1&site=2",
        "/api/v1/notices?most=x",
        "/api/v1/history?since=1h",
        "/api/v1/history?points=0",
        "/api/v1/history?points=99999999999999999999999",
        "/api/v1/history?nothing=1",
        "/api/v1/overview?x=1",
        "/openapi.json?x=1",
        "/metrics?x=1",
    ],
)
def test_parameters_that_are_refused(admin: Admin, target: str) -> None:
    reply = admin.ask("GET", target)
    assert reply.status == 400
    assert reply.json["problems"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/v1/reload"), ("POST", "/api/v1/status"), ("PUT", "/")])
def test_methods(admin: Admin, method: str, path: str) -> None:
    reply = admin.ask(method, path, token=ALICE)
    assert reply.status == 405
    assert reply.headers["Allow"]


def test_head(admin: Admin) -> None:
    for path in ("/healthz", "/", "/api/v1/status"):
        reply = admin.send(f"HEAD {path} HTTP/1.1\r\nHost: {admin.host}\r\nConnection: close\r\n\r\n".encode())
        assert reply.status == 200


def test_metrics(admin: Admin) -> None:
    reply = admin.ask("GET", "/metrics")
    assert reply.status == 200
    assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b"tlstunnel_connections_accepted_total" in reply.body
    opened = admin.ask("GET", "/metrics", {"Accept": "application/openmetrics-text; version=1.0.0"})
    assert opened.body.endswith(b"# EOF\n")


def test_pages_are_compressed_and_not_sent_twice(admin: Admin) -> None:
    reply = admin.ask("GET", "/", {"Accept-Encoding": "gzip"})
    assert reply.headers["Content-Encoding"] == "gzip"
    assert admin.ask("GET", "/", {"If-None-Match": reply.headers["ETag"]}).status == 304


def test_an_action_and_its_result(admin: Admin) -> None:
    assert check("/api/v1/reload", "POST", admin.ask("POST", "/api/v1/reload", body={}, token=ALICE)) == {"changes": []}
    muted = admin.ask("POST", "/api/v1/sites/localhost/mute", body={"seconds": 60}, token=ALICE)
    assert check("/api/v1/sites/{name}/mute", "POST", muted)["who"] == "token alice"
    unknown = admin.ask("POST", "/api/v1/sites/nothing/mute", body={"seconds": 60}, token=ALICE)
    assert unknown.status == 409
    assert "there is no site" in check("/api/v1/sites/{name}/mute", "POST", unknown)["error"]
    assert admin.ask("POST", "/api/v1/sites/localhost/mute?seconds=5", body={}, token=ALICE).status == 400
    assert admin.ask("POST", "/api/v1/sites/localhost/mute", body={"seconds": 60}, token=RITA).status == 403
