"""The table of the API: each path has a command, and parameters are its fields."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlstunnel.admin.checks import Unacceptable
from tlstunnel.admin.routes import ROUTES, ApiRoute
from tlstunnel.commands.catalogue import COMMANDS
from tlstunnel.commands.usage import MuteSite, Notices, ThrottleSite

NOTICES = next(route for route in ROUTES if route.path == "/notices")
MUTE = next(route for route in ROUTES if route.path.endswith("/mute"))
THROTTLE = next(route for route in ROUTES if route.path.endswith("/throttle"))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_a_route_fits_its_command(route: ApiRoute) -> None:
    assert route.type is COMMANDS[route.command]
    assert (route.access == "full") is route.type.acts
    assert (route.method == "GET") is not route.type.acts
    inside = re.findall(r"\{(\w+)\}", route.path)
    assert len(inside) == bool(route.parameter)
    assert not route.parameter or route.parameter in route.type.__struct_fields__
    assert not route.one or route.one in route.type.result.__struct_fields__
    assert route.hidden <= set(route.type.__struct_fields__)


def test_no_path_is_there_twice() -> None:
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)


def test_parameters_of_a_query_are_converted() -> None:
    assert NOTICES.parse_query({"site": "a.test", "most": "5"}, {}) == Notices(site="a.test", most=5)
    assert NOTICES.parse_query({}, {}) == Notices()


def test_fields_of_a_body_are_not() -> None:
    assert MUTE.parse_body(b'{"seconds": 5}', {"name": "a.test"}) == MuteSite("a.test", 5.0)
    with pytest.raises(Unacceptable, match="invalid parameter"):
        MUTE.parse_body(b'{"seconds": "5"}', {"name": "a.test"})
    body = b'{"rate": "1/second", "seconds": 5, "why": "w"}'
    assert THROTTLE.parse_body(body, {"name": "a"}) == ThrottleSite(site="a", rate="1/second", seconds=5.0, why="w")


@pytest.mark.parametrize("query", [{"nothing": "1"}, {"most": "x"}, {"most": ""}, {"most": "1e400"}])
def test_other_parameters_are_refused(query: dict[str, str]) -> None:
    with pytest.raises(Unacceptable) as caught:
        NOTICES.parse_query(query, {})
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "body",
    [b"[]", b"1", b"{", b"\xff", b'{"seconds": 1, "site": "b"}', b"{}", b"[" * 60_000, b'{"seconds": 1, "x": 1}'],
)
def test_other_bodies_are_refused(body: bytes) -> None:
    """A site in the body would not be the one of the path."""
    with pytest.raises(Unacceptable) as caught:
        MUTE.parse_body(body, {"name": "a.test"})
    assert caught.value.status == 400


@given(st.binary(max_size=200))
def test_any_body(body: bytes) -> None:
    try:
        command = MUTE.parse_body(body, {"name": "a.test"})
    except Unacceptable:
        return
    assert isinstance(command, MuteSite)
