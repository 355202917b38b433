"""A chat server that judges at random and misbehaves often: for runs from end to end."""

import json
import re
from typing import Any

from loopback import ChatServer, Fault, completion

from sae.manifest import rng


def judge_server() -> ChatServer:
    """Half of the requests meet a fault at first; of the judgements one in fifteen is refused or nonsense, of the
    explanations one in three is refused."""
    return ChatServer(_answer)


def _answer(body: dict[str, Any], n: int) -> Any:
    said = body["messages"][-1]["content"]
    lines = re.findall(r"^\[(\d+)\]", said, re.M)
    if not lines:
        return completion("yes")
    draw = rng("faulty", said)
    kind = int(draw.integers(30))
    faults: list[Any] = [
        Fault("status", status=429, headers={"retry-after": "0.05"}, body={}), Fault("status", status=429, body={}),
        Fault("status", status=500, body={}), Fault("truncated", body=completion("x" * 50)), Fault("reset"),
    ]  # fmt: skip
    if kind == 0 or (kind % 3 == 0 and not said.startswith("Description: ")):
        return completion(None, refusal="I cannot")
    if kind == 1:
        return completion("I would rather write a poem")
    if kind < 17 and n == 0:
        return faults[kind % len(faults)]
    if said.startswith("Description: "):
        return completion(json.dumps({"match": [int(i) for i in lines if draw.random() < 0.5]}))
    return completion(json.dumps({"explanation": f"words of kind {int(draw.integers(1000))}"}))
