"""A connection between the nodes of a training: lines of JSON in both directions."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

SILENT_FOR_S = 60  # a connection on which not even the system of the other side answers is dead


class Connection:
    """Reading tells of the other side's end; sending never does."""

    def __init__(self, connected: socket.socket):
        self.socket, self.buffer, self.sending = connected, b"", threading.Lock()
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"KEEPIDLE": 10, "KEEPINTVL": 10, "KEEPCNT": SILENT_FOR_S // 10 - 1}
        options["USER_TIMEOUT"] = SILENT_FOR_S * 1000  # ms: of what was sent, where the others watch silence
        for option, value in options.items():
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{option}"), value)

    def peer(self) -> str:
        """The address of the other side."""
        return self.socket.getpeername()[0]

    def send(self, message: dict[str, Any]) -> None:
        """What is sent to a side that is gone is lost; reading says that it is."""
        with contextlib.suppress(OSError), self.sending:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def read(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None where there is none within `timeout` seconds. Errors: ConnectionError at the end."""
        self.socket.settimeout(timeout)
        while b"\n" not in self.buffer:
            try:
                data = self.socket.recv(1 << 16)
            except (TimeoutError, BlockingIOError):
                return None
            except OSError as error:
                raise ConnectionError(str(error)) from None
            if not data:
                raise ConnectionError("closed")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                return message
        raise ConnectionError("not a message of this program")

    def unread(self, message: dict[str, Any]) -> None:
        """Leave a message to who reads next."""
        self.buffer = json.dumps(message).encode() + b"\n" + self.buffer

    def messages(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(ConnectionError):
            while True:
                yield self.read() or {}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
