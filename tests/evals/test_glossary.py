"""docs/metrics.md says what the evaluations declare, and the door ``python -m evals.glossary`` says it too."""

from pathlib import Path

import pytest

from evals import glossary
from evals.measure import select
from sae.errors import ConfigError

METRICS_MD = Path(__file__).parents[2] / "docs" / "metrics.md"
EXPLAINED = {
    "reconstruction", "downstream_loss", "probe_loss", "n2g", "n2g_loss", "ablation_sparsity", "sparse_probing",
    "explanation", "seed_stability", "absorption", "ground_truth", "transcoding",
}  # fmt: skip


def test_the_document_holds_every_metric_as_it_is_declared() -> None:
    """Where this fails: python -m evals.glossary --write docs/metrics.md. A new evaluation need not stand there yet."""
    text = METRICS_MD.read_text(encoding="utf-8")
    places = {name for _, name, _ in glossary.BLOCK.findall(text)}
    assert places >= EXPLAINED
    assert glossary.rewritten(text, [e for e in select(()) if e.name in places]) == text


def test_a_changed_table_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, text = tmp_path / "metrics.md", METRICS_MD.read_text(encoding="utf-8")
    path.write_text(text.replace("| **`fvu`** | lower |", "| **`fvu`** | higher |"), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    assert glossary.main(["--write", str(path)]) == 0
    assert path.read_text(encoding="utf-8") == text


def test_a_new_evaluation_comes_last_and_an_unknown_one_is_named() -> None:
    text = METRICS_MD.read_text(encoding="utf-8")
    without = text.replace("<!-- metrics of n2g -->", "<!-- metrics of n2g")
    added = glossary.rewritten(without, select(()))
    assert added[len(without) :].startswith("\n## N2G explainability\n") and added.count("**`n2g_f1`**") == 2
    with pytest.raises(ConfigError, match="metrics of gone --> stands 1 times"):
        glossary.rewritten(text.replace("<!-- metrics of n2g -->", "<!-- metrics of gone -->"), select(()))
    with pytest.raises(ConfigError, match="metrics of n2g --> stands 2 times"):
        glossary.rewritten(text.replace("<!-- metrics of n2g_loss -->", "<!-- metrics of n2g -->"), select(()))


def test_cells_are_one_line_of_markdown() -> None:
    assert glossary.cell("sum |x|^2\n  < 3 * y") == r"sum \|x\|^2 &lt; 3 \* y"


def test_the_door(capsys: pytest.CaptureFixture[str]) -> None:
    assert glossary.main(["reconstruction"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Reconstruction (`reconstruction`)")
    assert "**`fvu`**" in printed and "`auc`" not in printed
    assert glossary.main(["reconstructon"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert glossary.main(["n2g", "--write", "x.md"]) == 2
