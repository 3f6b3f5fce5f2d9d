"""From assessments to servers that accept, fail and hang: nothing is lost, nothing is sent without need."""

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import pytest
from aiosmtpd.smtp import SMTP
from standardwebhooks import Webhook as Receiver
from structlog.testing import capture_logs

from tests.harness import REPOSITORY, eventually
from tests.notice_child import SECRET
from tests.unit.test_plans_mail import Mailboxes
from tests.unit.test_plans_webhook import encode, read_request
from tlstunnel.config import decode
from tlstunnel.config.urls import MailServer
from tlstunnel.errors import ConfigurationError, StateError
from tlstunnel.plans.channels import Channels, load_channels
from tlstunnel.plans.credentials import derive_secret
from tlstunnel.plans.delivery import CONCURRENCY, Draw, draw_nothing
from tlstunnel.plans.mail import Mail
from tlstunnel.plans.notice_file import FILE_NAME, Channel, NoticeFile, NoticeRecord, State, Target, reading
from tlstunnel.plans.notices import DAY, HOUR, Addresses
from tlstunnel.plans.notifier import Notifier
from tlstunnel.plans.plot import Labels
from tlstunnel.plans.templates import load_texts
from tlstunnel.plans.values import Assessment, Notice, Standing
from tlstunnel.plans.webhook import Webhook

START = 1_800_000_000.0
ABUSE, SUSTAINED = Standing.SUSPECTED_ABUSE, Standing.SUSTAINED
TEXTS = load_texts()
T = TypeVar("T")
Logs = Sequence[Mapping[str, Any]]


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


def assess(standing: Standing = ABUSE, site: str = "a") -> Assessment:
    return Assessment(site=site, standing=standing, since=START, sentence="It is so.")


Respond = Callable[[dict[str, str], bytes], Awaitable[bytes]]


class Server:
    """Posts that arrived, and how to respond to the next one."""

    def __init__(self) -> None:
        self.port = 0
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self.response = b"HTTP/1.1 204 No Content\r\n\r\n"
        self.hanging = False
        self.delay = 0.0
        self.open = self.most_open = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.posts]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            _, headers, body = await read_request(reader)
            self.posts.append((headers, body))
            if self.hanging:
                await reader.read()
            await asyncio.sleep(self.delay)
            writer.write(self.response)
            await writer.drain()
        self.open -= 1
        writer.transport.abort()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator["Server"]:
        server = await asyncio.start_server(self.handle, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()


@contextlib.asynccontextmanager
async def notifying(
    folder: Path, channels: Channels, clock: Clock, draw: Draw = draw_nothing
) -> AsyncIterator[Notifier]:
    notifier = await Notifier.open(folder, channels, clock=clock, draw=draw, lock_wait=5)
    try:
        yield notifier
    finally:
        await notifier.close()


def hook(server: Server, timeout: float = 5.0, **addresses: Any) -> Channels:
    webhook = Webhook([SECRET], timeout=timeout)
    return Channels(TEXTS, Addresses(**addresses), webhook_url=server.url, webhook=webhook)


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 60), debug=False)


async def until(condition: Callable[[], Awaitable[T | None]]) -> T:
    async with asyncio.timeout(30):
        while not (result := await condition()):
            await asyncio.sleep(0.01)
    return result


async def read(notifier: Notifier) -> list[NoticeRecord]:
    return await notifier.store.run(NoticeFile.read_notices)


async def wait_for(notifier: Notifier, state: State, attempts: int = 1) -> NoticeRecord:
    """Wait until the deliveries of the last notice, the log's aside, have this state after so many attempts."""

    async def is_there() -> NoticeRecord | None:
        (record, *_) = await read(notifier)
        deliveries = [one for one in record.deliveries if one.target.channel is not Channel.LOG]
        there = all(one.state is state and one.attempts == attempts and one.reason != "no result" for one in deliveries)
        return record if there else None

    return await until(is_there)


def find(record: NoticeRecord, channel: Channel) -> str:
    (found,) = [one for one in record.deliveries if one.target.channel is channel]
    return found.reason


def test_a_notice_is_delivered_once(tmp_path: Path) -> None:
    async def main() -> Logs:
        async with Server().serving() as server, notifying(tmp_path, hook(server), Clock()) as notifier:
            with capture_logs() as logs:
                assert await notifier.assess([assess()]) == 1
                record = await wait_for(notifier, State.ACCEPTED)
                assert await notifier.assess([assess()]) == 0
            ((headers, body),) = server.posts
            assert headers["webhook-id"] == record.notice.id
            Receiver(encode(SECRET)).verify(body, headers)
            assert json.loads(body)["data"]["site"] == "a"
            assert record.accepted
            return logs

    logs = run(main())
    assert [(log["event"], log["log_level"]) for log in logs] == [("notice", "warning"), ("notice delivered", "info")]
    assert {key: logs[0][key] for key in ("site", "standing", "recipient", "sentence")} == {
        "site": "a",
        "standing": "suspected abuse",
        "recipient": "operator",
        "sentence": "It is so.",
    }


def test_a_failure_is_tried_again_with_the_same_id(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> Logs:
        async with Server().serving() as server, notifying(tmp_path, hook(server), clock) as notifier:
            server.response = b"HTTP/1.1 500 No\r\n\r\n"
            with capture_logs() as logs:
                await notifier.assess([assess()])
                for attempts in range(1, 4):
                    record = await wait_for(notifier, State.PENDING, attempts)
                    (delivery,) = [one for one in record.deliveries if one.target == Target(Channel.WEBHOOK)]
                    assert delivery.next_at is not None
                    assert clock.now + 15 * 2**attempts <= delivery.next_at <= clock.now + 16.5 * 2**attempts
                    clock.now = delivery.next_at
                    notifier.reconfigure(hook(server))
                await wait_for(notifier, State.PENDING, 4)
                server.response = b"HTTP/1.1 200 OK\r\n\r\n"
                clock.now += HOUR
                notifier.reconfigure(hook(server))
                await wait_for(notifier, State.ACCEPTED, 5)
            assert len(server.posts) == 5
            assert len(set(server.ids)) == len({body for _, body in server.posts}) == 1
            return [log for log in logs if log["event"] == "notice not delivered"]

    logs = run(main())
    assert [(log["attempts"], log["reason"]) for log in logs] == [(number, "500") for number in range(1, 5)]
    assert 30 <= logs[0]["retry_in"] <= 33


def test_a_receiver_can_ask_for_a_wait(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, notifying(tmp_path, hook(server), clock) as notifier:
            server.response = b"HTTP/1.1 429 No\r\nRetry-After: 7200\r\n\r\n"
            await notifier.assess([assess()])
            record = await wait_for(notifier, State.PENDING)
            assert [one.next_at for one in record.deliveries if one.target.channel is Channel.WEBHOOK] == [START + 7200]

    run(main())


def test_after_three_days_it_is_given_up(tmp_path: Path) -> None:
    async def main() -> Mapping[str, Any]:
        clock = Clock()
        async with Server().serving() as server, notifying(tmp_path, hook(server), clock) as notifier:
            server.response = b"HTTP/1.1 500 No\r\n\r\n"
            await notifier.assess([assess()])
            await wait_for(notifier, State.PENDING)
            clock.now += 3 * DAY
            with capture_logs() as logs:
                notifier.reconfigure(hook(server))
                await wait_for(notifier, State.GIVEN_UP, 2)
            return logs[-1]

    log = run(main())
    assert log["event"] == "notice not delivered"
    assert "retry_in" not in log


def test_410_closes_a_url_until_it_is_opened(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, notifying(tmp_path, hook(server), clock) as notifier:
            server.response = b"HTTP/1.1 410 Gone\r\n\r\n"
            await notifier.assess([assess()])
            record = await wait_for(notifier, State.GIVEN_UP)
            assert find(record, Channel.WEBHOOK) == "410: it wants no more notices"
            await notifier.assess([assess(site="b")])
            record = await wait_for(notifier, State.GIVEN_UP)
            assert find(record, Channel.WEBHOOK) == "its receiver has responded with 410 before"
            assert len(server.posts) == 1
            await notifier.store.run(NoticeFile.open_url, server.url)
            server.response = b"HTTP/1.1 200 OK\r\n\r\n"
            await notifier.assess([assess(site="c")])
            await wait_for(notifier, State.ACCEPTED)

    run(main())


def test_a_server_that_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as bad, Server().serving() as good:
            bad.hanging = True
            contacts = {f"bad{number}": bad.url for number in range(20)} | {f"good{n}": good.url for n in range(20)}
            channels = Channels(TEXTS, Addresses(contacts), webhook=Webhook([SECRET], timeout=30))
            async with notifying(tmp_path, channels, clock) as notifier:
                await notifier.assess([assess(SUSTAINED, site) for site in contacts])
                clock.now += HOUR
                assert await notifier.assess([assess(SUSTAINED, site) for site in contacts]) == 40

                async def all_good() -> bool:
                    return len(good.posts) == 20

                await until(all_good)
                assert bad.most_open == 1

    run(main())


def test_an_end_waits_for_what_has_begun(tmp_path: Path) -> None:
    async def main() -> None:
        async with Server().serving() as server:
            server.delay = 0.2
            async with notifying(tmp_path, hook(server), Clock()) as notifier:
                await notifier.assess([assess()])

                async def has_begun() -> bool:
                    return bool(server.posts)

                await until(has_begun)
            with reading(tmp_path) as reader:
                assert reader.read_notices()[0].accepted

    run(main())


def test_deliveries_are_bounded(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server:
            server.hanging = True
            sites = {f"s{number}": f"{server.url}{number}" for number in range(2 * CONCURRENCY)}
            channels = Channels(TEXTS, Addresses(sites), webhook=Webhook([SECRET], timeout=0.5))
            async with notifying(tmp_path, channels, clock) as notifier:
                await notifier.assess([assess(SUSTAINED, site) for site in sites])
                clock.now += HOUR
                await notifier.assess([assess(SUSTAINED, site) for site in sites])

                async def all_tried() -> bool:
                    return len(set(server.ids)) == len(sites)

                await until(all_tried)
                assert server.most_open <= CONCURRENCY

    run(main())


# Whom it goes to


def test_a_contact_gets_its_own_notice(tmp_path: Path) -> None:
    """The webhook of the configuration gets all; the contact gets its own, signed for it alone."""

    async def main() -> None:
        clock = Clock()
        async with Server().serving() as operator, Server().serving() as owner:
            webhook = Webhook([SECRET])
            addresses = Addresses({"a": owner.url})
            channels = Channels(TEXTS, addresses, webhook_url=operator.url, webhook=webhook)
            async with notifying(tmp_path, channels, clock, draw_png) as notifier:
                for _ in range(2):
                    await notifier.assess([assess(SUSTAINED), assess(SUSTAINED, "b")])
                    clock.now += HOUR

                async def all_there() -> bool:
                    records = await read(notifier)
                    return len(records) == 2 and all(record.accepted for record in records) and len(operator.posts) == 2

                await until(all_there)
                assert len(owner.posts) == 1
                headers, body = owner.posts[0]
                assert "plot" in json.loads(body)["data"]
                assert not any("plot" in json.loads(one)["data"] for _, one in operator.posts)
                timestamp = int(headers["webhook-timestamp"])
                assert abs(timestamp - time.time()) < 60
                Receiver(encode(derive_secret(SECRET, owner.url))).verify(body, headers)
                assert {json.loads(body)["data"]["recipient"] for _, body in operator.posts} == {"contact", "operator"}
                assert await notifier.store.run(NoticeFile.find_contacted, "a") == headers["webhook-id"]
                assert await notifier.store.run(NoticeFile.find_contacted, "b") is None

    run(main())


async def mail(tmp_path: Path, boxes: Mailboxes, draw: Draw, addresses: Addresses, standing: Standing) -> NoticeRecord:
    clock = Clock()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(boxes, hostname="localhost"), "127.0.0.1", 0)
    mailer = Mail(MailServer("smtp", "127.0.0.1", server.sockets[0].getsockname()[1]), "tunnel@example.net")
    try:
        async with notifying(tmp_path, Channels(TEXTS, addresses, mail=mailer), clock, draw) as notifier:
            await notifier.assess([assess(standing)])
            clock.now += HOUR
            await notifier.assess([assess(standing)])
            return await wait_for(notifier, State.ACCEPTED)
    finally:
        server.close()


async def draw_png(notice: Notice, _: Labels) -> bytes:
    return b"\x89PNG" + notice.site.encode()


def test_a_mail_has_the_plot(tmp_path: Path) -> None:
    boxes = Mailboxes()
    run(mail(tmp_path, boxes, draw_png, Addresses({"a": "mailto:owner@a.example"}), SUSTAINED))
    (envelope,) = boxes.envelopes
    assert envelope.rcpt_tos == ["owner@a.example"]
    assert isinstance(envelope.content, bytes)
    assert b"image/png" in envelope.content


def test_the_operator_gets_mail(tmp_path: Path) -> None:
    boxes = Mailboxes()
    run(mail(tmp_path, boxes, draw_png, Addresses({"a": "mailto:owner@a.example"}, "mailto:ops@b.example"), ABUSE))
    assert boxes.envelopes[0].rcpt_tos == ["ops@b.example"]
    assert isinstance(boxes.envelopes[0].content, bytes)
    assert b"Please send questions about this machine to: ops@b.example" in boxes.envelopes[0].content


async def fail_to_draw(_: Notice, __: Labels) -> bytes:
    raise RuntimeError("no\nplot")


def test_a_notice_without_its_plot_is_sent(tmp_path: Path) -> None:
    boxes = Mailboxes()
    with capture_logs() as logs:
        run(mail(tmp_path, boxes, fail_to_draw, Addresses({"a": "mailto:owner@a.example"}), SUSTAINED))
    assert len(boxes.envelopes) == 1
    (log,) = [log for log in logs if log["event"] == "notice without its plot"]
    assert log["reason"] == "no\\nplot"


def test_without_channels_the_log_has_it(tmp_path: Path) -> None:
    async def main() -> Logs:
        addresses = Addresses({"a": "https://a.example/"}, "mailto:ops@b.example")
        async with notifying(tmp_path, Channels(TEXTS, addresses), Clock()) as notifier:
            with capture_logs() as logs:
                await notifier.assess([assess()])

                async def logged() -> bool:
                    return bool(logs)

                await until(logged)
            return logs

    assert [log["event"] for log in run(main())] == ["notice"]


def test_what_is_no_longer_configured_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        clock = Clock()
        async with Server().serving() as server, notifying(tmp_path, hook(server), clock) as notifier:
            server.response = b"HTTP/1.1 500 No\r\n\r\n"
            await notifier.assess([assess()])
            await wait_for(notifier, State.PENDING)
            clock.now += HOUR
            notifier.reconfigure(Channels(TEXTS, Addresses()))
            record = await wait_for(notifier, State.GIVEN_UP, 2)
            assert find(record, Channel.WEBHOOK) == "it is no longer configured"

    run(main())


class _Broken(Channels):
    async def deliver(self, notice: Notice, target: Target, plot: bytes | None = None) -> Any:
        raise KeyError("x")


def test_a_bug_is_logged_and_tried_again(tmp_path: Path) -> None:
    async def main() -> Logs:
        channels = _Broken(TEXTS, Addresses(), webhook_url="http://127.0.0.1:1/")
        async with notifying(tmp_path, channels, Clock()) as notifier:
            with capture_logs() as logs:
                await notifier.assess([assess()])
                record = await wait_for(notifier, State.PENDING)
            assert find(record, Channel.WEBHOOK) == "internal error: KeyError('x')"
            return logs

    assert {log["event"] for log in run(main())} == {"notice failed", "notice not delivered"}


# What people say


def test_mutes_and_acknowledgements_survive_a_restart(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> None:
        channels = Channels(TEXTS, Addresses())
        async with notifying(tmp_path, channels, clock) as notifier:
            await notifier.mute("muted", 30 * DAY, "ann")
            assert await notifier.assess([assess(), assess(site="muted")]) == 1
            (record,) = await read(notifier)
            assert await notifier.acknowledge(record.notice.id, "ann")
            assert not await notifier.acknowledge("notice-0", "ann")
        clock.now += 10 * DAY
        async with notifying(tmp_path, channels, clock) as notifier:
            assert await notifier.assess([assess(), assess(site="muted")]) == 0
            await notifier.mute("muted", 0, "ann")
            assert await notifier.assess([assess(), assess(site="muted")]) == 1
            clock.now += HOUR
            await notifier.assess([assess(Standing.WITHIN)])
            clock.now += 2 * DAY
            await notifier.assess([assess(Standing.WITHIN)])
            assert await notifier.assess([assess()]) == 1

    run(main())


def test_assessments_at_once_make_one_notice(tmp_path: Path) -> None:
    async def main() -> None:
        async with notifying(tmp_path, Channels(TEXTS, Addresses()), Clock()) as notifier:
            assert sorted(await asyncio.gather(*(notifier.assess([assess()]) for _ in range(5)))) == [0, 0, 0, 0, 1]
            task = asyncio.create_task(notifier.assess([assess(site="b")]))
            await asyncio.sleep(0)
            task.cancel()
            assert await notifier.assess([assess(site="b")]) == 0
            assert len(await read(notifier)) == 2

    run(main())


def test_a_damaged_file_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"x" * 1000)
    with pytest.raises(StateError, match="is not an SQLite database"):
        run(Notifier.open(tmp_path, Channels(TEXTS, Addresses())))


# The configuration

SITE = '[[sites]]\nnames = ["a.example"]\norigins = ["127.0.0.1:1"]\ncontact = "mailto:owner@a.example"\n'


def load(folder: Path, text: str) -> Channels:
    return load_channels(decode(text + SITE, folder, "tunnel.toml"))


def test_channels_are_loaded_from_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{encode(SECRET)}\n")
    (tmp_path / "password").write_text("p\n")
    channels = load(
        tmp_path,
        '[usage.notices]\nwebhook = "https://b.example/n"\nsecret_file = "secret"\nemail = "smtp://u@b.example"\n'
        'password_file = "password"\nsender = "t@b.example"\noperator = "https://b.example/ops"\nlanguage = "de"\n',
    )
    assert channels.addresses == Addresses({"a.example": "mailto:owner@a.example"}, "https://b.example/ops", "de")
    assert channels.find_url(Target(Channel.WEBHOOK)) == "https://b.example/n"
    assert load(tmp_path, "").addresses.operator == ""


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('webhook = "https://b.example/n"\nsecret_file = "none"\n', "none: cannot be read"),
        ('email = "smtp://u@b.example"\nsender = "t@b.example"\npassword_file = "none"\n', "none: cannot be read"),
        ('templates = "none"\n', "none: cannot be read"),
        ('templates = "."\nlanguage = "fr"\n', 'there are no texts in "fr", only in de, en'),
    ],
)
def test_what_cannot_be_loaded_is_an_error(tmp_path: Path, settings: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        load(tmp_path, f"[usage.notices]\n{settings}")


# Kills and full disks


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        identifier = self.headers["webhook-id"]
        Receiver(encode(SECRET)).verify(body, dict(self.headers), json_parse=False)
        accepting: _AcceptingServer = self.server  # type: ignore[assignment]
        status = accepting.decide(identifier, body)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class _AcceptingServer(ThreadingHTTPServer):
    """Accepts two posts of three, and remembers them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.accepted: Counter[str] = Counter()
        self.bodies: dict[str, set[bytes]] = {}
        self.began = time.time()
        self._random = random.Random(1)
        self._lock = threading.Lock()

    def decide(self, identifier: str, body: bytes) -> int:
        with self._lock:
            self.bodies.setdefault(identifier, set()).add(body)
            if self._random.random() < 0.33:
                return 503
            self.accepted[identifier] += 1
            return 200

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A killed client is no error."""


@pytest.fixture
def accepting() -> Iterator[_AcceptingServer]:
    with _AcceptingServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def child(folder: Path, server: _AcceptingServer, sites: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    command = [sys.executable, "-m", "tests.notice_child", str(folder), url, str(sites), str(server.began), *arguments]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> str:
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith(beginning):
        assert line, "it has ended"
    return line


def list_states(folder: Path) -> list[tuple[str, State]]:
    with reading(folder) as reader:
        records = reader.read_notices(most=1000)
    return [
        (record.notice.id, one.state)
        for record in records
        for one in record.deliveries
        if one.target.channel is Channel.WEBHOOK
    ]


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_nothing_is_lost_by_kills(tmp_path: Path, accepting: _AcceptingServer, kills: int) -> None:
    chosen, sites, midway = random.Random(kills), kills * 5, 0
    for _ in range(kills):
        with child(tmp_path, accepting, sites) as process:
            wait_for_line(process, "open")
            time.sleep(chosen.random() * 0.1)  # anywhere while it stores and delivers
            process.send_signal(signal.SIGKILL)
            process.wait()
        states = list_states(tmp_path)
        midway += len(states) < sites or any(state is State.PENDING for _, state in states)
    assert midway > kills / 2
    with child(tmp_path, accepting, sites):
        eventually(lambda: [state for _, state in list_states(tmp_path)] == [State.ACCEPTED] * sites, 120, 0.1)
    # One notice for each site, and each was accepted: again, with the same id and body, only if a kill came between
    # that and its result on the disk.
    assert {identifier for identifier, _ in list_states(tmp_path)} == set(accepting.accepted)
    assert all(len(bodies) == 1 for bodies in accepting.bodies.values())
    assert sum(accepting.accepted.values()) - sites <= kills


def test_a_full_disk_loses_and_repeats_nothing(tmp_path: Path, accepting: _AcceptingServer) -> None:
    with child(tmp_path, accepting, 5, "FILL") as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert str(tmp_path / FILE_NAME) in wait_for_line(process, "full")
        assert not accepting.bodies
        process.stdin.write("\n")
        process.stdin.flush()
        eventually(lambda: [state for _, state in list_states(tmp_path)] == [State.ACCEPTED] * 5, timeout=60)
        assert sorted(accepting.accepted.values()) == [1] * 5
        process.send_signal(signal.SIGKILL)
        output = process.stdout.read()
    assert output.count("notices written again") == 1
