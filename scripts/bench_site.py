"""How long the pages of many SAEs take to build, how much memory, and how fast a browser opens them.

``python scripts/bench_site.py --saes 1 --latents 10000``; made-up latents of 24 windows each, written through the
real writers. The build is a process of its own. With a Chromium and playwright (``make browser`` installs it) the
leaderboard and the page of an SAE are opened from disk.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]
import synthetic_latents as synthetic  # noqa: E402
from stored_latents import KINDS, renumbered, write_artefacts  # noqa: E402
from synthetic_results import TOPK, VALUES, info, write_row_folder  # noqa: E402

from sae.manifest import read_manifest, writing  # noqa: E402

BUILD = """
import resource, sys, time
from pathlib import Path
from evals.leaderboard import build
begun, processor = time.monotonic(), time.process_time()
build(Path(sys.argv[1]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"built in {time.monotonic() - begun:.1f} s ({time.process_time() - processor:.1f} s of processor time), "
      f"peak {peak:.2f} GB")
"""


def write_results(root: Path, saes: int, latents: int) -> None:
    """Rows and artefacts of ``saes`` SAEs with ``latents`` explained latents each; all have the first one's latents."""
    base = synthetic.latent(0)
    first = ""
    for i in range(saes):
        sae_id = TOPK.replace("s0-", f"s{i}-")
        for evaluation in sorted({e for e, _, _ in VALUES}):
            cells = {
                (name, part): (found[TOPK][0] + 0.001 * i, found[TOPK][1])
                for (e, name, part), found in VALUES.items()
                if e == evaluation and not isinstance(found.get(TOPK, ""), str)
            }
            write_row_folder(root, info(sae_id), evaluation, cells)
        if first:
            copy_artefacts(root, first, sae_id, f"{0:016x}", f"{i:016x}")
            continue
        first, mine = sae_id, replace_ids(base, sae_id)
        made = [renumbered(mine, n) for n in range(100, 100 + latents)]
        write_artefacts(root, made, key=f"{i:016x}", made="2026-01-01")


def copy_artefacts(root: Path, old_id: str, new_id: str, old_key: str, new_key: str) -> None:
    """The artefacts of one SAE as those of another: making them anew takes longer than building their pages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind in KINDS:
        known = read_manifest(root / kind / old_key)["inputs"]
        inputs = {n: new_key if v == old_key else v for n, v in known.items()}
        with writing(root / kind / new_key, kind=kind, key=new_key, stage_version=1, config={}, inputs=inputs) as out:
            out.counts["sae_id"] = new_id
            for file in sorted((root / kind / old_key).iterdir()):
                if file.suffix == ".parquet":
                    table = pq.read_table(file)
                    if "sae_id" in table.column_names:
                        ids = pa.array([new_id] * len(table))
                        table = table.set_column(table.column_names.index("sae_id"), "sae_id", ids)
                    pq.write_table(table, out.path / file.name, compression="zstd")
                elif file.name != "manifest.json":
                    text = file.read_text(encoding="utf-8").replace(old_id, new_id)
                    (out.path / file.name).write_text(text, encoding="utf-8")


def replace_ids(latent: synthetic.LatentData, sae_id: str) -> synthetic.LatentData:
    """The same latent of another SAE."""
    return replace(
        latent,
        sae_id=sae_id,
        explanations=[replace(e, sae_id=sae_id) for e in latent.explanations],
        scores=[replace(s, sae_id=sae_id) for s in latent.scores],
        effect=latent.effect and replace(latent.effect, sae_id=sae_id),
    )


def sizes(site: Path) -> str:
    """Files and bytes of the pages."""
    latent = [p.stat().st_size for p in (site / "latent").rglob("*.html")]
    pages = {name: (site / f"{name}.html").stat().st_size / 1e3 for name in ("index", "compare")}
    largest = max(p.stat().st_size for p in (site / "sae").glob("*.html")) / 1e3
    parts = ", ".join(f"{name} {kb:.0f} kB" for name, kb in pages.items())
    return f"{len(latent):,} latent pages, {sum(latent) / 1e9:.2f} GB; {parts}, largest SAE page {largest:.0f} kB"


def open_pages(site: Path) -> None:
    """Time until the first rows can be used, in headless Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        sae = sorted((site / "sae").glob("*.html"))[0]
        opened = (("leaderboard", site / "index.html", "#board tbody tr"), ("SAE", sae, "#latents tbody tr"))
        for name, path, row in opened:
            begun = time.monotonic()
            page.goto(f"file://{path}")
            page.locator(row).first.wait_for()
            print(f"{name} page: first row after {time.monotonic() - begun:.2f} s")
        begun = time.monotonic()
        page.fill("#search", "court 10")
        page.wait_for_function("document.querySelector('#count').textContent.includes(' of ')")
        print(f"search: {time.monotonic() - begun:.2f} s, {page.text_content('#count')}")
        browser.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=int, default=1)
    parser.add_argument("--latents", type=int, default=10_000)
    parser.add_argument("--root", type=Path, help="made and kept here; default: a temporary folder")
    parser.add_argument("--no-browser", action="store_true")
    args = parser.parse_args()
    root = args.root or Path(tempfile.mkdtemp(prefix="saescope-site-"))
    try:
        if not (root / "rows").is_dir():
            write_results(root, args.saes, args.latents)
        subprocess.run([sys.executable, "-c", BUILD, str(root)], cwd=REPOSITORY, check=True)
        print(sizes(root / "site"))
        if not args.no_browser:
            open_pages(root / "site")
    finally:
        if args.root is None:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
