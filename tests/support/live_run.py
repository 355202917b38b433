"""A results folder with a random SAE on the tiny language model, and the local server over it, for tests."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from held_out import random_sae

from evals.live import Live
from sae import checkpoint
from sae.config import SubjectMeta
from sae.language_model import LanguageModel
from sae.manifest import writing

SAE_ID = "tiny.topk.s0-64"


def live_run(root: Path, lm: LanguageModel) -> Live:
    """``root/saes/SAE_ID`` (TopK, 64 latents, k = 4, at layers.1) opened with this language model."""
    ids_BL = torch.randint(97, 122, (4, 16), generator=torch.Generator().manual_seed(0))
    x_ND = lm.capture(ids_BL, ["layers.1"])["layers.1"].reshape(-1, lm.d_model).float()
    meta = SubjectMeta(lm="tiny", lm_revision="0", hookpoint="layers.1", lm_dtype="float32", context_length_tokens=16)
    sae = random_sae(d_in=lm.d_model)
    sae.cfg = replace(sae.cfg, meta=meta)
    with writing(root / "saes" / SAE_ID, kind="saes", key=SAE_ID, stage_version=1, config={}) as out:
        checkpoint.save(sae, out.path, x_ND)
    return Live(root, lm)


@contextmanager
def served(root: Path, live: Live) -> Iterator[int]:
    """The server in a thread on a free port of the loop-back interface; the port."""
    import uvicorn

    from evals.serve import make_app

    (root / "site").mkdir(exist_ok=True)
    server = uvicorn.Server(uvicorn.Config(make_app(root, live), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
