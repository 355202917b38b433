"""The static pages: everything is there, nothing of a text becomes markup, nothing asks the network."""

import gc
import json
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import synthetic_latents as synthetic
from nasty_texts import NASTY
from stored_latents import renumbered, write_artefacts
from synthetic_results import PCA, RANDOM, RELU, TOPK, write_run

from autointerp.exemplars import ExemplarTable
from autointerp.pipeline import open_explanations, open_scores
from autointerp.records import Explanation, Failure
from evals import pages
from evals.board import build_board
from evals.effect_records import LatentEffect
from evals.page_data import LatentData, SaeData, SiteData, artefacts, load_site_data
from evals.page_tokens import TokenReader
from evals.results import load_results
from sae.manifest import writing

VOID = {"meta", "link", "input", "br", "hr", "img", "wbr"}


class Page(HTMLParser):
    """Parses strictly: every element closed in order; collects text, attributes and element names."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.blocks: dict[str, str] = {}
        self.block = ""
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.stack == [], f"unclosed {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        self.block = str(dict(attrs)["id"]) if tag == "script" and "id" in dict(attrs) else ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script":
            self.blocks[self.block] = self.blocks.get(self.block, "") + data
        else:
            self.text.append(data)

    @property
    def words(self) -> str:
        return "".join(self.text)

    def data(self, name: str) -> Any:
        """The data block of this id, as a script reads it."""
        return json.loads(self.blocks[name])

    def named(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attrs for name, attrs in self.tags if name == tag)


def build(root: Path, data: dict[str, SaeData] | None = None) -> Path:
    results = load_results(write_run(root))
    return pages.build_site(root, results, build_board(results), synthetic.site_data() if data is None else data).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("pages") / "results")


def every_page(site: Path) -> list[tuple[Path, Page]]:
    return [(path, Page(path.read_text(encoding="utf-8"))) for path in sorted(site.rglob("*.html"))]


def test_all_pages_are_there_well_formed_and_linked(site: Path) -> None:
    found = every_page(site)
    assert len(found) == 3 + 4 + 2 * 3
    for path, page in found:
        assert next(page.named("html"))["lang"] == "en" and list(page.named("h1")) and list(page.named("main"))
        for tag, name in (("a", "href"), ("link", "href"), ("script", "src")):
            for attrs in page.named(tag):
                target = str(attrs.get(name, ""))
                target = target.partition("#")[0]
                if not target or target.startswith("data:") or "leaderboard." in target:
                    continue
                assert (path.parent / target).resolve().is_file(), f"{path}: {target}"


def test_no_request_leaves_the_page(site: Path) -> None:
    for path in [p for p in site.rglob("*") if p.is_file()]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://|@import|fetch\(|XMLHttpRequest|innerHTML|document\.write|\beval\(", text), path
    for path, page in every_page(site):
        for attrs in page.named("script"):  # a script of this folder, or data that nothing runs
            assert "src" in attrs or attrs.get("type") == "application/json", path
        assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")], path


def test_index_shows_values_floors_judges_and_the_run(site: Path) -> None:
    page = Page((site / "index.html").read_text(encoding="utf-8"))
    for text in (
        "0.237",
        "[0.231, 0.243]",
        "Floors and ceilings",
        "weak judge",
        "Check AUC",
        "✓ better",
        "train SAEs",
        "2.4 min",
        "reused",
        "python -m evals.run_all --preset quick",
        "0123456789abcdef",
        "made-up cpu",
    ):
        assert text in page.words, text
    gaps = [a for a in page.named("span") if a.get("class") == "gap"]
    assert (
        gaps
        and any("no_effect" in str(a.get("title")) for a in gaps)
        and all(a.get("tabindex") == "0" for a in gaps if "title" in a)
    )
    assert len([a for a in page.named("svg") if a.get("class") == "chart"]) == 2
    assert len(list(page.named("button"))) > 15 and (site / "index.html").stat().st_size < 1_000_000
    assert all(
        a.get("tabindex") == "0" and a.get("aria-label") for a in page.named("div") if a.get("class") == "scroll"
    )


def test_latent_page_shows_everything_with_failures_as_failures(site: Path) -> None:
    path = site / "latent" / TOPK / "17.html"
    page = Page(path.read_text(encoding="utf-8"))
    for text in (
        "selected",
        "failed",
        "no_json (the reply held no object)",
        "margin",
        "0.310",
        "check AUC 0.84",
        "weak judge",
        "[0.710, 0.930]",
        "0.520",
        "6 + 8",
        "judge",
        "ruling",
        "court",
    ):
        assert text in page.words, text
    drawn = page.data("drawn")
    windows = {g["title"]: g["windows"] for g in drawn["groups"]}
    assert "Scored, silent but close (hard negatives)" in windows and len(windows["Scored, active"]) == 6
    every = [w for group in windows.values() for w in group]
    assert sum(len(group) for group in windows.values()) == 4 + 3 + 3 + 6 + 8
    verdicts = {v for w in every for v in w.get("v", ())}
    assert {v[0] for v in verdicts} == {"✓", "✗", "⚠", "s"}
    assert "⚠ embedding: timeout" in verdicts and "simulation 0.35" in verdicts
    assert [w["f"] for w in every if "f" in w] == ["low_mass"]
    assert drawn["max"] == 3.7 and [" court", 3.7, 1] in [piece for w in every for piece in w["t"]]
    simulated = [w for w in every if "m" in w]
    assert len(simulated) == 7 and all(len(w["m"]) == len(w["t"]) == 32 for w in simulated)
    assert {v for w in simulated for v in w["m"]} == {8, 35, 80}
    assert drawn["by_group"] == [["token_list", "embedding", "recall", "decile=1", [0.5, 0.1, 0.9], "6 + 8"]]
    assert path.stat().st_size < 60_000
    titles = [str(a.get("title")) for a in page.named("li")]
    assert any("from 5 exemplar(s)" in t for t in titles)


def test_sae_page_lists_latents_and_all_metrics(site: Path) -> None:
    page = Page((site / "sae" / f"{RELU}.html").read_text(encoding="utf-8"))
    for text in ("words such as court, law", "embedding auc", "gain_vs_random", "Training loss", "0.8710"):
        assert text in page.words, text
    listed = page.data("listed")
    assert [row[0] for row in listed["rows"]] == [17, 22, 27]
    assert listed["rows"][0] == [
        17,
        "words such as court, law",
        "",
        "token_list",
        0.0031,
        [0.83, 0.71, 0.93, 0.52],  # its shuffled floor at the end
        [0.41, 0.2, 0.6],
    ]
    assert [c["title"] for c in listed["columns"]] == ["embedding auc", "simulation pearson"]
    assert all((site / "sae" / listed["folder"] / f"{row[0]}.html").is_file() for row in listed["rows"])


def test_best_and_worst_explained_are_ranked_by_a_believed_score(tmp_path: Path) -> None:
    data = synthetic.site_data()
    for latent, value in zip(data[TOPK].latents, (0.4, 0.9, 0.6), strict=True):
        changed = [
            replace(s, value=value) if (s.scorer, s.metric) == ("embedding", "auc") and not s.floor_kind else s
            for s in latent.scores
        ]
        latent.scores = changed
    page = (build(tmp_path / "results", data) / "sae" / f"{TOPK}.html").read_text(encoding="utf-8")
    best, worst = page.split("Best explained")[1].split("Worst explained")
    assert re.findall(r"/(\d+)\.html", best.split("</figure>")[0]) == ["22"]
    assert re.findall(r"/(\d+)\.html", worst.split("</figure>")[0]) == ["17"]


def test_the_board_is_there_as_data_with_intervals_floors_and_gaps(site: Path) -> None:
    page = Page((site / "index.html").read_text(encoding="utf-8"))
    board = page.data("board-data")
    ids = [s["id"] for s in board["subjects"]]
    assert ids[:2] == [TOPK, RELU] and {s["id"] for s in board["subjects"] if s["floor"]} == {RANDOM, PCA}
    columns = [c["id"] for c in board["columns"]]
    topk = board["subjects"][0]
    assert topk["cells"][columns.index("fvu")] == [0.237, 0.231, 0.243]
    assert ids[topk["random"]] == RANDOM and topk["l0"] == 32.0 and topk["d_sae"] == 4608
    assert all(len(s["cells"]) == len(columns) for s in board["subjects"])
    assert any(len(c) == 1 and "no_effect" in c[0] for s in board["subjects"] for c in s["cells"])
    options = {a["value"] for a in page.named("option")}
    assert {"SmolLM2-135M", "layers.15", "topk", "relu", "4608", ""} <= options and "pca" not in options


def nasty_latent() -> tuple[LatentData, TokenReader]:
    base = synthetic.latent()
    texts = {100 + i: text for i, text in enumerate(NASTY.values())}
    ids = tuple(texts)
    window = synthetic.exemplar(1, "top", "explain", ids=ids)
    evil = Explanation(
        explanation_id="x", sae_id=TOPK, latent=17, explainer="<i>", text=" | ".join(NASTY.values()), selected=True
    )
    pattern = {"patterns": [{"ids": list(ids), "anchored": True, "value": 1.0, "n_docs": 1}]}
    also = Explanation(explanation_id="y", sae_id=TOPK, latent=17, explainer="n2g", pattern=pattern, selected=False)
    return LatentData(
        latent=17,
        sae_id=TOPK,
        stats=base.stats,
        exemplars=[window],
        explanations=[evil, also],
        top_ids=ids,
        promoted=tuple(NASTY.values()),
        effect=LatentEffect(
            sae_id=TOPK, latent=17, n_windows=1, raised=tuple((text, 0.1) for text in NASTY.values())
        ),
    ), synthetic.reader(texts)


def part_of(path: Path) -> dict[str, Any]:
    """What a file of compare/ hands over: one call with one JSON object that no markup can end."""
    text = path.read_text(encoding="utf-8")
    found = re.fullmatch(r"saescope\.receive\((\d+),(\{.*\})\);\n", text)
    assert found and found.group(1) == path.stem and not set("<>&\u2028\u2029") & set(text), path
    return dict(json.loads(found.group(2)))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    latent, reader = nasty_latent()
    data = {TOPK: SaeData(sae_id=TOPK, cfg={"note": NASTY["markup"] + "\u202e"}, latents=[latent], tokens=reader)}
    clean = {tag for _, page in every_page(build(tmp_path / "clean")) for tag, _ in page.tags}
    site = build(tmp_path / "nasty", data)
    for path, page in every_page(site):
        text = path.read_text(encoding="utf-8")  # strict: half an emoji would not have been writable
        assert {tag for tag, _ in page.tags} <= clean, path
        assert all(attrs.get("src") or attrs.get("id") in page.blocks for attrs in page.named("script")), path
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text), path
    listed = Page((site / "sae" / f"{TOPK}.html").read_text(encoding="utf-8")).data("listed")["rows"][0]
    parts = [part_of(path) for path in sorted((site / "compare").glob("*.js"))]
    assert NASTY["markup"] in listed[1] and len(parts) == 4 and all(isinstance(p["texts"], dict) for p in parts)
    page = Page((site / "latent" / TOPK / "17.html").read_text(encoding="utf-8"))
    window = page.data("drawn")["groups"][0]["windows"][0]
    drawn = "".join(piece if isinstance(piece, str) else piece[0] for piece in window["t"])
    for text in (
        NASTY["markup"],
        NASTY["attribute"],
        NASTY["entity"],
        NASTY["hebrew"],
        NASTY["arabic"],
        NASTY["template"],
        "a␀b␇c␛[31m",
        "one⏎two␍⏎⇥three⏎",
        "abc⟨RLO⟩def⟨LRI⟩x⟨PDI⟩",
        "\ufffd",
    ):
        assert text in page.words and text in drawn, text


def test_a_latent_says_what_the_model_does_without_it(tmp_path: Path) -> None:
    data = synthetic.site_data()
    page = Page((build(tmp_path / "one", data) / "latent" / TOPK / "17.html").read_text(encoding="utf-8"))
    for text in ("3 of its strongest windows (left out: 1 × no_active_latent)", "+0.0321 nats", "+5.3", "-0.57"):
        assert text in page.words, text
    failure = Failure(code="no_active_latent", stage="effects", detail="no window")
    data[TOPK].latents[0].effect = LatentEffect(sae_id=TOPK, latent=17, n_windows=0, failure=failure)
    page = Page((build(tmp_path / "two", data) / "latent" / TOPK / "17.html").read_text(encoding="utf-8"))
    assert "no_active_latent (no window)" in page.words
    data[TOPK].latents[0].effect = None
    page = Page((build(tmp_path / "three", data) / "latent" / TOPK / "17.html").read_text(encoding="utf-8"))
    assert "What the model does without it" not in page.words


def test_rebuilt_whole_and_with_the_same_bytes(tmp_path: Path) -> None:
    site = build(tmp_path / "results")
    first = pages.site_digest(site)
    (site / "latent" / "stale.html").write_text("old", encoding="utf-8")
    results = load_results(tmp_path / "results")
    pages.build_site(tmp_path / "results", results, None, synthetic.site_data())
    assert pages.site_digest(site) == first and not list((tmp_path / "results").glob("site.tmp-*"))


def test_a_failing_build_leaves_the_old_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = build(tmp_path / "results")
    first = pages.site_digest(site)
    broken = synthetic.site_data()
    broken[TOPK].latents[1].exemplars = [None]  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        pages.build_site(tmp_path / "results", load_results(tmp_path / "results"), None, broken)
    assert pages.site_digest(site) == first and not list((tmp_path / "results").glob("site.tmp-*"))


def test_rows_alone_make_a_site(tmp_path: Path) -> None:
    site = build(tmp_path / "results", {})
    assert len(every_page(site)) == 7


def test_newest_artefact_last_and_incomplete_ones_ignored(tmp_path: Path) -> None:
    for key, made in (("b", "2026-01-02"), ("a", "2026-01-03"), ("c", "2026-01-01")):
        with writing(tmp_path / "scores" / key, kind="scores", key=key, stage_version=1, config={}):
            pass
        path = tmp_path / "scores" / key / "manifest.json"
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["provenance"]["created_at"] = made
        path.write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "scores" / "half").mkdir()
    assert [folder.name for folder, _ in artefacts(tmp_path, "scores")] == ["c", "b", "a"]
    assert load_site_data(tmp_path) == {}


def test_artefacts_of_the_newest_run_are_read_whole(tmp_path: Path) -> None:
    latent = synthetic.latent()
    older = synthetic.latent()
    older.explanations = older.explanations[:1]
    write_artefacts(tmp_path, [latent], key="aa", made="2026-02-02")
    write_artefacts(tmp_path, [older], key="bb", made="2026-01-01")
    sae = load_site_data(tmp_path)[TOPK]
    assert [x.latent for x in sae.latents] == [17, 99]
    found = sae.latents[0]
    table = ExemplarTable.open(tmp_path / "exemplars" / "aa")  # the reader of the floor below agrees
    assert (
        found.exemplars == [e for split in ("explain", "score") for e in table.exemplars(17, split)] == latent.exemplars
    )
    scored = open_scores(tmp_path / "scores" / "aa")
    assert (found.scores, found.items, found.simulations) == (scored.scores, scored.items, scored.simulations)
    assert found.explanations == open_explanations(tmp_path / "explanations" / "aa") and sae.checks == scored.checks
    assert found.explanations == latent.explanations and found.scores == latent.scores
    assert found.simulations == latent.simulations and found.items == latent.items
    assert (found.promoted, found.suppressed) == ((" judge",), (" cat",)) and sae.checks[1].weak
    assert [f.code for f in found.failures] == ["no_hard_negative"] and sae.latents[1].exemplars == []
    assert found.effect == latent.effect and sae.latents[1].effect is None
    page = (build(tmp_path, {TOPK: sae}) / "latent" / TOPK / "99.html").read_text(encoding="utf-8")
    assert "No explanation was made" in page and "There are no windows" in page


def test_saes_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, sae_id, numbers in (("aa", TOPK, (17, 18)), ("bb", RELU, (5,))):
        base = synthetic.latent(17, sae_id)
        write_artefacts(tmp_path, [renumbered(base, n) for n in numbers], key=key, made="2026-02-02")
    results = load_results(write_run(tmp_path))
    whole = load_site_data(tmp_path)
    first = pages.site_digest(pages.build_site(tmp_path, results, None, whole).parent)
    reads, alive = [], []
    read = SiteData._read

    def watched(data: SiteData, sae_id: str) -> SaeData:
        gc.collect()
        assert not [r for r in alive if r() is not None], "an SAE is still in memory"
        reads.append(sae_id)
        found = read(data, sae_id)
        alive.append(weakref.ref(found))
        return found

    whole = {}
    monkeypatch.setattr(SiteData, "_read", watched)
    assert pages.site_digest(pages.build_site(tmp_path, results).parent) == first
    assert sorted(reads) == sorted([TOPK, RELU])
    assert len(list((tmp_path / "site" / "latent").rglob("*.html"))) == 5  # and a latent 99 without windows, twice
