"""The previous format, so that a running tunnel can be upgraded from it and downgraded to it.

Format 2 was used up to commit 3f58777. Its messages are those of format 3, without those of the ledger; its children
all serve. The ledger ends before a downgrade, and its askers count for themselves.

A child does not learn that an earlier release replaced its parent, so it always understands both formats.

Tested by tests/promises/test_upgrade_between_versions.py.
"""

from collections.abc import Mapping
from typing import Any

FORMAT = 2

_NEW = ("usage", "observer_key", "throttles", "admin_socket")
"""What an earlier release does not use, of the handover."""


def upgrade_handover(text: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a handover of format 2 to the current format."""
    return {**text}


def downgrade_handover(text: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a handover of the current format to format 2. Only serving children are kept."""
    children = [child for child in text["children"] if child["identity"]["role"] == "serving"]
    known = {key: value for key, value in text.items() if key not in _NEW}
    return {**known, "format": FORMAT, "children": children}
