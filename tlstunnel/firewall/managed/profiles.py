"""Exclusions from OWASP CRS without which ordinary WebSocket handshakes would be taken for attacks.

Each is a directive that takes effect when all rules are loaded, so it may precede the rules that it changes. All were
found by sending real handshakes to CRS 3.3.4 and 4. An id that a release does not have is ignored.

Tested by tests/unit/test_firewall_managed_rule_sets.py.
"""

from collections.abc import Mapping

DEFAULTS = (
    # CRS 3's collections by address and User-Agent: 100 bytes for each attacking address, which are never freed, and
    # useless in a process that sees only a part of the requests. CRS 4 has none.
    "SecRuleRemoveById 901318",
    "SecRuleRemoveById 901321",
    "SecRuleRemoveById 943120",  # session id without a Referer: no WebSocket client sends one (Jupyter's session_id)
    "SecRuleRemoveById 920300",  # no Accept
    "SecRuleRemoveById 920320",  # no User-Agent: libraries and devices
    "SecRuleRemoveById 920350",  # Host is an IP address: devices, home servers
)
"""For every site, at any paranoia. 920330, an empty User-Agent, stays: only tools that hide send one."""


def _exclude(target: str, *tags: str) -> tuple[str, ...]:
    return tuple(f'SecRuleUpdateTargetByTag "{tag}" "!{target}"' for tag in tags)


PROFILES: Mapping[str, tuple[str, ...]] = {
    # exec and attach send the command in the query, with its name repeated for each word.
    "kubernetes": (*_exclude("ARGS:command", "attack-rce", "attack-sqli"), "SecRuleRemoveById 921180"),
    # Classic SignalR (ASP.NET): JSON and base64 in the query.
    "signalr": (*_exclude("ARGS:connectionData", "attack-sqli"), *_exclude("ARGS:connectionToken", "attack-sqli")),
    # LogQL and PromQL are programs: pipes, braces, file names, regular expressions.
    "grafana": _exclude("ARGS:query", "attack-rce", "attack-sqli", "attack-lfi", "attack-xss", "attack-injection-php"),
    # Its JavaScript adapter keeps JSON in cookies, and iss is the URL of another host by design.
    "keycloak": (
        *_exclude("REQUEST_COOKIES:/^kc-callback/", "attack-sqli"),
        'SecRuleUpdateTargetById 931130 "!ARGS:iss"',
    ),
    # Tickets have 340 characters of base64 after ::, and some look like SQL or an HTML event handler.
    "proxmox": (
        *_exclude("ARGS:vncticket", "attack-sqli", "attack-xss"),
        *_exclude("REQUEST_COOKIES:PVEAuthCookie", "attack-sqli", "attack-xss"),
    ),
    # GUAC_AUDIO and GUAC_IMAGE occur several times in the query.
    "guacamole": ("SecRuleRemoveById 921180", "SecRuleRemoveById 932350"),
    # Hot reload sends the name of the page, such as /blog/[slug], which is also a shell pattern.
    "nextjs": _exclude("ARGS:page", "attack-rce"),
}
"""By their names in ``profiles`` of the configuration."""
