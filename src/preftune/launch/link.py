"""A connection between the launchers of two hosts: lines of JSON, and a word every second."""

import json
import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
SPEAK_EVERY = 1.0
"""Seconds between two signs of life."""
_MOST = 1 << 20
"""Bytes of a line; what sends more is no launcher."""


class Link:
    """One end of it; nothing waits but `wait_for`."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over an open connection."""
        connection.setblocking(False)
        self.socket = connection
        self.own_address: str = connection.getsockname()[0]
        self.address: str = connection.getpeername()[0]
        self.closed = False
        self._received = b""
        self._unsent = b""
        self._heard = self._spoke = time.monotonic()

    @property
    def silent_for(self) -> float:
        """Seconds since the other end said anything."""
        return time.monotonic() - self._heard

    def send(self, **message: Any) -> None:
        """Say something; a connection that is broken closes."""
        self._unsent += json.dumps(message).encode() + b"\n"
        self._spoke = time.monotonic()
        self._flush()

    def tick(self) -> list[Message]:
        """What has been said since the last call; gives a sign of life when it is due."""
        if time.monotonic() - self._spoke > SPEAK_EVERY:
            self.send(say="alive")
        self._flush()
        return self._receive()

    def close(self) -> None:
        """Hang up."""
        self.closed = True
        self.socket.close()

    def _flush(self) -> None:
        if self.closed:
            return
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def _receive(self) -> list[Message]:
        try:
            while not self.closed and len(self._received) < _MOST:
                read = self.socket.recv(1 << 16)
                if not read:
                    self.closed = True
                self._received += read
                self._heard = time.monotonic()
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._received = self._received.split(b"\n")
        if len(self._received) >= _MOST:
            self.closed = True
        return [message for message in map(_read, lines) if message["say"] != "alive"]


def _read(line: bytes) -> Message:
    with suppress(ValueError):
        message = json.loads(line)
        if isinstance(message, dict) and isinstance(message.get("say"), str):
            return message
    return {"say": "nonsense"}


def wait_for(sockets: Sequence[socket.socket], seconds: float) -> None:
    """Wait until one of them has something, but not longer than so long."""
    open_ones = [found for found in sockets if found.fileno() >= 0]
    with suppress(OSError):
        if open_ones:
            select.select(open_ones, [], [], seconds)
        else:
            time.sleep(seconds)


def listen(port: int) -> socket.socket:
    """A socket that takes connections on every address of this machine.

    Raises:
        OSError: another process listens there.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("", port))
    listener.listen()
    listener.setblocking(False)
    return listener


def accepted(listener: socket.socket) -> list[Link]:
    """The connections that have been made since the last call."""
    links = []
    with suppress(BlockingIOError):
        while True:
            connection, _ = listener.accept()
            with suppress(OSError):
                links.append(Link(connection))
    return links
