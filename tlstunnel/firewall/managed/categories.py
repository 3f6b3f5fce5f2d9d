"""The categories of OWASP CRS's rules, by the first three digits of a rule's id. CRS 3 and 4 use the same numbers.

Tested by tests/unit/test_firewall_managed_check.py.
"""

_CATEGORIES = {
    910: "IP reputation",
    911: "method",
    912: "denial of service",
    913: "scanner",
    920: "protocol violation",
    921: "protocol attack",
    922: "multipart attack",
    930: "path traversal",
    931: "remote file inclusion",
    932: "command injection",
    933: "PHP injection",
    934: "code injection",
    941: "cross-site scripting",
    942: "SQL injection",
    943: "session fixation",
    944: "Java attack",
    949: "anomaly score",
}


LOG4SHELL = 99_900_044
"""The id of the tunnel's own rule, in ``log4shell.conf``."""


def name_category(rule: int) -> str:
    """Return what a rule of CRS looks for, or "own rule" for an id outside 900000 to 999999, which are those of CRS."""
    if rule == LOG4SHELL:
        return _CATEGORIES[944]
    return _CATEGORIES.get(rule // 1000, "other" if 900_000 <= rule <= 999_999 else "own rule")
