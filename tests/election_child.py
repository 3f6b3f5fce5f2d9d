"""A process that takes part in an election, and writes a line for each piece of news: the time, and until when.

Arguments: the URL, the instance, the length of a lease. SIGTERM ends it regularly; SIGHUP too, but the lease is kept.
"""

import asyncio
import signal
import sys

from tlstunnel.state.clock import read_clock
from tlstunnel.state.valkey.address import parse_url
from tlstunnel.state.valkey.election import Election, News


async def main() -> None:
    url, instance, lease = sys.argv[1:]
    ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    for number, give_back in ((signal.SIGTERM, True), (signal.SIGHUP, False)):
        asyncio.get_running_loop().add_signal_handler(number, ended.set_result, give_back)

    def write(news: News) -> None:
        print(read_clock(), news.until, *news.delivered, flush=True)

    def report(line: str, is_failure: bool) -> None:
        print("report", line, file=sys.stderr, flush=True)

    election = Election(
        parse_url(url), prefix="test", instance=instance, on_news=write, report=report, lease=float(lease)
    )
    election.start()
    print("started", flush=True)
    await election.close(give_back=await ended)


asyncio.run(main())
