"""The page that says what each number of a board is: what the evaluations that made it declare. Torch-free."""

import inspect
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from evals.glossary import unit_text
from evals.page_text import slug, visible

if TYPE_CHECKING:
    from evals.base import Eval

PAGE = "metrics.html"
_SECTION = re.compile(r"\s*\(METRICS[^)]*\)")
_LETTER = re.compile(r"([A-Z])\. [^:]*: ?")


def _paragraph(evaluation: "Eval") -> str:
    """The first one of the evaluation's file, on one line."""
    text = (inspect.getdoc(inspect.getmodule(type(evaluation))) or "").split("\n\n", 1)[0]
    return re.sub(r"\s+", " ", _SECTION.sub("", text)).strip()


def about(evaluation: "Eval") -> str:
    """What the evaluation asks, in a sentence, without its letter and name in docs/metrics.md."""
    text = _paragraph(evaluation)
    text = text[found.end() :] if (found := _LETTER.match(text)) else text
    return visible(text[:1].upper() + text[1:])


def _letter(evaluation: "Eval") -> str:
    """Its section in docs/metrics.md; those without one come last."""
    found = _LETTER.match(_paragraph(evaluation))
    return found[1] if found else "~"


def source(reference: str) -> str:
    """Where a definition comes from, for somebody who has the repository: METRICS is docs/metrics.md."""
    text = re.sub(r"\bAUTOINTERP [0-9.]*[0-9]", "docs/metrics.md, G", reference)
    return visible(re.sub(r"\bMETRICS ([A-Z0-9][.0-9]*[0-9]|[A-Z0-9])", r"docs/metrics.md, \1", text))


def definitions(measured: Iterable[str]) -> list[dict[str, Any]]:
    """What metrics.html.j2 needs of each of these evaluations, in the order of docs/metrics.md.

    Evaluations that came from elsewhere (``module:object``) are not among the plug-ins and are left out.
    """
    from evals.measure import select

    names, found = set(measured), []
    for evaluation in sorted(select(()), key=lambda e: (_letter(e), e.name)):
        if evaluation.name not in names:
            continue
        metrics = [
            {
                "id": slug(f"{evaluation.name}.{m.name}"),
                "name": m.name,
                "title": visible(m.title),
                "better": m.better,
                "unit": visible(unit_text(m)),
                "what": visible(m.description),
                "source": source(m.reference),
            }
            for m in evaluation.metrics
        ]
        found.append(
            {
                "name": evaluation.name,
                "title": visible(evaluation.title),
                "version": evaluation.version,
                "about": about(evaluation),
                "metrics": metrics,
            }
        )
    return found
