"""The description of the API is valid, complete, and has every command that HTTP knows."""

from openapi_spec_validator import validate

from tlstunnel.admin.access import AccessControl
from tlstunnel.admin.app import LIVE, AdminApp
from tlstunnel.admin.live import Live
from tlstunnel.admin.openapi import describe
from tlstunnel.admin.routes import PREFIX, ROUTES


async def ask(*_: object) -> dict[str, object]:
    return {}


def test_the_description_is_valid() -> None:
    validate(describe())


def test_every_path_is_described_and_nothing_else() -> None:
    app = AdminApp(AccessControl(), ask, Live(ask), None)
    served = {(next(iter(one.route.methods - {"HEAD"})), one.route.path) for one in app._endpoints if one.route.methods}
    served |= {("GET", "/healthz"), ("GET", "/readyz")}
    described = {(method.upper(), path) for path, item in describe()["paths"].items() for method in item}
    pages = {(method, path) for method, path in served if path in {"/", "/try", "/openapi.json"} or "/static/" in path}
    assert described == served - pages
    assert LIVE not in describe()["paths"], "OpenAPI has no WebSockets"


def test_actions_say_that_they_need_a_token() -> None:
    paths = describe()["paths"]
    for route in ROUTES:
        operation = paths[PREFIX + route.path][route.method.lower()]
        assert ("security" in operation) is route.type.acts
        assert all(one != {} for one in operation.get("security", []))
        assert operation["summary"]
