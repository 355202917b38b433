"""Bodies of HTTP requests as they come, for stand-in servers that must cost little. Reads HTTP as far as it must."""

import asyncio
from typing import Any


class HttpBodies(asyncio.Protocol):
    """A subclass says what happens to each body, in :meth:`asked`; it answers by :meth:`answer`."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.asked(body)

    def asked(self, body: bytes) -> None:
        raise NotImplementedError

    def answer(self, body: bytes) -> None:
        """JSON with status 200, in one write: a second packet would wait 40 ms for the first to be acknowledged."""
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        if not self.transport.is_closing():
            self.transport.write(head.encode() + body)
