"""The API: one table of paths, each with the command of `tlstunnel.commands` that it carries out.

The parameters of the query, or the fields of the JSON body, are the fields of the command; that in the path too.

Tested by tests/unit/test_admin_routes.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from tlstunnel.admin.checks import Unacceptable
from tlstunnel.commands.catalogue import COMMANDS
from tlstunnel.commands.command import AnyCommand
from tlstunnel.config.admin import Access

PREFIX = "/api/v1"

Method = Literal["GET", "POST", "DELETE"]


@dataclass(frozen=True, slots=True)
class ApiRoute:
    """A path and the name of its command.

    `parameter` is the field that is in the path, `one` the field of the result that is empty if there is no such thing.
    `hidden` fields cannot be given; `fixed` has the values of some of them. With `accepted`, the response comes when
    the command has begun, since it ends with the program.
    """

    method: Method
    path: str
    command: str
    parameter: str = ""
    one: str = ""
    accepted: bool = False
    hidden: frozenset[str] = field(default_factory=frozenset)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def type(self) -> type[AnyCommand]:
        """The type of the command."""
        return COMMANDS[self.command]

    @property
    def access(self) -> Access:
        """What it needs."""
        return "full" if self.type.acts else "read"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the command that clients may give outside of the path."""
        return tuple(name for name in self.type.__struct_fields__ if name != self.parameter and name not in self.hidden)

    def parse_query(self, parameters: Mapping[str, str], inside: Mapping[str, str]) -> AnyCommand:
        """Return the command of a request without a body. Raises Unacceptable."""
        return self._convert(parameters, inside, strict=False)

    def parse_body(self, body: bytes, inside: Mapping[str, str]) -> AnyCommand:
        """Return the command of a request with a JSON body, or with none. Raises Unacceptable."""
        try:
            fields = msgspec.json.decode(body) if body.strip() else {}
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise Unacceptable(400, "the body should be a JSON object") from None
        if not isinstance(fields, dict):
            raise Unacceptable(400, "the body should be a JSON object")
        return self._convert(fields, inside, strict=True)

    def _convert(self, given: Mapping[str, Any], inside: Mapping[str, str], *, strict: bool) -> AnyCommand:
        for name in given:
            if name not in self.fields:
                known = f"known are {', '.join(self.fields)}" if self.fields else "there are none here"
                raise Unacceptable(400, f"unknown parameter; {known}")
        fields = {**self.fixed, **given, **({self.parameter: next(iter(inside.values()))} if self.parameter else {})}
        try:
            return msgspec.convert(fields, self.type, strict=strict)
        except msgspec.ValidationError as error:
            raise Unacceptable(400, f"invalid parameter: {error}") from None


_FILTERS = frozenset({"site", "client", "origin", "tag", "older", "confirm"})

ROUTES = (
    ApiRoute("GET", "/status", "status", hidden=frozenset({"metrics"}), fixed={"metrics": "shown"}),
    ApiRoute("GET", "/tunnels", "tunnels"),
    ApiRoute("GET", "/tunnels/{id}", "tunnels", "id", "tunnels"),
    ApiRoute("DELETE", "/tunnels/{id}", "end tunnels", "id", hidden=_FILTERS),
    ApiRoute("POST", "/tunnels/end", "end tunnels"),
    ApiRoute("GET", "/sites", "sites", hidden=frozenset({"sites"})),
    ApiRoute("GET", "/sites/{name}", "sites", "site", "sites", hidden=frozenset({"sites"})),
    ApiRoute("POST", "/sites/{name}/throttle", "throttle", "site"),
    ApiRoute("POST", "/sites/{name}/release", "release", "site"),
    ApiRoute("POST", "/sites/{name}/mute", "mute", "site"),
    ApiRoute("GET", "/origins", "origins", hidden=frozenset({"sites"})),
    ApiRoute("GET", "/certificates", "certificates"),
    ApiRoute("GET", "/refusals", "refusals"),
    ApiRoute("GET", "/refusals/{id}", "refusals", "id", "refusals"),
    ApiRoute("GET", "/usage", "usage"),
    ApiRoute("GET", "/usage/{site}", "usage", "site"),
    ApiRoute("GET", "/notices", "notices"),
    ApiRoute("POST", "/notices/{id}/ack", "ack", "id"),
    ApiRoute("GET", "/configuration", "configuration"),
    ApiRoute("GET", "/loads", "loads"),
    ApiRoute("POST", "/reload", "reload"),
    ApiRoute("POST", "/drain", "drain", accepted=True),
)
