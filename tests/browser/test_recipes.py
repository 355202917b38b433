"""The leaderboard with several training seeds per recipe, in a real browser. `make browser`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_recipes import RELU_HIGH, SINGLE, TOPK, write_recipes

from evals import pages
from evals.board import build_board
from evals.results import load_results

pytestmark = pytest.mark.browser
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In place of the site of the other tests: eight SAEs, three recipes."""
    root = tmp_path_factory.mktemp("recipes") / "results"
    data = write_recipes(root)
    results = load_results(root)
    yield pages.build_site(root, results, build_board(results), data).parent


def lines(page: Any) -> list[str]:
    """Titles of recipes and seeds of SAEs that can be seen, from above."""
    return page.eval_on_selector_all(
        "#board tbody.saes tr", "rows => rows.filter(r => !r.hidden).map(r => r.cells[0].dataset.v.split('-').pop())"
    )


def test_seeds_are_folded_opened_by_keyboard_and_kept_in_the_address(open_page: Open) -> None:
    page = open_page("index.html")
    assert lines(page) == ["topk, k 32", "dddddddd", "relu, L0 62", "relu, L0 32"]
    assert page.text_content("#count") == "8 of 8 SAEs"
    cell = page.locator("tr.recipe").first.locator("td").nth(4)
    assert "0.320 ± 0.020" in str(cell.text_content()) and cell.get_attribute("title") == "0.300 to 0.340"
    button = page.get_by_role("button", name="topk, k 32")
    button.focus()
    page.keyboard.press("Enter")
    assert lines(page)[:4] == ["topk, k 32", "0aaaaaaa", "1aaaaaaa", "2aaaaaaa"] and "seeds=topk" in page.url
    assert button.get_attribute("aria-expanded") == "true"
    page.reload()
    assert lines(page)[1] == "0aaaaaaa"
    page.get_by_role("button", name="topk, k 32").click()
    assert len(lines(page)) == 4 and "#" not in page.url
    page.check("#every")
    assert len(lines(page)) == 3 + 8 and "seeds=all" in page.url
    page.reload()
    assert len(lines(page)) == 3 + 8 and page.is_checked("#every")
    page.get_by_role("button", name="relu, L0 62").click()
    assert len(lines(page)) == 3 + 6 and not page.is_checked("#every")


def test_recipes_are_sorted_whole_and_filters_split_them(open_page: Open) -> None:
    page = open_page("index.html#seeds=all")
    page.locator('#board th[data-id="l0"] button').click()
    page.locator('#board th[data-id="l0"] button').click()
    assert lines(page)[:3] == ["relu, L0 62", "1ccccccc", "0ccccccc"] and lines(page)[3] == "dddddddd"
    page.goto(page.url.partition("#")[0])
    page.fill('[name="q"]', "1bbbbbbb")
    assert lines(page) == ["relu, L0 32", "1bbbbbbb"] and page.text_content("#count") == "1 of 8 SAEs"
    page.fill('[name="q"]', "topk, k 32")
    assert lines(page) == ["topk, k 32"] and page.text_content("#count") == "3 of 8 SAEs"
    page.fill('[name="q"]', "")
    page.select_option('[name="architecture"]', "relu")
    page.fill('[name="l0max"]', "31")
    assert lines(page) == ["relu, L0 32", "0bbbbbbb"]


def test_columns_without_values_are_off_and_can_be_chosen(open_page: Open) -> None:
    page = open_page("index.html")
    heads = page.locator("#board thead th:visible")
    titles = [t.strip() for t in heads.all_text_contents()]
    assert titles == ["SAE", "L0", "FVU↓", "Dead↓", "Failed items"]
    page.locator("#columns summary").click()
    page.get_by_label("KL", exact=True).check()
    page.get_by_label("Dead", exact=True).uncheck()
    page.reload()
    titles = [t.strip() for t in page.locator("#board thead th:visible").all_text_contents()]
    assert titles == ["SAE", "L0", "FVU↓", "KL↓", "Failed items"]
    page.locator("#columns summary").click()
    page.get_by_label("KL", exact=True).uncheck()
    page.get_by_label("Dead", exact=True).check()
    assert "hide" not in page.url


def test_what_is_folded_is_one_mark(open_page: Open) -> None:
    page = open_page("index.html")
    marks = page.locator("#explore .point")
    assert marks.count() == 3 + 1 + 1
    notes = page.eval_on_selector_all("#explore .point title", "all => all.map(t => t.textContent)")
    assert "topk, k 32, mean of 3 seeds: L0 32.0 [32.0, 32.0], FVU 0.320 [0.300, 0.340]" in notes
    page.check("#every")
    assert marks.count() == 8 + 1
    assert page.locator("ul.key li").all_text_contents() == [" batchtopk", " relu", " topk", " floor"]


def test_bars_show_interval_value_and_floor_on_one_scale(open_page: Open) -> None:
    page = open_page("index.html#seeds=all")

    read = """name => {
      const row = [...document.querySelectorAll('#board tr')].find(r => r.cells[0].textContent.includes(name));
      const style = row.querySelectorAll('.ib')[0].style, known = n => parseFloat(style.getPropertyValue('--' + n));
      return Object.fromEntries(['v', 'l', 'w', 'f'].map(n => [n, known(n)]));
    }"""

    def bar(name: str) -> dict[str, float]:
        return dict(page.evaluate(read, name))

    best, random = bar("0aaaaaaa"), bar("random_sae")
    assert best["l"] < best["v"] < best["l"] + best["w"] < best["f"] and abs(best["f"] - random["v"]) < 0.2
    mean = bar("topk, k 32")
    assert mean["l"] == pytest.approx(best["v"], abs=0.2)
    assert mean["l"] + mean["w"] == pytest.approx(bar("2aaaaaaa")["v"], abs=0.2)
    assert page.locator('#board th[data-id="fvu"]').get_attribute("title").endswith("n = 120.")


def test_head_and_first_column_stay_in_sight(open_page: Open) -> None:
    for size in ({"width": 1280, "height": 480}, {"width": 390, "height": 480}):
        page = open_page("index.html#seeds=all&hide=none", viewport=size)
        top = page.locator("#board").locator("xpath=..")
        page.evaluate("node => { node.scrollTop = 250; node.scrollLeft = 300; }", top.element_handle())
        frame, head = top.bounding_box(), page.locator('#board th[data-id="name"]').bounding_box()
        first = page.locator("#board tr[data-i]:not([hidden]) th").nth(3).bounding_box()
        assert frame and head and first
        assert abs(head["x"] - frame["x"]) < 3 and abs(head["y"] - frame["y"]) < 3 and abs(first["x"] - frame["x"]) < 3
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_comparison_reads_only_the_two_that_are_chosen(open_page: Open, site: Path) -> None:
    page = open_page(f"compare.html#a={TOPK[1]}&b={SINGLE}")
    row = page.locator("#differences tbody tr", has_text="FVU").first
    assert "−0.030 [" in str(row.text_content()) and "A better" in str(row.text_content())
    assert page.locator('script[src^="compare/"]').count() == 2
    page.select_option("#side-a", RELU_HIGH[0])
    page.locator("#differences td", has_text="0.050 [").first.wait_for()
    assert page.locator('script[src^="compare/"]').count() == 3 and len(list((site / "compare").glob("*.js"))) == 9
