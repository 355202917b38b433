"""Reading what autointerp left for one subject: explanations, scores, judge checks. Torch-free."""

from pathlib import Path
from typing import NamedTuple

from autointerp.records import Explanation, JudgeCheck, LatentScore
from sae.errors import ArtefactError
from sae.manifest import artefact_dir, read_manifest


class Explained(NamedTuple):
    """What evaluations need of a finished ``scores/<key>/``."""

    scores: list[LatentScore]
    explanations: list[Explanation]
    checks: list[JudgeCheck]


def explanations_folder(scores: Path) -> Path:
    """``explanations/<key>/`` that a scores folder was made from; ArtefactError if its manifest does not say."""
    key = read_manifest(scores).get("inputs", {}).get("explanations")
    if not key:
        raise ArtefactError(f"the manifest of {scores} names no explanations; score the explanations again")
    return artefact_dir(Path(scores).parent.parent, "explanations", str(key))


def read_explanations(scores: Path) -> list[Explanation]:
    """The explanations behind a scores folder."""
    from autointerp.pipeline import open_explanations

    return list(open_explanations(explanations_folder(scores)))


def read_explained(scores: Path) -> Explained:
    """Scores with the explanations they are of, and the judges' checks."""
    from autointerp.pipeline import open_scores

    found = open_scores(scores)
    return Explained(list(found.scores), read_explanations(scores), list(found.checks))
