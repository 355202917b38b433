"""A chat server of its own process that answers at once: what a client itself costs, without the time of a server."""

import asyncio
import json
import multiprocessing
from typing import Any

from http_bodies import HttpBodies

OURS = {"match": '{"match": [1, 2]}', "explanation": '{"explanation": "words that stand at the end of a sentence"}'}
"""By the property that the reply's schema demands."""


def reply_text(body: dict[str, Any], plain: str) -> str:
    """What is answered: by the schema where a request has one, else ``plain``."""
    schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema") or {}
    return next((text for name, text in OURS.items() if name in schema.get("properties", {})), plain)


class _Chat(HttpBodies):
    plain = ""
    requests = chars = 0

    def asked(self, body: bytes) -> None:
        request = json.loads(body)
        _Chat.requests += 1
        _Chat.chars += sum(len(m["content"]) for m in request["messages"])
        message = {"role": "assistant", "content": reply_text(request, self.plain)}
        reply = {
            "id": "c", "object": "chat.completion", "created": 0, "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
        }  # fmt: skip
        self.answer(json.dumps(reply).encode())


def _serve(pipe: Any, plain: str) -> None:
    _Chat.plain = plain

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(_Chat, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        stop = asyncio.Event()

        def asked() -> None:
            try:
                pipe.recv()
                pipe.send((_Chat.requests, _Chat.chars))
                _Chat.requests = _Chat.chars = 0
            except EOFError:  # the client's process is gone
                loop.remove_reader(pipe.fileno())
                stop.set()

        loop.add_reader(pipe.fileno(), asked)
        await stop.wait()

    asyncio.run(run())


class ZeroLatency:
    """``with ZeroLatency(plain) as server``: ``server.url`` and :meth:`taken`."""

    def __init__(self, plain: str = "") -> None:
        """``plain``: the answer to requests without a schema."""
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, plain), daemon=True)
        self._process.start()
        there.close()  # so that the server notices when this side is closed
        self.url = f"http://127.0.0.1:{self._pipe.recv()}/v1"

    def taken(self) -> tuple[int, int]:
        """(requests, characters of their messages) since this was last asked."""
        self._pipe.send(None)
        requests, chars = self._pipe.recv()
        return int(requests), int(chars)

    def __enter__(self) -> "ZeroLatency":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
