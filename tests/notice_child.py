"""A process that sends notices, for tests that kill it or take its disk away.

python -m tests.notice_child FOLDER URL SITES BEGAN [FILL]    assesses so many sites again and again, delivers to URL

Its clock makes 200 seconds of each since BEGAN (a Unix time), so retries come soon. It prints "open" when it can store
notices. With FILL, its disk is full until a line is read from its standard input.
"""

import asyncio
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tlstunnel.errors import StateError
from tlstunnel.plans.channels import Channels
from tlstunnel.plans.notices import MINUTE, Addresses
from tlstunnel.plans.notifier import Notifier
from tlstunnel.plans.templates import load_texts
from tlstunnel.plans.values import Assessment, Figures, Standing
from tlstunnel.plans.webhook import Webhook

SECRET = bytes(range(32))
SPEED = 200


def assess(site: str) -> Assessment:
    return Assessment(
        site=site,
        standing=Standing.SUSPECTED_ABUSE,
        since=time.time(),
        figures=Figures(guideline=10, now=100, flood="short", flood_rate=50.0, flood_addresses=3),
        sentence="It is flooded.",
    )


async def send(folder: Path, url: str, sites: int, clock: Callable[[], float], fill: bool) -> None:
    webhook = Webhook([SECRET], timeout=5)
    channels = Channels(load_texts(), Addresses(), webhook_url=url, webhook=webhook)
    notifier = await Notifier.open(folder, channels, clock=clock, lock_wait=10)
    print("open", flush=True)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if fill:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            await notifier.assess([assess("0")])
        except StateError as error:
            print("full", str(error).splitlines()[0], flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    for site in range(sites):
        await notifier.assess([assess(str(site))])
    while True:
        await asyncio.sleep(MINUTE / SPEED)
        await notifier.assess([assess(str(site)) for site in range(sites)])
        notifier.reconfigure(channels)  # it sleeps by another clock, so wake it


if __name__ == "__main__":
    began = float(sys.argv[4])
    asyncio.run(
        send(
            Path(sys.argv[1]),
            sys.argv[2],
            int(sys.argv[3]),
            lambda: began + (time.time() - began) * SPEED,
            "FILL" in sys.argv,
        )
    )
