"""The cost of the firewall: the same handshakes with policies of growing size, and messages while it is busy."""

import threading
from collections.abc import Iterator

from scripts.load.figures import LATENCY, Column, Figure, handshakes
from scripts.load.running import BenchError, Load, Running, Work
from scripts.load.subjects import Subject

HEAD = """\
listen = ["127.0.0.1:$port"]
[log]
format = "json"
[[sites]]
origins = ["127.0.0.1:$origin"]
cert = "$cert"
key = "$key"
"""

RULES = (
    """path.startsWith("/admin-{n}") && !ip_in(ip, "10.0.0.0/8", "192.168.0.0/16")""",
    """host == "site-{n}.example.com" || origin == "https://page-{n}.example.com\"""",
    """user_agent.lower().contains("scanner-{n}")""",
    """tls_version == "TLSv1.2" && path != "/room-{n}\"""",
)
"""Typical rules without regular expressions, none of which match."""

REGEX = """path.regex("^/v[0-9]+/room-{n}/(admin|debug)$$")"""


def rules(number: int, expressions: tuple[str, ...] = RULES) -> str:
    """Return so many rules, with these expressions in turn."""
    return "".join(
        f"[[sites.rules]]\nname = \"rule {n}\"\nwhen = '''{expressions[n % len(expressions)].format(n=n)}'''\n"
        f'action = "block"\n'
        for n in range(number)
    )


LIMITS = """\
[[sites.rate_limits]]
name = "handshakes per address"
limit = "1000000/minute"
strategy = "sliding"
max_tunnels = 100000
[[sites.rate_limits]]
name = "handshakes per address and path"
key = ["ip", "path"]
limit = "1000000/hour"
"""

CRS = """\
[sites.managed_rules]
owasp_crs = true
timeout = "1s"
"""

POLICIES = {
    "no policy": "",
    "origin check": 'web_origins = ["same", "https://localhost"]\nweb_origins_mode = "log"\n',
    "10 rules": rules(10),
    "100 rules": rules(100),
    "10 regexes": rules(10, (REGEX,)),
    "rate limits": LIMITS,
    "CRS": CRS,
}
"""The site is the same for each; the request is a browser's."""


def list_variants(program: str) -> Iterator[Subject]:
    """Return the tunnel with each of the policies."""
    for name, policy in POLICIES.items():
        file = f"{name.replace(' ', '-')}.toml"
        yield Subject(
            name=name,
            command=(program, "start", "--config", f"$dir/{file}"),
            files={file: HEAD + policy},
            version=(program, "--version"),
            is_peer=name == "no policy",
        )


def beside(seconds: float) -> Figure:
    """Messages of 64 B on 8 tunnels, while 4 clients open tunnels one after the other as fast as they can."""

    def measure(running: Running) -> dict[str, float]:
        with Load(running) as load, Load(running) as others:
            load.do("open 8 /echo")
            others.do("open 1 /echo")
            load.do("echo 8 64 0.3")
            made: list[dict[str, object]] = []
            opening = threading.Thread(target=lambda: made.append(others.do(f"handshakes 4 {seconds} resumed")))
            opening.start()
            work: Work = load.measure(f"echo 8 64 {seconds}")
            opening.join()
            if not made:
                raise BenchError(f"{running.subject.name}: the handshakes during the messages failed")
            load.do("close")
        handshakes_done = float(str(made[0]["handshakes"]))
        return {name: float(work.answer[name]) for name in ("p50_us", "p99_us", "p999_us")} | {
            "rate": work.answer["messages"] / work.answer["seconds"],
            "handshakes": handshakes_done / seconds,
        }

    return Figure(
        name="firewall-beside",
        group="firewall",
        title="echo, 8 tunnels, 64 B, while 4 clients open tunnels as fast as they can",
        columns=(*LATENCY, Column("rate", "messages/s", 0, False), Column("handshakes", "handshakes/s", 0, False)),
        measure=measure,
    )


def choose(seconds: float | None) -> list[Figure]:
    """Return the figures of ``scripts/bench --firewall``."""
    return [handshakes("resumed", seconds or 1.5), beside(seconds or 1.5)]
