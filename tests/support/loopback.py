"""A chat server on the loop-back interface that answers as told: real sockets, real HTTP, real faults."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def completion(text: str | None, *, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of an ordinary answer."""
    said = {"role": "assistant", "content": text, **message}
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": said}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14,
                  "prompt_tokens_details": {"cached_tokens": 4}},
    }  # fmt: skip


class Fault:
    """What to do instead of answering."""

    def __init__(
        self, kind: str, *, status: int = 200, headers: dict[str, str] | None = None, body: Any = None
    ) -> None:
        """``kind``: status, sleep, reset, truncated, raw."""
        self.kind, self.status, self.headers, self.body = kind, status, headers or {}, body


class ChatServer:
    """``with ChatServer(answer) as server``; ``answer(body, n)`` gives a body or a :class:`Fault`, n = earlier requests
    with the same last message."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Any]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.delivered: list[str] = []
        """Last message of each request whose answer (status 200, whole) was handed to the socket: what is paid for."""
        self.most_in_flight = 0
        self._in_flight = 0
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer._lock:
                    outer.bodies.append(body)
                    key = body["messages"][-1]["content"]
                    n = outer._seen.get(key, 0)
                    outer._seen[key] = n + 1
                    outer._in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer._in_flight)
                try:
                    if self._respond(answer(body, n)):
                        with outer._lock:
                            outer.delivered.append(key)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                finally:
                    with outer._lock:
                        outer._in_flight -= 1

            def _respond(self, said: Any) -> bool:
                """True if the answer was a whole one with status 200."""
                fault = said if isinstance(said, Fault) else Fault("status", body=said)
                if fault.kind == "reset":
                    # Linger 0: closing sends RST, the peer sees a connection reset.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return False
                kind = fault.kind
                if kind == "sleep":
                    time.sleep(float(fault.body))
                    fault = Fault("status", body=completion("late"))
                raw = fault.body if isinstance(fault.body, bytes) else json.dumps(fault.body).encode()
                if fault.kind == "truncated":
                    raw = raw[: len(raw) // 2]
                self.send_response(fault.status)
                for name, value in fault.headers.items():
                    self.send_header(name, value)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
                self.wfile.flush()
                return fault.status == 200 and kind == "status"

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def in_flight(self) -> int:
        """Requests that are being answered now."""
        return self._in_flight

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
