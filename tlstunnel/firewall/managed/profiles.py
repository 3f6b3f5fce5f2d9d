"""What ordinary WebSocket handshakes need not to be taken for attacks: exclusions from OWASP CRS.

Each is a directive that acts when the rules are loaded, so it may stand before the rules that it changes. All were
found by sending real handshakes to CRS 3.3.4 and 4; an id that a release does not have does no harm.
"""

from collections.abc import Mapping

DEFAULTS = (
    # CRS 3's collections by address and User-Agent: 100 bytes for each address that attacks, kept for good, and of no
    # use in a process that knows a share of the requests. CRS 4 has none.
    "SecRuleRemoveById 901318",
    "SecRuleRemoveById 901321",
    "SecRuleRemoveById 943120",  # session id without a Referer: no WebSocket client sends one (Jupyter's session_id)
    "SecRuleRemoveById 920300",  # no Accept
    "SecRuleRemoveById 920320",  # no User-Agent: libraries and devices
    "SecRuleRemoveById 920350",  # Host is an IP address: devices, home servers
)
"""For every site, whatever the paranoia. 920330, an empty User-Agent, stays: only tools that hide send one."""


def _exclude(target: str, *tags: str) -> tuple[str, ...]:
    return tuple(f'SecRuleUpdateTargetByTag "{tag}" "!{target}"' for tag in tags)


PROFILES: Mapping[str, tuple[str, ...]] = {
    # exec and attach have the command in the query, and repeat its name for each word.
    "kubernetes": (*_exclude("ARGS:command", "attack-rce", "attack-sqli"), "SecRuleRemoveById 921180"),
    # Classic SignalR (ASP.NET): JSON and base64 in the query.
    "signalr": (*_exclude("ARGS:connectionData", "attack-sqli"), *_exclude("ARGS:connectionToken", "attack-sqli")),
    # LogQL and PromQL are programs: pipes, braces, names of files, regular expressions.
    "grafana": _exclude("ARGS:query", "attack-rce", "attack-sqli", "attack-lfi", "attack-xss", "attack-injection-php"),
    # Its JavaScript adapter keeps JSON in cookies; iss is the URL of another host by nature.
    "keycloak": (
        *_exclude("REQUEST_COOKIES:/^kc-callback/", "attack-sqli"),
        'SecRuleUpdateTargetById 931130 "!ARGS:iss"',
    ),
    # Tickets of 340 characters of base64 behind a ::, some of which look like SQL, or like an event handler of HTML.
    "proxmox": (
        *_exclude("ARGS:vncticket", "attack-sqli", "attack-xss"),
        *_exclude("REQUEST_COOKIES:PVEAuthCookie", "attack-sqli", "attack-xss"),
    ),
    # GUAC_AUDIO and GUAC_IMAGE stand several times in the query.
    "guacamole": ("SecRuleRemoveById 921180", "SecRuleRemoveById 932350"),
    # Hot reload names the page: /blog/[slug], which is a shell pattern too.
    "nextjs": _exclude("ARGS:page", "attack-rce"),
}
"""By the names that ``profiles`` in the configuration takes."""
