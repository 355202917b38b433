"""Own text against the SAEs of a run: which latents fire, what a push does, and what the server refuses."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from live_run import SAE_ID, live_run, served
from nasty_texts import NASTY

from evals import serve
from evals.live import MAX_CHARACTERS, Live
from sae.checkpoint import load
from sae.connection import why_unreachable
from sae.errors import ArtefactError, ConfigError
from sae.tokens import prefix_id

TEXT = "the law of the court"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live") / "results"


@pytest.fixture(scope="module")
def live(root: Path, tiny_lm: Any) -> Live:
    return live_run(root, tiny_lm)


def test_latents_of_a_text_are_those_of_the_sae(live: Live, root: Path, tiny_lm: Any) -> None:
    answer = live.tokens(SAE_ID, TEXT)
    assert "".join(t["text"] for t in answer["tokens"]) == TEXT
    ids = [prefix_id(tiny_lm.tokenizer), *tiny_lm.tokenizer.encode(TEXT, add_special_tokens=False)]
    x_LD = tiny_lm.capture(torch.tensor([ids]), ["layers.1"])["layers.1"][0].float()
    acts_LF = load(root / "saes" / SAE_ID).encode(x_LD)[1:]
    assert len(answer["tokens"]) == len(acts_LF)
    for token, acts_F in zip(answer["tokens"], acts_LF, strict=True):
        assert 0 < len(token["latents"]) <= 4
        for latent, act in token["latents"]:
            assert act == pytest.approx(float(acts_F[latent]), rel=1e-3)
        assert token["latents"][0][0] == int(acts_F.argmax())
    best = answer["latents"][0]
    assert best["latent"] == int(acts_LF.max(dim=0).values.argmax()) and max(best["acts"]) <= best["max"]


def test_a_push_adds_the_decoder_row_and_none_changes_nothing(live: Live, root: Path, tiny_lm: Any) -> None:
    none = live.steer(SAE_ID, TEXT, 5, 0.0)
    assert none["clean"] == none["steered"]
    pushed = live.steer(SAE_ID, TEXT, 5, 3.0)
    assert pushed["clean"] == none["clean"] and pushed["steered"]["next"] != none["clean"]["next"]
    sae = load(root / "saes" / SAE_ID)
    ids_BL = torch.tensor([[prefix_id(tiny_lm.tokenizer), *tiny_lm.tokenizer.encode(TEXT, add_special_tokens=False)]])
    x_LD = tiny_lm.capture(ids_BL, ["layers.1"])["layers.1"][0].float()
    for n in range(1, len(x_LD)):  # by hand: the token's own factor times the row, not at the prefix
        spread = float(((x_LD[n] - x_LD[n].mean()) ** 2).sum() / (len(x_LD[n]) - 1)) ** 0.5
        x_LD[n] += 3.0 * pushed["max"] * spread * sae.W_dec_FD[5]
    wanted = torch.softmax(tiny_lm.replace(ids_BL, "layers.1", x_LD[None])[0, -1], dim=-1)
    assert pushed["steered"]["next"][0][1] == pytest.approx(float(wanted.max()), rel=1e-2)


@pytest.mark.parametrize("text", [*NASTY.values(), "日本語"])
def test_any_text_can_be_asked_about(live: Live, text: str) -> None:
    assert json.dumps(live.tokens(SAE_ID, text), allow_nan=False).encode("utf-8")


def test_wrong_questions_say_what_is_wrong(live: Live, tmp_path: Path) -> None:
    for call, words in (
        (lambda: live.tokens("../../etc", TEXT), "there is no SAE"),
        (lambda: live.tokens(SAE_ID, ""), "expected 1 to"),
        (lambda: live.tokens(SAE_ID, "a" * (MAX_CHARACTERS + 1)), "2,001 characters"),
        (lambda: live.tokens(SAE_ID, "a" * 500), "at most 128"),
        (lambda: live.steer(SAE_ID, TEXT, 64, 1.0), "between 0 and 63"),
        (lambda: live.steer(SAE_ID, TEXT, -1, 1.0), "between 0 and 63"),
        (lambda: live.steer(SAE_ID, TEXT, 1, float("nan")), "not between"),
        (lambda: live.steer(SAE_ID, TEXT, 1, 1e9), "not between"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
    with pytest.raises(ArtefactError, match="holds no SAE"):
        Live(tmp_path)


def test_the_server_answers_its_own_page_and_refuses_others(live: Live, root: Path) -> None:
    pytest.importorskip("uvicorn", reason="pip install saescope[serve]")
    (root / "site").mkdir(exist_ok=True)
    (root / "site" / "index.html").write_text("the board", encoding="utf-8")
    with served(root, live) as port:

        def ask(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
            sent = {"Content-Type": "application/json"} | {n.replace("_", "-"): v for n, v in headers.items()}
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request(method, path, raw, sent)
            reply = connection.getresponse()
            found = reply.status, reply.read().decode()
            connection.close()
            return found

        asked = {"sae_id": SAE_ID, "text": TEXT}
        status, text = ask("POST", "/api/tokens", asked)
        assert status == 200 and json.loads(text) == live.tokens(SAE_ID, TEXT)
        steered = {**asked, "latent": 5, "strength": 2}
        assert json.loads(ask("POST", "/api/steer", steered)[1])["latent"] == 5
        assert SAE_ID in ask("GET", "/")[1] and ask("GET", "/site/index.html") == (200, "the board")
        assert "saescope = (function" in ask("GET", "/site.js")[1] and ask("GET", "/index.html")[0] == 307
        assert ask("POST", "/api/tokens", asked, Origin="http://evil.example")[0] == 403
        assert ask("POST", "/api/tokens", asked, Host="evil.example")[0] == 400
        assert ask("GET", "/", Host="evil.example")[0] == 400
        assert ask("POST", "/api/tokens", asked, Content_Type="text/plain")[0] == 415
        assert ask("POST", "/api/tokens", {**asked, "text": "a" * 20_000})[0] == 413
        for body in (b"\xff\xfe", b"[" * 9000, {"text": TEXT}, {**asked, "more": 1}, {**asked, "text": 3}, []):
            assert ask("POST", "/api/tokens", body)[0] == 400, body
        assert ask("POST", "/api/steer", {**steered, "latent": True})[0] == 400
        assert ask("GET", "/api/tokens")[0] == 405
        for path in ("/site/../run.json", "/site/%2e%2e/saes", "/site/..%2f..%2fetc/passwd", "/results"):
            assert ask("GET", path)[0] == 404, path


def test_the_door_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn", reason="pip install saescope[serve]")
    assert serve.main(["--root", str(tmp_path)]) == 2
    assert "python -m evals.leaderboard" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(root: Path, live: Live, capsys) -> None:
    (root / "site").mkdir(parents=True, exist_ok=True)
    (root / "site" / "index.html").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve.main(["--root", str(root), "--port", str(port)]) == 2
    said = capsys.readouterr()
    assert f"--port {port}: Address already in use; give another --port" in said.err and "http" not in said.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_with_130(root: Path, live: Live, capsys, number: int) -> None:
    pytest.importorskip("uvicorn", reason="pip install saescope[serve]")
    (root / "site").mkdir(parents=True, exist_ok=True)
    (root / "site" / "index.html").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    end = time.monotonic() + 60
    up: list[bool] = []

    def interrupt() -> None:
        while not up and time.monotonic() < end:
            time.sleep(0.05)
            up.extend([True] if why_unreachable("127.0.0.1", port, 1.0) is None else [])
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert serve.main(["--root", str(root), "--port", str(port)]) == 130
    thread.join()
    assert up and capsys.readouterr().err.endswith("interrupted\n")
