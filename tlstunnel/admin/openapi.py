"""The description of the API in OpenAPI 3.1, made from the types of the commands and their results.

Source: https://spec.openapis.org/oas/v3.1.1.

Tested by tests/unit/test_admin_openapi.py.
"""

from functools import cache
from typing import Any

import msgspec

from tlstunnel import __version__
from tlstunnel.admin.history import HistoryQuery, HistoryResult
from tlstunnel.admin.overview import Overview
from tlstunnel.admin.routes import PREFIX, ApiRoute, list_routes
from tlstunnel.commands.processes import ReadyResult

_REFERENCE = "#/components/schemas/{name}"


class Problem(msgspec.Struct, frozen=True):
    """Why a request was refused, or failed. `error` has all problems in one line."""

    error: str
    problems: list[str]


class Alive(msgspec.Struct, frozen=True):
    """The admin process responds."""

    alive: bool


class LoginBody(msgspec.Struct, frozen=True):
    """A token, as in a file of `admin.tokens`."""

    token: str


class LoggedIn(msgspec.Struct, frozen=True):
    """A session has begun, for so many seconds. `csrf` has to be sent with each action, in the field X-CSRF-Token."""

    name: str
    access: str
    csrf: str
    seconds: float


class LoggedOut(msgspec.Struct, frozen=True):
    """The session is over."""


class SessionResult(msgspec.Struct, frozen=True):
    """Who sends this request, and what they may do: "read", or "full" for actions too."""

    who: str
    access: str
    logged_in: bool


class Begun(msgspec.Struct, frozen=True):
    """It has begun, and goes on."""


@cache
def describe() -> dict[str, Any]:
    """Return the description."""
    routes = list(list_routes())
    types: list[Any] = [
        *(route.type for route in routes),
        *(route.type.result for route in routes),
        *(Problem, Alive, ReadyResult, LoginBody, LoggedIn, LoggedOut, SessionResult, Begun),
        *(Overview, HistoryResult, HistoryQuery),
    ]
    types = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    known = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(PREFIX + route.path, {})[route.method.lower()] = _describe_route(route, known, components)
    paths |= _describe_others(known, components)
    description = {
        "openapi": "3.1.0",
        "info": {
            "title": "tlstunnel",
            "version": __version__,
            "description": "What a running tunnel reports, and can be told to do. Times are Unix times in seconds.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "tlstunnel-session"},
                "certificate": {"type": "mutualTLS"},
            },
        },
        "security": [{}, {"token": []}, {"session": []}, {"certificate": []}],
    }
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(description))  # the defaults of arrays are tuples
    return plain


def _describe_route(route: ApiRoute, known: dict[Any, Any], components: dict[str, Any]) -> dict[str, Any]:
    command = route.type
    parameters = [_describe_inside(route, components[command.__name__])]
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()} {route.path}",
        "summary": _summarise(command),
        "parameters": [one for one in parameters if one is not None],
        "responses": _describe_responses(known[command.result], known[Problem]),
    }
    if route.accepted:
        operation["responses"]["202"] = _describe_content("It has begun.", known[Begun])
    properties = components[command.__name__].get("properties", {})
    required = components[command.__name__].get("required", [])
    if route.method == "POST":
        operation["requestBody"] = {
            "required": any(name in required for name in route.fields),
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "properties": {name: properties[name] for name in route.fields},
                        "required": [name for name in route.fields if name in required],
                        "additionalProperties": False,
                    }
                }
            },
        }
    else:
        operation["parameters"] += [
            {"name": name, "in": "query", "required": name in required, "schema": properties[name]}
            for name in route.fields
        ]
    if command.acts:
        operation["security"] = [{"token": []}, {"session": []}, {"certificate": []}]
    return operation


def _describe_inside(route: ApiRoute, schema: dict[str, Any]) -> dict[str, Any] | None:
    if not route.parameter:
        return None
    name = route.path.partition("{")[2].partition("}")[0]
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _describe_others(known: dict[Any, Any], components: dict[str, Any]) -> dict[str, Any]:
    query = components[HistoryQuery.__name__]["properties"]
    login = {"required": True, "content": {"application/json": {"schema": known[LoginBody]}}}
    text = {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}

    def get(name: str, summary: str, schema: Any, **more: Any) -> dict[str, Any]:
        return {
            "get": {
                "operationId": name,
                "summary": summary,
                "responses": _describe_responses(schema, known[Problem]),
                **more,
            }
        }

    ready = get("ready", "Report whether new connections are accepted.", known[ReadyResult], security=[])
    ready["get"]["responses"]["503"] = _describe_content("They are not.", known[ReadyResult])
    return {
        "/healthz": get("alive", "Report that the admin process responds.", known[Alive], security=[]),
        "/readyz": ready,
        "/metrics": {
            "get": {
                "operationId": "metrics",
                "summary": "Report the metrics for Prometheus, as OpenMetrics on request.",
                "responses": {"200": text, "default": _describe_content("It failed.", known[Problem])},
            }
        },
        "/login": {
            "post": {
                "operationId": "login",
                "summary": "Begin a session of a browser.",
                "requestBody": login,
                "responses": _describe_responses(known[LoggedIn], known[Problem]),
                "security": [],
            }
        },
        "/logout": {
            "post": {
                "operationId": "logout",
                "summary": "End the session.",
                "responses": _describe_responses(known[LoggedOut], known[Problem]),
            }
        },
        f"{PREFIX}/overview": get("overview", "Report what a glance shows.", known[Overview]),
        f"{PREFIX}/session": get("session", "Report who one is.", known[SessionResult]),
        f"{PREFIX}/history": get(
            "history",
            "Report use over time, of a site or of all together.",
            known[HistoryResult],
            parameters=[{"name": name, "in": "query", "schema": schema} for name, schema in query.items()],
        ),
    }


def _describe_responses(schema: Any, problem: Any) -> dict[str, Any]:
    return {
        "200": _describe_content("Done.", schema),
        "default": _describe_content("It was refused, or failed.", problem),
    }


def _describe_content(text: str, schema: Any) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _summarise(command: type[msgspec.Struct]) -> str:
    return " ".join((command.__doc__ or "").partition("\n\n")[0].split())
