"""The description of the API in OpenAPI 3.1, made from the types of the commands and their results.

Source: https://spec.openapis.org/oas/v3.1.1.

Tested by tests/unit/test_admin_openapi.py.
"""

from functools import cache
from typing import Any

import msgspec

from tlstunnel import __version__
from tlstunnel.admin.bodies import Alive, Begun, LoggedIn, LoggedOut, Login, Problem, SessionResult
from tlstunnel.admin.history import HistoryQuery, HistoryResult
from tlstunnel.admin.overview import Overview
from tlstunnel.admin.routes import PREFIX, ROUTES, ApiRoute
from tlstunnel.commands.processes import ReadyResult

_REFERENCE = "#/components/schemas/{name}"


@cache
def describe() -> dict[str, Any]:
    """Return the description."""
    types: list[Any] = [
        *(route.type for route in ROUTES),
        *(route.type.result for route in ROUTES),
        *(Problem, Alive, ReadyResult, Login, LoggedIn, LoggedOut, SessionResult, Begun),
        *(Overview, HistoryResult, HistoryQuery),
    ]
    types = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    known = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
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
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()} {route.path}",
        "summary": _summarise(command),
        "parameters": _describe_path(route),
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


def _describe_path(route: ApiRoute) -> list[dict[str, Any]]:
    """Describe the parameter in the path, if there is one."""
    if not route.parameter:
        return []
    name = route.path.partition("{")[2].partition("}")[0]
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]


def _describe_others(known: dict[Any, Any], components: dict[str, Any]) -> dict[str, Any]:
    """Describe the paths that carry out no command."""

    def describe(name: str, summary: str, result: Any, **more: Any) -> dict[str, Any]:
        responses = _describe_responses(known[result], known[Problem])
        return {"operationId": name, "summary": summary, "responses": responses, **more}

    ready = describe("ready", "Report whether new connections are accepted.", ReadyResult, security=[])
    ready["responses"]["503"] = _describe_content("They are not.", known[ReadyResult])
    metrics = describe("metrics", "Report the metrics for Prometheus, as OpenMetrics on request.", Problem)
    metrics["responses"]["200"] = {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    token = {"required": True, "content": {"application/json": {"schema": known[Login]}}}
    log_in = describe("login", "Begin a session of a browser.", LoggedIn, requestBody=token, security=[])
    history = describe("history", "Report use over time, of a site or of all together.", HistoryResult)
    query = components[HistoryQuery.__name__]["properties"]
    history["parameters"] = [{"name": name, "in": "query", "schema": schema} for name, schema in query.items()]
    return {
        "/healthz": {"get": describe("alive", "Report that the admin process responds.", Alive, security=[])},
        "/readyz": {"get": ready},
        "/metrics": {"get": metrics},
        "/login": {"post": log_in},
        "/logout": {"post": describe("logout", "End the session.", LoggedOut)},
        f"{PREFIX}/overview": {"get": describe("overview", "Report what a glance shows.", Overview)},
        f"{PREFIX}/session": {"get": describe("session", "Report who sends this request.", SessionResult)},
        f"{PREFIX}/history": {"get": history},
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
