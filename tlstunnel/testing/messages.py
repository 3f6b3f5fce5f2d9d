"""WebSocket messages for both ends of a test, the client and the origin.

Tested by tests/e2e/test_testing_fixtures.py.
"""

import socket
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from wsproto import WSConnection
from wsproto.connection import Connection as Frames
from wsproto.events import BytesMessage, CloseConnection, Event, Message, Ping, TextMessage


def read_events(sock: socket.socket, ws: WSConnection | Frames, received: bytes) -> Generator[Event, None, None]:
    """Yield what the other end sends, until it closes the connection; `received` is what has been read already."""
    data = received or sock.recv(65536)
    while data:
        ws.receive_data(data)
        yield from ws.events()
        data = sock.recv(65536)


def echo(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the response to each event, up to the close.

    Messages are sent back whole: an end that sends does not read meanwhile, so the other end must have finished.
    """
    for event in join_messages(events):
        if isinstance(event, Message):
            yield event
        elif isinstance(event, Ping | CloseConnection):
            yield event.response()
        if isinstance(event, CloseConnection):
            return


def join_messages(events: Iterable[Event]) -> Iterator[Event]:
    """Yield the events with each message in one piece."""
    parts: list[Any] = []
    for event in events:
        if not isinstance(event, Message):
            yield event
            continue
        parts.append(event.data)
        if event.message_finished:
            yield make_message("".join(parts) if isinstance(event.data, str) else b"".join(parts))
            parts.clear()


def make_message(data: str | bytes) -> Event:
    """Return the event that sends `data`."""
    return TextMessage(data) if isinstance(data, str) else BytesMessage(data)
