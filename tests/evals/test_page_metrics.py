"""The page of definitions: every metric that measured an SAE of the board, and links that end there."""

import re
from pathlib import Path

import pytest
from synthetic_results import write_run

from evals import page_metrics
from evals.measure import select
from evals.pages import build_site
from evals.results import load_results


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_run(root)
    return build_site(root, load_results(root)).parent


def test_every_evaluation_of_the_board_is_defined_metric_by_metric(site: Path) -> None:
    page = (site / page_metrics.PAGE).read_text()
    measured = set(load_results(site.parent)["eval"])
    found = {e.name: e for e in select(()) if e.name in measured}
    assert len(found) >= 5
    for evaluation in found.values():
        assert f'<h2 id="{evaluation.name}">' in page
        for metric in evaluation.metrics:
            assert page.count(f'<tr id="{evaluation.name}.{metric.name}">') == 1
    others = {e.name for e in select(())} - measured
    assert not [name for name in others if f'<h2 id="{name}">' in page]


def test_links_of_the_sae_pages_end_at_a_definition(site: Path) -> None:
    ids = set(re.findall(r'<tr id="([^"]+)">', (site / page_metrics.PAGE).read_text()))
    pages = "".join(page.read_text() for page in (site / "sae").glob("*.html"))
    links = set(re.findall(r"metrics\.html#([^\"]+)", pages))
    assert len(links) >= 10 and links <= ids
    assert 'href="metrics.html"' in (site / "index.html").read_text()


def test_sources_are_those_that_a_reader_has() -> None:
    """Notes that are not in the repository are not named on a page."""
    metrics = [m for e in page_metrics.definitions(e.name for e in select(())) for m in e["metrics"]]
    assert not [m for m in metrics if re.search(r"\b(METRICS|AUTOINTERP|HOUSE|TRAINING)\b", m["source"])]
    assert page_metrics.source("Gurnee 2024; METRICS B") == "Gurnee 2024; docs/metrics.md, B"
    assert page_metrics.source("METRICS C.3, there") == "docs/metrics.md, C.3, there"
    sections = set(re.findall(r"docs/metrics\.md, ([A-Z]|\d)", " ".join(m["source"] for m in metrics)))
    document = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert sections and not [s for s in sections if f"\n## {s}. " not in document]


def test_an_evaluation_from_elsewhere_is_left_out() -> None:
    assert page_metrics.definitions(["my_eval"]) == []


def test_what_an_evaluation_asks_is_said_without_its_letter() -> None:
    (found,) = page_metrics.definitions(["probe_loss"])
    assert found["about"] == "Does one latent carry a known feature?"
    names = [e["name"] for e in page_metrics.definitions(e.name for e in select(()))]
    assert names[:3] == ["reconstruction", "downstream_loss", "probe_loss"] and names[-1] == "transcoding"
