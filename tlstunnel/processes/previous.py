"""The previous format, so that a running tunnel can be upgraded from it and downgraded to it.

Format 2 was used up to commit 3f58777. Its messages are those of format 3, without those of the ledger; its children
all serve. The ledger ends before a downgrade, and its askers count for themselves.

A child does not learn that an earlier release replaced its parent, so it always understands both formats.

Tested by tests/promises/test_upgrade_between_versions.py.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from tlstunnel.metrics.families import FAMILIES, SITE_FAMILIES
from tlstunnel.metrics.snapshot import Snapshot

FORMAT = 2

_NEW = ("usage", "observer_key", "throttles", "admin_socket", "log_key", "loads", "who")
"""What an earlier release does not use, of the handover."""


def upgrade_handover(text: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a handover of format 2 to the current format."""
    return {**text}


def downgrade_handover(text: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a handover of the current format to format 2. Only serving children are kept."""
    children = [child for child in text["children"] if child["identity"]["role"] == "serving"]
    known = {key: value for key, value in text.items() if key not in _NEW}
    return {**known, "format": FORMAT, "children": children, "metrics": _add_sites(text)}


def _add_sites(text: Mapping[str, Any]) -> Any:
    """Return the metrics with those of sites, which earlier releases count as any others."""
    if text["usage"] is None:
        return text["metrics"]
    metrics = msgspec.convert(text["metrics"], Snapshot) if text["metrics"] is not None else Snapshot()
    whole = Snapshot(metrics.families, text["usage"]["sites"])
    counters = [family for family in FAMILIES.values() if family.kind == "counter" and family.name in SITE_FAMILIES]
    found = {family.name: list(whole[family].items()) for family in counters}
    return msgspec.to_builtins(Snapshot({**metrics.families, **found}))
