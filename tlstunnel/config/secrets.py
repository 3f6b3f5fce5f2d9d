"""Which values ``tlstunnel config show`` hides.

Tested by tests/unit/test_config_rendering.py.
"""

import re
from typing import Any

HIDDEN = "(hidden)"
# Not compiled here: every start imports this, and few need it.
_REVEALING_NAME = r"(?i)authorization|cookie|token|secret|passw|pwd|passphrase|key|credential"
# A URL with a user, and so a password; and assignments in its query, or in the name of a data source.
_REVEALING_URL = r"(?i)://[^/\s]*@|(?:passw\w*|pwd|secret|token|key)\s*="


def hide_secrets(value: Any) -> Any:
    """Return a value of TOML without what looks like a secret, at any depth."""
    if isinstance(value, dict):
        return {
            name: HIDDEN if re.search(_REVEALING_NAME, name) else hide_secrets(inner) for name, inner in value.items()
        }
    if isinstance(value, list):
        return [hide_secrets(inner) for inner in value]
    return HIDDEN if isinstance(value, str) and re.search(_REVEALING_URL, value) else value


def hide_headers(headers: dict[str, str]) -> dict[str, str]:
    """Return headers without the values of those whose names look secret."""
    return {name: HIDDEN if re.search(_REVEALING_NAME, name) else text for name, text in headers.items()}
