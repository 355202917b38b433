"""What the benches against peers rest on: the clock of both sides, the server that answers at once."""

import json
import time

import numpy as np
import pytest
from by_turns import LEAST_SHARE, Spent, compare, share_of, summary, timed
from zero_latency import ZeroLatency

from autointerp.client import GenerateRequest, Message, Reply
from autointerp.clients.openai import OpenAIClient
from autointerp.judging import SCHEMA, matches
from autointerp.replies import json_object
from autointerp.written import SCHEMA as EXPLANATION


def spent(processor_s: float, wall_s: float, waited_s: float = 0.0) -> Spent:
    return Spent(processor_s, wall_s, waited_s)


@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0], [0.1, 7.0, 2.0, 2.0, 9.0, 1.0]])
def test_the_summary_is_numpys(values: list[float]) -> None:
    assert summary(values) == pytest.approx([np.median(values), *np.quantile(values, [0.2, 0.8])])


def test_ratios_are_of_medians_and_wall_time_wants_a_processor() -> None:
    ours, theirs = [spent(1, 2), spent(2, 9), spent(3, 4)], [spent(8, 30), spent(6, 10), spent(7, 12)]
    processor, wall = compare("work", ours, theirs, "peer", per=2, unit="each")
    assert "1 (0.7 to 1.3) against 3.5 (3.2 to 3.8) s each of peer, processor time: 3.50 x" in processor
    assert "wall time: 3.00 x" in wall
    theirs[0] = spent(8, 30, waited_s=5)
    processor, wall = compare("work", ours, theirs, "peer", per=2, unit="each")
    assert "processor time: 3.50 x" in processor and "x" not in wall.split("time", 1)[1]
    assert f"given 1.00 and {21 / 26:.2f}" in wall and 21 / 26 < LEAST_SHARE


def test_waiting_for_a_processor_is_no_waiting_for_a_server() -> None:
    assert share_of([spent(0.0, 5.0)]) == 1.0
    _, idle = timed(lambda: time.sleep(0.2))
    assert idle.wall_s >= 0.2 and idle.processor_s < 0.1

    def burn() -> int:
        until, n = time.thread_time() + 0.2, 0
        while time.thread_time() < until:
            n += 1
        return n

    n, busy = timed(burn)
    assert n > 0 and busy.processor_s >= 0.2


def test_the_server_answers_at_once_by_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    say = lambda text, schema=None: GenerateRequest(  # noqa: E731
        messages=(Message(role="user", content=text),), max_tokens=8, schema=schema)
    with ZeroLatency("[1, 0]") as server:
        client = OpenAIClient(model="m", base_url=server.url)
        judged, written, plain = client.generate([say("a", SCHEMA), say("bc", EXPLANATION), say("def")])
        assert all(isinstance(r, Reply) for r in (judged, written, plain))
        assert matches(judged, 5) == {1, 2}
        assert json_object(written.text, EXPLANATION)["explanation"]
        assert plain.text == "[1, 0]"
        assert server.taken() == (3, 6)
        assert server.taken() == (0, 0)


def test_no_answer_waits_for_an_acknowledgement() -> None:
    """A body in a packet of its own would take 40 ms each, whatever the machine."""
    import http.client

    with ZeroLatency("x") as server:
        line = http.client.HTTPConnection("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))
        line.connect()
        took = []
        for _ in range(20):
            begun = time.monotonic()
            line.request("POST", "/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": "y"}]}))
            assert json.loads(line.getresponse().read())["choices"][0]["message"]["content"] == "x"
            took.append(time.monotonic() - begun)
        line.close()
        assert min(took) < 0.03
