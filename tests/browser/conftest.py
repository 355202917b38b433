"""A made-up site in a real browser (Debian's Chromium or another), offline; every console error and request counts."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_latents as synthetic
from nasty_texts import NASTY
from synthetic_results import RELU, TOPK, write_run

from autointerp.records import Explanation
from evals import pages
from evals.board import build_board
from evals.page_data import LatentData
from evals.results import load_results

TIMEOUT_S = float(os.environ.get("BROWSER_TIMEOUT_S", "10"))
"""What a page may take for one step; more on a machine that others keep busy."""
MANY = 450
"""Explained latents of the second SAE: more than a list draws at once."""


def chromium() -> str | None:
    """The browser: $CHROMIUM, or the first of the usual names on the path."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def nasty() -> LatentData:
    """Latent 40: its tokens, explanation and output tokens are the nasty texts; ids from 100."""
    base, ids = synthetic.latent(40), tuple(range(100, 100 + len(NASTY)))
    text = " | ".join(NASTY.values())
    base.explanations = [Explanation(explanation_id="e-list", sae_id=TOPK, latent=40, explainer="<i>", text=text)]
    base.exemplars = [synthetic.exemplar(1, "top", "explain", ids=ids), *base.exemplars]
    base.promoted, base.top_ids = tuple(NASTY.values()), ids
    return base


def plain_latent(number: int) -> LatentData:
    """A latent with an explanation and nothing else; every tenth failed to get one."""
    text = None if number % 10 == 0 else f"text number {number} about {'law' if number % 2 else 'cells'}"
    explanation = Explanation(
        explanation_id=f"e{number}", sae_id=RELU, latent=number, explainer="pmi", text=text, selected=True
    )
    found = LatentData(sae_id=RELU, latent=number, explanations=[explanation] if text else [])
    found.stats = {"density": 1.0 / (number + 2)}
    return found


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the site; latent 17 of TOPK has everything, 40 the nasty texts, RELU has MANY latents."""
    from safetensors.numpy import save_file

    root = tmp_path_factory.mktemp("browser") / "results"
    results = load_results(write_run(root))
    data = synthetic.site_data()
    data[TOPK].tokens = synthetic.reader({100 + i: text for i, text in enumerate(NASTY.values())})
    data[TOPK].latents.append(nasty())
    data[TOPK].latents[0].stats |= {"nearest": np.array([22, 999]), "nearest_cosine": np.array([0.61, 0.5])}
    data[RELU].latents = [plain_latent(i) for i in range(MANY)]
    rng = np.random.default_rng(5)
    weights_FD = rng.normal(size=(64, 8)).astype(np.float32)
    for sae_id, rows_FD in ((TOPK, weights_FD), (RELU, weights_FD[::-1].copy())):
        (root / "saes" / sae_id).mkdir(parents=True)
        save_file({"W_dec_FD": rows_FD}, root / "saes" / sae_id / "sae.safetensors")
    return pages.build_site(root, results, build_board(results), data).parent


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One browser for all tests; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install saescope[browser]")
    path = chromium()
    if path is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, site: Path) -> Iterator[Callable[..., Any]]:
    """open_page("index.html#…", **context options) -> a page. At the end: no error, no request but to files."""
    contexts, problems = [], []

    def log(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            problems.append(f"request to {request.url}")

    def open_one(place: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, "offline": True} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * TIMEOUT_S)
        page.on("console", lambda m: problems.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(f"uncaught: {error}"))
        page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", log)
        page.goto(f"file://{site}/{place}")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert problems == []
