"""Static pages: leaderboard, a page per SAE and per explained latent. They open from disk, ask no network. Torch-free.

Markup comes from the templates in ``evals/site`` alone, with automatic escaping; every text of a token, an explanation
or a file goes through :func:`evals.page_text.visible` and is written as text.
"""

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.board import Board, BoardSubject, build_board, newest
from evals.latent_page import SaeDigest, latent_context
from evals.page_compare import compare_context, compare_parts
from evals.page_data import RunInfo, SaeData, SiteData, run_info
from evals.page_index import index_context
from evals.page_metrics import PAGE as METRICS_PAGE
from evals.page_metrics import definitions
from evals.page_text import data_block, number, percent, slug, sort_key, visible
from evals.results import draws_below
from evals.sae_page import sae_context
from sae.console import track
from sae.manifest import canonical_json, sha256_text

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

SITE = Path(__file__).with_name("site")
STATIC = ("style.css", "site.js", "latent.js", "board.js", "sae.js", "compare.js")
Write = Callable[..., None]
"""write(path below the site, template, **context)."""


def environment() -> "jinja2.Environment":
    """Templates of ``evals/site``: escaping always on, an unknown name is an error."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SITE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,  # no look at the file's date for each of ten thousand pages
    )
    env.filters["num"] = number
    env.filters["pct"] = percent
    env.filters["key"] = sort_key
    env.filters["data"] = data_block
    return env


def build_site(
    root: Path, results: "pd.DataFrame", board: Board | None = None, data: Mapping[str, SaeData] | None = None
) -> Path:
    """Build ``root/site`` anew and put it in place whole. Returns the path of index.html.

    ``board`` as :func:`evals.board.build_board` makes it of ``results``, ``data`` as
    :class:`evals.page_data.SiteData` reads it below ``root``; same artefacts, same bytes.
    """
    root = Path(root)
    info = run_info(root, results)
    data = SiteData(root) if data is None else data
    board = board or build_board(results, draws_below(root))
    target, temporary = root / "site", root / f"site.tmp-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        rows = newest(results)
        evaluations = definitions(rows["eval"].unique())
        write = _writer(temporary, _foot(info), {m["id"] for e in evaluations for m in e["metrics"]})
        digests = _write_saes(write, board, rows, data)
        write("index.html", "index.html.j2", **index_context(board, info, digests))
        write(METRICS_PAGE, "metrics.html.j2", evaluations=evaluations)
        write("compare.html", "compare.html.j2", **compare_context(board))
        for place, part in compare_parts(root, board, digests, draws_below(root)):
            (temporary / place).parent.mkdir(exist_ok=True)
            (temporary / place).write_text(part, encoding="utf-8", errors="replace")
        old = root / f"site.tmp-old-{os.getpid()}"
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target / "index.html"


def _writer(folder: Path, foot: str, defined: Collection[str]) -> Write:
    """Makes the folder with its scripts; the answer renders a template into a page of it. ``defined``: ids of the
    metrics on their page."""
    env = environment()
    folder.mkdir(parents=True)
    for name in STATIC:
        shutil.copyfile(SITE / name, folder / name)

    def write(path: str, template: str, **context: Any) -> None:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * path.count("/")
        text = env.get_template(template).render(up=up, foot=foot, defined=defined, **context)
        file.write_text(text, encoding="utf-8", errors="replace")

    return write


def _write_saes(
    write: Write, board: Board, rows: "pd.DataFrame", data: Mapping[str, SaeData]
) -> dict[str, SaeDigest]:
    """A page per SAE and per explained latent. Each SAE is read once and let go; what is kept of it is returned."""
    digests: dict[str, SaeDigest] = {}
    for nth, subject in enumerate(board.subjects, 1):
        title = f"Pages, SAE {nth} of {len(board.subjects)}"
        # A call of its own: a name left here would keep one SAE alive while the next is read.
        digest = _write_sae(write, subject, board, rows, data, title)
        if subject.sae_id in data:
            digests[subject.sae_id] = digest
    return digests


def _write_sae(
    write: Write, subject: BoardSubject, board: Board, rows: "pd.DataFrame", data: Mapping[str, SaeData], title: str
) -> SaeDigest:
    sae = data[subject.sae_id] if subject.sae_id in data else SaeData(sae_id=subject.sae_id)
    digest, place = SaeDigest.of(sae), slug(subject.sae_id)
    write(f"sae/{place}.html", "sae.html.j2", **sae_context(subject, board, rows, sae))
    for i, latent in enumerate(track(sae.latents, title, unit="pages")):
        beside = {
            "previous": f"{sae.latents[i - 1].latent}.html" if i else "",
            "following": f"{sae.latents[i + 1].latent}.html" if i + 1 < len(sae.latents) else "",
            "subject_short": subject.short,
            "sae_href": f"sae/{place}.html",
        }
        context = latent_context(latent, sae, digest.texts) | beside
        write(f"latent/{place}/{latent.latent}.html", "latent.html.j2", **context)
    return digest


def _foot(info: RunInfo) -> str:
    parts = [f"Commit {', '.join(c[:12] for c in info.commits)}" if info.commits else "", info.command]
    return visible(" · ".join(p for p in parts if p) or "saescope")


def site_digest(folder: Path) -> str:
    """SHA-256 over all files of a site, names and contents: two builds of the same artefacts agree."""
    from sae.manifest import sha256_file

    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return sha256_text(canonical_json([[p.relative_to(folder).as_posix(), sha256_file(p)] for p in files]))
