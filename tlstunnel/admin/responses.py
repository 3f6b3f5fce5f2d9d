"""Responses: JSON, errors, files, and the fields that every one of them has.

Tested by tests/promises/test_admin_security.py.
"""

from collections.abc import Mapping
from email.utils import formatdate
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Send

from tlstunnel.admin.bodies import Problem
from tlstunnel.admin.checks import Unacceptable
from tlstunnel.admin.static import API_POLICY, StaticFile

_FIXED = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}

_DEFAULTS = {"content-security-policy": API_POLICY, "cache-control": "no-store"}


def make_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with a value as JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def make_error(status: int, problem: str, *more: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with an error."""
    problems = [problem, *more]
    return make_json(Problem("; ".join(problems), problems), status, headers)


def make_refusal(refusal: Unacceptable) -> Response:
    """Return the response to a request that is refused."""
    return make_error(refusal.status, str(refusal), headers=refusal.headers)


def make_file(file: StaticFile, *, accept_encoding: str, if_none_match: str) -> Response:
    """Return a file, compressed for those who accept that, or that it has not changed."""
    headers = {
        "content-security-policy": file.policy,
        "cache-control": "no-cache",
        "etag": file.etag,
        "vary": "Accept-Encoding",
    }
    if if_none_match == file.etag:
        return Response(None, 304, headers)
    if file.compressed is not None and "gzip" in accept_encoding:
        return Response(file.compressed, 200, {**headers, "content-encoding": "gzip"}, file.media_type)
    return Response(file.content, 200, headers, file.media_type)


def add_fields(send: Send) -> Send:
    """Return a `send` that adds to each response the fields that all have."""

    async def send_with_fields(message: Message) -> None:
        if message["type"] in {"http.response.start", "websocket.http.response.start"}:
            present = {name for name, _ in message["headers"]}
            added = {**_DEFAULTS, **_FIXED, "date": formatdate(usegmt=True)}
            message["headers"] = [
                *message["headers"],
                *((name.encode(), value.encode()) for name, value in added.items() if name.encode() not in present),
            ]
        await send(message)

    return send_with_fields
