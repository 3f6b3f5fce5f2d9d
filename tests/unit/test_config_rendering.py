"""`tlstunnel config show` and `config schema`: the effective configuration reads back, and the schema fits it."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.unit.test_config import KEYS, section
from tlstunnel.cli.config import command
from tlstunnel.config import Config, decode, load

EXAMPLE = section("A complete example").partition("```toml\n")[2].partition("```")[0]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "t.toml"
    file.write_text(EXAMPLE)
    return file


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_is_shown_loads_as_the_same(file: Path) -> None:
    shown = run("show", str(file))
    assert decode(shown, Path("/elsewhere"), "shown") == load(file)
    # Defaults are included.
    for key in ("drain_wait", "max_age_jitter", "strict_path", "weight", "on_error", "drain_removed"):
        assert f"\n{key} = " in shown


def test_an_empty_file_shows_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("")
    shown = run("show", str(tmp_path / "t.toml"))
    assert decode(shown, Path("/"), "shown") == Config()
    assert 'idle = "off"' in shown
    assert 'tls_handshake = "10s"' in shown


def test_possible_secrets_are_hidden(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(
        '[[sites]]\norigins = ["a:1"]\nset_headers = { Authorization = "s3", X-Api-Key = "s3", X-Site = "chat" }\n'
    )
    shown = run("show", str(tmp_path / "t.toml"))
    assert "s3" not in shown
    assert shown.count('"(hidden)"') == 2
    assert 'X-Site = "chat"' in shown


def test_any_text_reads_back(tmp_path: Path) -> None:
    body = 'a "quote", a \\, a\ttab, a\nline, \x7f, ü and \U0001f600'
    (tmp_path / "t.toml").write_text(
        f'[[sites]]\norigins = ["a:1"]\n[[sites.rules]]\nname = "r"\nwhen = "true"\naction = "block"\n'
        f"body = {json.dumps(body, ensure_ascii=False).replace(chr(127), chr(92) + 'u007f')}\n"
    )
    shown = decode(run("show", str(tmp_path / "t.toml")), tmp_path, "shown")
    assert shown.sites[0].rules[0].body == body


def _keys(schema: dict[str, Any]) -> set[str]:
    """Return the keys of every table in it."""
    own = schema.get("properties", {})
    inner = [*own.values(), *schema.get("anyOf", []), *([schema["items"]] if "items" in schema else [])]
    return set(own).union(*(_keys(one) for one in inner))


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Validate with the few keywords of JSON Schema that the schema uses."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, list):
        return all(fits(one, schema["items"]) for one in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        more = schema.get("additionalProperties", False)
        return set(schema.get("required", ())) <= set(value) and all(
            fits(one, known[name]) if name in known else more is True or (bool(more) and fits(one, more))
            for name, one in value.items()
        )
    return schema.get("minimum", 0) <= value <= schema.get("maximum", value) if isinstance(value, int) else True


def test_the_schema_has_every_key_and_fits_the_example() -> None:
    schema = json.loads(run("schema"))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert _keys(schema) >= set(KEYS)
    example = tomllib.loads(EXAMPLE)
    assert fits(example, schema)
    example["sites"][0]["wieght"] = 1
    assert not fits(example, schema)
    assert not fits(tomllib.loads(EXAMPLE.replace("weight = 1", "weight = 0")), schema)
    assert not fits(tomllib.loads(EXAMPLE.replace('"least_tunnels"', "5")), schema)
